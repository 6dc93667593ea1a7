# SPDX-License-Identifier: Apache-2.0
"""Instructions with a target: spoken questions with their answers, and sentences with their translations.

The teacher writes both sides (self-synthesis for question answering and speech translation). What it writes is read
strictly: a line that is not what was asked for is dropped, and counted with its reason.
"""

import json
from collections.abc import Mapping, Sequence

from nemo_rba.functional import user_prompt
from nemo_rba.protocols import Teacher
from nemo_rba.synthesis.filters import normalize_text
from nemo_rba.synthesis.filters_content import LanguageFilter
from nemo_rba.synthesis.instructions import Draft
from nemo_rba.synthesis.instructions_plan import Deck, Requests, Temperature, Template, read_items, unquoted
from nemo_rba.types import Instruction, SamplingParams

NEVER_ENDED = "empty or never ended"
QA_FIELDS = {"question", "answer", "aliases"}
ANSWERS = ("short", "sentence")


class SpokenQA:
    """Questions by topic, with a short answer and other names for it; ``task`` is "qa".

    Args:
        teacher: who writes, as JSON lines ``{"question": ..., "answer": ..., "aliases": [...]}``.
        template: what it is asked, with ``{topic}`` and ``{number}``; it must tell of the form of the lines.
        topics: a text file with one topic a line, or a list; gone through in shuffled order.
        num_questions: asked for in one prompt.
        answers: ``short`` makes the short answer the response. ``sentence`` leaves the response to the answer stage,
            which asks the question by itself; the short answer is then the first of the aliases (``AnswerFilter``).
        batch_size, temperature, top_p, max_new_tokens, seed: as for ``instructions_plan.Requests``.

    Raises:
        ValueError: a template or a list without content, a number below 1, or an unknown choice.
    """

    def __init__(self, *, teacher: Teacher, template: str, topics: str | Sequence[str], num_questions: int,
                 answers: str, batch_size: int, temperature: Temperature, top_p: float, max_new_tokens: int,
                 seed: int):  # fmt: skip
        if num_questions < 1 or answers not in ANSWERS:
            raise ValueError(f"sampler: num_questions={num_questions}, answers={answers!r}; expected at least 1, and "
                             f"one of {', '.join(ANSWERS)}")  # fmt: skip
        self._requests = Requests(teacher=teacher, batch_size=batch_size, temperature=temperature, top_p=top_p,
                                  max_new_tokens=max_new_tokens, seed=seed)  # fmt: skip
        self._template = Template(template, key="template", needs=("topic", "number"))
        self._topics = Deck(read_items(topics, key="topics"), seed=seed, name="topics")
        self._num_questions, self._answers = num_questions, answers

    def batch(self, index: int) -> list[Draft]:
        """The questions of batch ``index``, and what could not be read as one."""
        prompts = [
            self._template(topic=self._topics[number], number=self._num_questions)
            for number in self._requests.numbers(index)
        ]
        return [draft for reply in self._requests.ask(prompts, index) for draft in self._read(reply)]

    def _read(self, reply: str) -> list[Draft]:
        lines = [line.strip() for line in reply.split("\n") if line.strip() and not line.strip().startswith("```")]
        return [self._read_line(line) for line in lines] or [Draft(text=reply, reason=NEVER_ENDED)]

    def _read_line(self, line: str) -> Draft:
        reason, question, names = read_qa(line)
        if reason:
            return Draft(text=line, reason=reason)
        if self._answers == "sentence":
            return Draft(text=question, task="qa", aliases=tuple(names))
        return Draft(text=question, response=names[0], task="qa", aliases=tuple(names[1:]))


def read_qa(line: str) -> tuple[str, str, list[str]]:
    """A line of ``SpokenQA``: why it cannot be read, or ""; the question; the answer and its different aliases."""
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        return "not a line of JSON", "", []
    if not isinstance(row, dict) or set(row) != QA_FIELDS:
        return f"not an object of {', '.join(sorted(QA_FIELDS))}", "", []
    question, answer, aliases = row["question"], row["answer"], row["aliases"]
    if not isinstance(aliases, list) or not all(isinstance(text, str) for text in (question, answer, *aliases)):
        return "a field is not of its type", "", []
    if not all(normalize_text(text) for text in (question, answer, *aliases)):
        return "a field has no words", "", []
    names = {normalize_text(name): name.strip() for name in reversed([answer, *aliases])}  # the first spelling stays
    return "", question.strip(), [names.pop(normalize_text(answer)), *reversed(names.values())]


class AnswerFilter:
    """Drops answers in which none of the instruction's ``aliases`` occurs, as whole words: the teacher says two things.

    For ``SpokenQA`` with ``answers: sentence``. Instructions without aliases are kept.
    """

    name = "answer"

    def reason(self, instruction: Instruction) -> str | None:
        """See ``filters.Filter``."""
        said = f" {normalize_text(instruction.response)} "
        found = any(f" {normalize_text(alias)} " in said for alias in instruction.aliases)
        return None if found or not instruction.aliases else "the short answer is not in it"


class SpeechTranslation:
    """Sentences by topic with their translations; ``task`` is "translation", ``extra["target_language"]`` the code.

    The translation, greedy, is the response; what the student is asked to do stands beside the speech as ``context``.
    Target languages are dealt out evenly. The translation is asked for before the filters see the sentence, so what
    they drop has cost a request.

    Args:
        teacher: who writes both.
        template: asks for a sentence, with ``{topic}`` and ``{source}``.
        translation_template: asks for its translation, with ``{text}`` and ``{target}``, perhaps ``{source}``.
        context: the student's task, with ``{target}``, e.g. ``Translate the speech into {target}.``
        source: the language of the speech, by name.
        targets: code -> name of the languages to translate into, e.g. ``{de: German}``.
        topics: a text file with one topic a line, or a list; gone through in shuffled order.
        max_translation_tokens: room for a translation.
        batch_size, temperature, top_p, max_new_tokens, seed: as for ``instructions_plan.Requests``, for the sentences.

    Raises:
        ValueError: a template or a list without content, or the source among the targets.
    """

    def __init__(self, *, teacher: Teacher, template: str, translation_template: str, context: str, source: str,
                 targets: Mapping[str, str], topics: str | Sequence[str], max_translation_tokens: int, batch_size: int,
                 temperature: Temperature, top_p: float, max_new_tokens: int, seed: int):  # fmt: skip
        self._requests = Requests(teacher=teacher, batch_size=batch_size, temperature=temperature, top_p=top_p,
                                  max_new_tokens=max_new_tokens, seed=seed)  # fmt: skip
        if not targets or source in targets.values() or max_translation_tokens < 1:
            raise ValueError(
                f"sampler: source={source!r}, targets={dict(targets)}, max_translation_tokens={max_translation_tokens}"
                "; expected other languages than the source's, as code: name, and room for at least 1 token"
            )
        self._teacher, self._source, self._names = teacher, source, dict(targets)
        self._template = Template(template, key="template", needs=("topic", "source"))
        self._translation = Template(
            translation_template, key="translation_template", needs=("text", "target"), allows=("source",)
        )
        self._context = Template(context, key="context", needs=("target",))
        self._topics = Deck(read_items(topics, key="topics"), seed=seed, name="topics")
        self._targets = Deck(list(targets), seed=seed, name="targets")
        self._params = SamplingParams(max_new_tokens=max_translation_tokens, temperature=0.0)

    def batch(self, index: int) -> list[Draft]:
        """The sentences of batch ``index`` with their translations."""
        numbers = self._requests.numbers(index)
        prompts = [self._template(topic=self._topics[number], source=self._source) for number in numbers]
        texts = [unquoted(reply) for reply in self._requests.ask(prompts, index)]
        codes = [self._targets[number] for number in numbers]
        translations = self._translate(texts, codes)
        return [self._draft(*item) for item in zip(texts, codes, translations, strict=True)]

    def _translate(self, texts: list[str], codes: list[str]) -> list[str]:
        places = [place for place, text in enumerate(texts) if text]
        messages = [
            self._translation(text=texts[place], source=self._source, target=self._names[codes[place]])
            for place in places
        ]
        prompts = [user_prompt(self._teacher, message) for message in messages]
        replies = self._teacher.generate(prompts, self._params) if prompts else []
        found = dict(zip(places, replies, strict=True))
        return [unquoted(found.get(place, "")) for place in range(len(texts))]

    def _draft(self, text: str, code: str, translation: str) -> Draft:
        reason = ""
        if not text:
            reason = NEVER_ENDED
        elif not translation:
            reason = "the translation is empty or never ended"
        elif normalize_text(translation) == normalize_text(text):
            reason = "the translation repeats the sentence"
        elif translation.count("\n") > text.count("\n"):
            reason = "the translation has more lines than the sentence"
        return Draft(
            text=text, response=translation, task="translation", context=self._context(target=self._names[code]),
            extra={"target_language": code}, reason=reason,
        )  # fmt: skip


class TargetLanguageFilter:
    """Drops answers that are not in their instruction's ``extra["target_language"]``; others it does not judge.

    Args:
        min_probability, min_bytes, candidates: as for ``filters_content.LanguageFilter``.
    """

    name = "target language"

    def __init__(self, *, min_probability: float, min_bytes: int, candidates: Sequence[str]):
        self._settings = {"min_probability": min_probability, "min_bytes": min_bytes, "candidates": list(candidates)}
        self._filters: dict[str, LanguageFilter] = {}

    def reason(self, instruction: Instruction) -> str | None:
        """See ``filters.Filter``."""
        code = instruction.extra.get("target_language")
        if code is None:
            return None
        if code not in self._filters:
            self._filters[code] = LanguageFilter(languages=[code], field="response", **self._settings)
        return self._filters[code].reason(instruction)
