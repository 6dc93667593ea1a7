# SPDX-License-Identifier: Apache-2.0
"""What users might say: instructions sampled from an aligned LLM's empty user turn (Magpie, arXiv 2406.08464).

Given nothing but the opening of a user's turn, an instruction-tuned LLM writes a user's message. Batches are numbered
and each has its own seed, so that sampling can go on at any batch after an interruption. ``TextStage`` samples, filters
and answers until every split has what it asked for; it keeps what the teacher wrote, one file a batch, and works out
everything else anew from these files, so a resumed run cannot differ from an uninterrupted one.

Other samplers: ``instructions_domains.py`` (Magpie after a system turn), ``instructions_seeded.py`` (by persona and
topic, or after examples), ``instructions_tasks.py`` (questions with answers, sentences with translations).
"""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from nemo_rba.functional import typed
from nemo_rba.protocols import Teacher
from nemo_rba.synthesis.augment import keyed_seed
from nemo_rba.synthesis.filters import Filter, apply_filters
from nemo_rba.synthesis.instructions_plan import Requests, Temperature
from nemo_rba.synthesis.spoken_form import Spoken, SpokenForm
from nemo_rba.types import Instruction, SamplingParams

BARREN_SAMPLES = 5000  # in a row, of which none is of use, after which no more are asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What a sampler wrote, where that is more than a text: an instruction that has not passed the filters."""

    text: str
    response: str = ""  # where the sampler has one, the teacher is not asked for another
    task: str = ""  # "" leaves it to ``task_of``
    context: str | None = None  # None = the context that all have
    aliases: tuple[str, ...] = ()
    extra: Mapping[str, object] = field(default_factory=dict)
    reason: str = ""  # why it cannot be used, e.g. because it could not be read

    def beyond_text(self) -> dict:
        """The fields besides ``text`` that are set, as plain JSON; ``Draft(text=..., **fields)`` restores it."""
        plain = Draft(text=self.text)
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in found.items() if value != getattr(plain, name)}


class Sampler(Protocol):
    """Where instructions come from.

    A sampler that learns from what became of its batches also offers ``learn(index, kept)`` with the texts kept, by
    split. It is called after every batch, also after those that are read again, in order.
    """

    def batch(self, index: int) -> Iterable[str | Draft]:
        """What batch ``index`` holds, always the same."""


class MagpieSampler:
    """Seeded batches of instruction texts.

    Args:
        teacher: whose empty user turn is continued.
        batch_size: instructions per batch.
        temperature, top_p, max_new_tokens: how to sample; an instruction that does not end in time comes out as "".
        seed: with the batch's number it decides the batch.

    Raises:
        ValueError: a batch size below 1, greedy decoding (all instructions would be the same), or a teacher whose
            template cannot be left open in the user's turn.
    """

    def __init__(self, *, teacher: Teacher, batch_size: int, temperature: Temperature, top_p: float,
                 max_new_tokens: int, seed: int):  # fmt: skip
        self._requests = Requests(teacher=teacher, batch_size=batch_size, temperature=temperature, top_p=top_p,
                                  max_new_tokens=max_new_tokens, seed=seed)  # fmt: skip
        self._pre_query = teacher.render([], open_turn="user")

    def batch(self, index: int) -> list[str]:
        """The texts of batch ``index``, always the same ones; "" where the user's turn never ended."""
        return self._requests.complete([self._pre_query] * self._requests.batch_size, index)


def answer(teacher: Teacher, instructions: Sequence[Instruction], params: SamplingParams) -> list[str]:
    """The teacher's answer to each, as one types it; "" where it did not end within ``params.max_new_tokens``."""
    if not instructions:
        return []
    messages = [{"role": "user", "content": typed(instruction)} for instruction in instructions]
    return teacher.generate([teacher.render([message], open_turn="assistant") for message in messages], params)


Quota = tuple[str, str]  # (split, kind); kind "" = any


@dataclass(slots=True, kw_only=True)
class TextResult:
    """Instructions with answers, and the account of what was dropped on the way."""

    splits: dict[str, list[Instruction]] = field(default_factory=lambda: defaultdict(list))
    num_batches: int = 0
    num_sampled: int = 0
    dropped: list[tuple[Instruction, str]] = field(default_factory=list)  # with the reason
    missing: dict[Quota, int] = field(default_factory=dict)  # what max_batches did not suffice for
    num_barren: int = 0  # the last so many samples gave nothing, not even for a quota that was full


class TextStage:
    """Sample -> filter -> put into spoken words -> filter -> assign a split -> answer -> filter, to meet the quotas.

    Args:
        teacher: who answers.
        sampler: where instructions come from. Those that have a response already are not answered.
        instruction_filters: applied to what the sampler wrote.
        spoken_form: puts numbers and symbols into words; None speaks what was written.
        speech_filters: applied to the words to be spoken, before answering, so that no answer is wasted.
        response_filters: applied to instruction and answer.
        response_params: how answers are sampled; the seed is replaced by one for each batch.
        context: typed text beside the speech, the same for all; "" for none.
        split_of, task_of, kind_of: name an instruction's split, task and kind from its text.
        folder: where the teacher's words are kept, ``batch-00000.jsonl`` and so on.
        seed: with a batch's number it decides the answers of the batch.
    """

    def __init__(self, *, teacher: Teacher, sampler: Sampler, instruction_filters: Sequence[Filter],
                 spoken_form: SpokenForm | None, speech_filters: Sequence[Filter], response_filters: Sequence[Filter],
                 response_params: SamplingParams, context: str, split_of: Callable[[str], str],
                 task_of: Callable[[str], str], kind_of: Callable[[str], str], folder: Path, seed: int):  # fmt: skip
        self._teacher, self._sampler, self._params, self._context = teacher, sampler, response_params, context
        self._instruction_filters, self._response_filters = instruction_filters, response_filters
        self._spoken_form, self._speech_filters = spoken_form, speech_filters
        self._split_of, self._task_of, self._kind_of = split_of, task_of, kind_of
        self._folder, self._seed = folder, seed

    def run(self, quotas: dict[Quota, int], *, max_batches: int) -> TextResult:
        """Work until every quota is met or ``max_batches`` are sampled; ``result.missing`` says what is lacking.

        It stops too after ``BARREN_SAMPLES`` in a row that the filters all dropped: a teacher that repeats itself, or
        that cannot write what is asked for.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        result, lacking = TextResult(), Counter(quotas)
        with tqdm(total=lacking.total(), desc="instructions", unit="") as progress:
            while lacking.total() > 0 and result.num_batches < max_batches and result.num_barren < BARREN_SAMPLES:
                num_sampled, num_dropped = result.num_sampled, len(result.dropped)
                found = self._run_batch(result.num_batches, lacking, result)
                unwanted = any(reason.startswith("quota: ") for _, reason in result.dropped[num_dropped:])
                result.num_barren = 0 if found or unwanted else result.num_barren + result.num_sampled - num_sampled
                result.num_batches += 1
                progress.update(found)
                progress.set_postfix(sampled=result.num_sampled, dropped=len(result.dropped))
        result.missing = dict(+lacking)
        return result

    def _run_batch(self, index: int, lacking: Counter, result: TextResult) -> int:
        """Account for one batch in ``lacking`` and ``result``; returns how many instructions it gave."""
        path = self._folder / f"batch-{index:05d}.jsonl"
        stored = read_jsonl(path) if path.exists() else None
        drafts = _drafts(self._sampler.batch(index)) if stored is None else _stored_drafts(stored)
        result.num_sampled += len(drafts)
        sampled = [self._instruction(f"b{index:05d}-{number:04d}", draft) for number, draft in enumerate(drafts)]
        readable = [instruction for instruction, draft in zip(sampled, drafts, strict=True) if not draft.reason]
        unreadable = [(i, f"sampler: {draft.reason}") for i, draft in zip(sampled, drafts, strict=True) if draft.reason]
        plausible, _, dropped = apply_filters(readable, self._instruction_filters)
        said = self._say(plausible, path, stored and dict(zip([i.id for i in sampled], stored, strict=True)))
        worded = [replace(i, text=s.text, typed=i.text if s.text != i.text else "") for i, s in said if not s.reason]
        unspoken = [(i, f"spoken form: {spoken.reason}") for i, spoken in said if spoken.reason]
        plausible, _, silenced = apply_filters(worded, self._speech_filters)
        wanted, unwanted = self._choose(plausible, lacking)
        if stored is None:
            responses = self._answer(index, wanted)
            by_id = dict(zip([i.id for i in wanted], responses, strict=True))
            forms = {i.id: {"spoken": list(spoken)} for i, spoken in said} if self._spoken_form is not None else {}
            write_jsonl(path, [
                {"text": draft.text, "response": by_id.get(i.id)} | forms.get(i.id, {}) | _beyond_text(draft)
                for draft, i in zip(drafts, sampled, strict=True)
            ])  # fmt: skip
        else:
            responses = [row["response"] for row in stored if row["response"] is not None]
            if len(responses) != len(wanted):
                raise ValueError(f"{path} does not fit this configuration; delete it to have it written again")
        answered = [
            replace(instruction, response=response, task=instruction.task or self._task_of(instruction.text))
            for instruction, response in zip(wanted, responses, strict=True)
        ]
        kept, _, refused = apply_filters(answered, self._response_filters)
        result.dropped += unreadable + dropped + unspoken + silenced + unwanted + refused
        for instruction in kept:
            quota = self._quota(instruction, lacking)
            lacking[quota] -= 1
            result.splits[quota[0]].append(instruction)
        self._teach(index, kept)
        return len(kept)

    def _instruction(self, name: str, draft: Draft) -> Instruction:
        return Instruction(
            id=name, text=draft.text.strip(), response=draft.response.strip(), task=draft.task, aliases=draft.aliases,
            context=self._context if draft.context is None else draft.context, extra=draft.extra,
        )  # fmt: skip

    def _teach(self, index: int, kept: list[Instruction]) -> None:
        """Tell a sampler that learns what became of its batch, as one types it."""
        if not hasattr(self._sampler, "learn"):
            return
        texts = defaultdict(list)
        for instruction in kept:
            texts[self._split_of(instruction.text)].append(instruction.typed or instruction.text)
        self._sampler.learn(index, texts)

    def _answer(self, index: int, wanted: list[Instruction]) -> list[str]:
        """The responses of all that are wanted: those they came with, and the teacher's to the others."""
        params = replace(self._params, seed=keyed_seed(self._seed, f"answers/{index}"))
        answers = iter(answer(self._teacher, [i for i in wanted if not i.response], params))
        return [instruction.response or next(answers) for instruction in wanted]

    def _say(
        self, instructions: list[Instruction], path: Path, stored: dict[str, dict] | None
    ) -> list[tuple[Instruction, Spoken]]:
        """How each is spoken, or why it cannot be; ``stored``: the rows of ``path`` by id, if it was written."""
        if self._spoken_form is None:
            return [(instruction, Spoken(instruction.text, None)) for instruction in instructions]
        if stored is None:
            return list(zip(instructions, self._spoken_form([i.text for i in instructions]), strict=True))
        if not all("spoken" in stored[instruction.id] for instruction in instructions):
            raise ValueError(f"{path} does not fit this configuration; delete it to have it written again")
        return [(instruction, Spoken(*stored[instruction.id]["spoken"])) for instruction in instructions]

    def _choose(self, instructions: list[Instruction], lacking: Counter):
        """Those that some quota still has room for, and the others with their reason."""
        room, wanted, unwanted = Counter(lacking), [], []
        for instruction in instructions:
            quota = self._quota(instruction, lacking)
            if quota is None:
                name, kind = self._split_of(instruction.text), self._kind_of(instruction.text)
                unwanted.append((instruction, f"quota: no split {name!r} with kind {kind!r} is asked for"))
            elif room[quota] <= 0:
                unwanted.append((instruction, f"quota: {'/'.join(filter(None, quota))} is full"))
            else:
                room[quota] -= 1
                wanted.append(instruction)
        return wanted, unwanted

    def _quota(self, instruction: Instruction, quotas: Counter) -> Quota | None:
        split = self._split_of(instruction.text)
        candidates = ((split, self._kind_of(instruction.text)), (split, ""))
        return next((quota for quota in candidates if quota in quotas), None)


def _drafts(written: Iterable[str | Draft]) -> list[Draft]:
    return [Draft(text=item) if isinstance(item, str) else item for item in written]


def _stored_drafts(rows: Sequence[dict]) -> list[Draft]:
    drafts = [Draft(text=row["text"], **row.get("draft", {})) for row in rows]
    return [replace(draft, aliases=tuple(draft.aliases)) for draft in drafts]


def _beyond_text(draft: Draft) -> dict:
    found = draft.beyond_text()
    return {"draft": found} if found else {}


def read_jsonl(path: Path) -> list[dict]:
    """The objects of a JSONL file. Raises ValueError naming the line that is damaged."""
    rows = []
    lines = path.read_text(encoding="utf-8").split("\n")  # splitlines() would cut a text at a U+2028 within it
    for number, line in enumerate(lines[:-1] if not lines[-1] else lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is damaged; delete the file to have it written again") from error
    return rows


def write_jsonl(path: Path, rows: Sequence[dict]) -> None:
    """Write a whole JSONL file or none at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_text(path: Path, text: str) -> None:
    """Write a whole file or none at all: under another name first, then renamed."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
