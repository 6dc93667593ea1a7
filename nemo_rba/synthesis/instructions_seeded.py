# SPDX-License-Identifier: Apache-2.0
"""Instructions that the teacher is asked to write: for a person and a topic, or after the manner of examples.

An empty user turn (``instructions.MagpieSampler``) gives what an LLM thinks likeliest. Asking for requests of given
persons and about given topics steers and widens that (PersonaHub, arXiv 2406.20094), and examples set the manner
(Self-Instruct, arXiv 2212.10560). Both only chat, so a hosted teacher serves as well.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from nemo_rba.protocols import Teacher
from nemo_rba.synthesis.augment import keyed_rng
from nemo_rba.synthesis.filters import normalize_text
from nemo_rba.synthesis.instructions import Draft
from nemo_rba.synthesis.instructions_plan import Deck, Requests, Temperature, Template, read_items, unquoted

_NUMBERING = re.compile(r"^\s*(?:(?:task|instruction|request|example|message)\s*)?\d{1,3}[.:)]\s+", re.IGNORECASE)


class SeededInstructions:
    """One request for each prompt, for a person and about a topic; both lists are gone through in shuffled order.

    Args:
        teacher: who writes.
        template: what it is asked, with ``{persona}``, ``{topic}`` or both.
        personas, topics: a text file with one item a line, or a list; [] where the template does not name it.
        batch_size, temperature, top_p, max_new_tokens, seed: as for ``instructions_plan.Requests``.

    Raises:
        ValueError: an empty template, one that names neither, a list that is empty or not used.
    """

    def __init__(self, *, teacher: Teacher, template: str, personas: str | Sequence[str], topics: str | Sequence[str],
                 batch_size: int, temperature: Temperature, top_p: float, max_new_tokens: int, seed: int):  # fmt: skip
        self._requests = Requests(teacher=teacher, batch_size=batch_size, temperature=temperature, top_p=top_p,
                                  max_new_tokens=max_new_tokens, seed=seed)  # fmt: skip
        self._template = Template(template, key="template", needs=(), allows=("persona", "topic"))
        if not self._template.names:
            raise ValueError(f"sampler.template is {template!r}; expected {{persona}} or {{topic}} in it")
        self._decks = {}
        for name, key, source in (("persona", "personas", personas), ("topic", "topics", topics)):
            if name in self._template.names:
                self._decks[name] = Deck(read_items(source, key=key), seed=seed, name=key)
            elif source:
                raise ValueError(f"sampler.{key} is given, but sampler.template has no {{{name}}}; add it, or give []")

    def batch(self, index: int) -> list[str]:
        """The texts of batch ``index``; "" where the teacher did not come to an end."""
        prompts = [
            self._template(**{name: deck[number] for name, deck in self._decks.items()})
            for number in self._requests.numbers(index)
        ]
        return [unquoted(reply) for reply in self._requests.ask(prompts, index)]


class SelfInstruct:
    """New instructions in the manner of ``num_examples`` others, drawn anew for each prompt.

    Up to ``num_made`` of them are instructions of this run's earlier batches, the others come from the pool. What only
    repeats an instruction of the pool is dropped; what repeats this run's own is left to the filters of duplicates.

    Args:
        teacher: who writes.
        template: what it is asked, with ``{examples}``, which become a numbered list.
        pool: a JSONL file with the key ``text`` or ``instruction`` (as Self-Instruct's seed_tasks.jsonl) in every line,
            or the folder ``text`` of an earlier synthesis, whose answered instructions are taken.
        num_examples: in one prompt; the paper's is 8.
        num_made: of them, how many at most this run has written itself; the paper's is 2, and 0 never uses them.
        learn_from: the splits whose instructions may be shown; the training split alone keeps test sets apart.
        batch_size, temperature, top_p, max_new_tokens, seed: as for ``instructions_plan.Requests``.

    Raises:
        ValueError: a pool that is missing, damaged or too small, or numbers that do not go together.
    """

    def __init__(self, *, teacher: Teacher, template: str, pool: str, num_examples: int, num_made: int,
                 learn_from: Sequence[str], batch_size: int, temperature: Temperature, top_p: float,
                 max_new_tokens: int, seed: int):  # fmt: skip
        self._requests = Requests(teacher=teacher, batch_size=batch_size, temperature=temperature, top_p=top_p,
                                  max_new_tokens=max_new_tokens, seed=seed)  # fmt: skip
        self._template = Template(template, key="template", needs=("examples",))
        if not 0 <= num_made < num_examples:
            raise ValueError(f"sampler: num_examples={num_examples}, num_made={num_made}; expected at least one "
                             "example, and fewer made ones than examples")  # fmt: skip
        self._pool = read_pool(pool)
        if len(self._pool) < num_examples:
            raise ValueError(f"sampler.pool = {pool} holds {len(self._pool)} different instructions, fewer than "
                             f"sampler.num_examples = {num_examples}; add some, or show fewer")  # fmt: skip
        self._known = {normalize_text(text) for text in self._pool}
        self._num_examples, self._num_made, self._learn_from = num_examples, num_made, tuple(learn_from)
        self._made: dict[int, list[str]] = {}  # by batch, so that being told twice changes nothing

    def learn(self, index: int, kept: Mapping[str, Sequence[str]]) -> None:
        """Take note of what batch ``index`` gave to each split; ``TextStage`` tells, also of batches read again."""
        self._made[index] = [text for split in self._learn_from for text in kept.get(split, ())]

    def batch(self, index: int) -> list[Draft]:
        """The texts of batch ``index``, which depend on what was learned from the batches before it."""
        made = [text for earlier in range(index) for text in self._made.get(earlier, ())]
        prompts = [self._template(examples=self._examples(number, made)) for number in self._requests.numbers(index)]
        drafts = []
        for reply in self._requests.ask(prompts, index):
            text = unquoted(_NUMBERING.sub("", reply))
            repeats = text != "" and normalize_text(text) in self._known
            drafts.append(Draft(text=text, reason="repeats an instruction of the pool" if repeats else ""))
        return drafts

    def _examples(self, number: int, made: list[str]) -> str:
        rng = keyed_rng(self._requests.seed, f"examples/{number}")
        num_made = min(self._num_made, len(made))
        chosen = [made[i] for i in rng.choice(len(made), num_made, replace=False)] if num_made else []
        chosen += [self._pool[i] for i in rng.choice(len(self._pool), self._num_examples - num_made, replace=False)]
        order = rng.permutation(len(chosen))
        return "\n".join(f"{place}. {' '.join(chosen[i].split())}" for place, i in enumerate(order, start=1))


def read_pool(path: str) -> list[str]:
    """The different instructions of a pool, see ``SelfInstruct``. Raises ValueError naming the line that is wrong."""
    source = Path(path)
    files = sorted(source.glob("batch-*.jsonl")) if source.is_dir() else [source]
    if not files or not all(file.is_file() for file in files):
        raise ValueError(f"sampler.pool = {path}: nothing there; expected a JSONL file, or the folder text of a "
                         "synthesis with its batch-*.jsonl")  # fmt: skip
    texts: dict[str, str] = {}
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
            if not line.strip():
                continue
            text = _instruction_of(line, answered_only=source.is_dir())
            if text is None:
                raise ValueError(f"sampler.pool: {file} line {number} is not an object with the text of an instruction "
                                 "under 'text' or 'instruction'")  # fmt: skip
            if text.strip():
                texts.setdefault(normalize_text(text), text.strip())
    return list(texts.values())


def _instruction_of(line: str, *, answered_only: bool) -> str | None:
    """The instruction in a line of a pool; "" for one to leave out, None where there is none."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    if not isinstance(row, dict):
        return None
    if answered_only and not (row.get("response") or row.get("responses")):
        return ""
    text = row.get("text", row.get("instruction"))
    return text if isinstance(text, str) and text.strip() else None
