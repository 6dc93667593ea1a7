# SPDX-License-Identifier: Apache-2.0
"""What users might say: instructions sampled from an aligned LLM's empty user turn (Magpie, arXiv 2406.08464).

Given nothing but the opening of a user's turn, an instruction-tuned LLM writes a user's message. Batches are numbered
and each has its own seed, so that sampling can go on at any batch after an interruption. ``TextStage`` samples, filters
and answers until every split has what it asked for; it keeps what the teacher wrote, one file a batch, and works out
everything else anew from these files, so a resumed run cannot differ from an uninterrupted one.
"""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tqdm import tqdm

from nemo_rba.functional import typed
from nemo_rba.protocols import Teacher
from nemo_rba.synthesis.augment import keyed_seed
from nemo_rba.synthesis.filters import Filter, apply_filters
from nemo_rba.synthesis.spoken_form import Spoken, SpokenForm
from nemo_rba.types import Instruction, SamplingParams


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

    def __init__(self, *, teacher: Teacher, batch_size: int, temperature: float, top_p: float, max_new_tokens: int,
                 seed: int):  # fmt: skip
        if batch_size < 1:
            raise ValueError(f"sampler.batch_size is {batch_size}; expected at least 1")
        if temperature <= 0:
            raise ValueError(
                f"sampler.temperature is {temperature}; expected above 0, as greedy sampling writes one instruction "
                "over and over"
            )
        self._teacher, self._batch_size, self._seed = teacher, batch_size, seed
        self._params = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
        self._pre_query = teacher.render([], open_turn="user")

    def batch(self, index: int) -> list[str]:
        """The texts of batch ``index``, always the same ones; "" where the user's turn never ended."""
        params = replace(self._params, seed=keyed_seed(self._seed, f"instructions/{index}"))
        return self._teacher.generate([self._pre_query] * self._batch_size, params)


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


class TextStage:
    """Sample -> filter -> put into spoken words -> filter -> assign a split -> answer -> filter, to meet the quotas.

    Args:
        teacher: who answers.
        sampler: where instructions come from; anything with ``batch(index) -> list[str]``.
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

    def __init__(self, *, teacher: Teacher, sampler, instruction_filters: Sequence[Filter],
                 spoken_form: SpokenForm | None, speech_filters: Sequence[Filter], response_filters: Sequence[Filter],
                 response_params: SamplingParams, context: str, split_of: Callable[[str], str],
                 task_of: Callable[[str], str], kind_of: Callable[[str], str], folder: Path, seed: int):  # fmt: skip
        self._teacher, self._sampler, self._params, self._context = teacher, sampler, response_params, context
        self._instruction_filters, self._response_filters = instruction_filters, response_filters
        self._spoken_form, self._speech_filters = spoken_form, speech_filters
        self._split_of, self._task_of, self._kind_of = split_of, task_of, kind_of
        self._folder, self._seed = folder, seed

    def run(self, quotas: dict[Quota, int], *, max_batches: int) -> TextResult:
        """Work until every quota is met or ``max_batches`` are sampled; ``result.missing`` says what is lacking."""
        self._folder.mkdir(parents=True, exist_ok=True)
        result, lacking = TextResult(), Counter(quotas)
        with tqdm(total=lacking.total(), desc="instructions", unit="") as progress:
            while lacking.total() > 0 and result.num_batches < max_batches:
                found = self._run_batch(result.num_batches, lacking, result)
                result.num_batches += 1
                progress.update(found)
                progress.set_postfix(sampled=result.num_sampled, dropped=len(result.dropped))
        result.missing = dict(+lacking)
        return result

    def _run_batch(self, index: int, lacking: Counter, result: TextResult) -> int:
        """Account for one batch in ``lacking`` and ``result``; returns how many instructions it gave."""
        path = self._folder / f"batch-{index:05d}.jsonl"
        stored = read_jsonl(path) if path.exists() else None
        texts = [row["text"] for row in stored] if stored is not None else self._sampler.batch(index)
        result.num_sampled += len(texts)
        sampled = [
            Instruction(id=f"b{index:05d}-{number:04d}", text=text.strip(), response="", task="", context=self._context)
            for number, text in enumerate(texts)
        ]
        plausible, _, dropped = apply_filters(sampled, self._instruction_filters)
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
                {"text": t, "response": by_id.get(i.id)} | forms.get(i.id, {})
                for t, i in zip(texts, sampled, strict=True)
            ])  # fmt: skip
        else:
            responses = [row["response"] for row in stored if row["response"] is not None]
            if len(responses) != len(wanted):
                raise ValueError(f"{path} does not fit this configuration; delete it to have it written again")
        answered = [
            replace(instruction, response=response, task=self._task_of(instruction.text))
            for instruction, response in zip(wanted, responses, strict=True)
        ]
        kept, _, refused = apply_filters(answered, self._response_filters)
        result.dropped += dropped + unspoken + silenced + unwanted + refused
        for instruction in kept:
            quota = self._quota(instruction, lacking)
            lacking[quota] -= 1
            result.splits[quota[0]].append(instruction)
        return len(kept)

    def _answer(self, index: int, wanted: list[Instruction]) -> list[str]:
        params = replace(self._params, seed=keyed_seed(self._seed, f"answers/{index}"))
        return answer(self._teacher, wanted, params)

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


def read_jsonl(path: Path) -> list[dict]:
    """The objects of a JSONL file. Raises ValueError naming the line that is damaged."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
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
