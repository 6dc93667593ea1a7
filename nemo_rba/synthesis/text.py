# SPDX-License-Identifier: Apache-2.0
"""The text stage: a teacher's instructions and answers, until every split has what it asked for.

``TextStage`` decides and ``TextWork`` does what costs: sampling, spoken forms, answers, one order a batch, on whichever
rank is free. What the teacher wrote is kept, one file a batch, and everything else is worked out anew from these files,
so a resumed run cannot differ from an uninterrupted one, nor a run of many ranks from that of one.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tqdm import tqdm

from nemo_rba.synthesis.files import read_jsonl, write_jsonl
from nemo_rba.synthesis.filters import Filter, apply_filters
from nemo_rba.synthesis.instructions import Draft
from nemo_rba.synthesis.spoken_form import Spoken
from nemo_rba.synthesis.text_work import TextWork, batch_name, beyond_text, response_fields, restored, stored_responses
from nemo_rba.types import Instruction

BARREN_SAMPLES = 5000  # in a row, of which none is of use, after which no more are asked for

# How far instructions come, in this order; an account of a text stage counts them by these names.
SAMPLED, TYPED, WORDED, SPEAKABLE = "sampled", "after typed filters", "in spoken words", "after spoken filters"
WANTED, ANSWERS, ANSWERED, KEPT = "with room in a split", "answers", "after answer filters", "kept"
STEPS = (SAMPLED, TYPED, WORDED, SPEAKABLE, WANTED, ANSWERS, ANSWERED, KEPT)

Quota = tuple[str, str]  # (split, kind); kind "" = any
HaveDone = Callable[[str, Mapping[str, dict]], None]  # (kind, name -> order): returns when all are done
Dropped = list[tuple[Instruction, str]]  # with the reason


@dataclass(slots=True, kw_only=True)
class TextResult:
    """Instructions with answers, and the account of what was dropped on the way."""

    splits: dict[str, list[Instruction]] = field(default_factory=lambda: defaultdict(list))
    num_batches: int = 0
    num_sampled: int = 0
    steps: Counter = field(default_factory=Counter)  # how many came so far, by ``STEPS``
    dropped: Dropped = field(default_factory=list)
    missing: dict[Quota, int] = field(default_factory=dict)  # what max_batches did not suffice for
    num_barren: int = 0  # the last so many samples gave nothing, not even for a quota that was full

    def losses(self) -> str:
        """Where the texts went, in a sentence without its full stop, for an error."""
        if self.num_sampled == 0:
            return ("Nothing was sampled, so no filter is to blame: look at synthesis.sampler and what it reads, and "
                    "delete the empty batches in text/ to have it asked again")  # fmt: skip
        reasons = Counter(reason for _, reason in self.dropped).most_common(4)
        told = ", ".join(f"{reason} ({count})" for reason, count in reasons)
        return f"Most dropped for: {told}" if told else "Nothing was dropped"


@dataclass(slots=True, kw_only=True)
class _Batch:
    """One batch on its way; instructions are named by its number and their place in it."""

    index: int
    drafts: list[Draft]
    stored: dict[str, dict] | None  # its rows by instruction, where it was complete before
    sampled: list[Instruction]
    said: list[tuple[Instruction, Spoken]] = field(default_factory=list)
    wanted: list[Instruction] = field(default_factory=list)
    responses: list[list[str]] = field(default_factory=list)  # of each that is wanted
    steps: Counter = field(default_factory=Counter)
    dropped: Dropped = field(default_factory=list)


class TextStage:
    """Sample -> filter -> put into spoken words -> filter -> assign a split -> answer -> filter, to meet the quotas.

    Args:
        work: what is done for a batch.
        have_done: has orders of ``work`` done, here or anywhere.
        instruction_filters: applied to what the sampler wrote.
        speech_filters: applied to the words to be spoken, before answering, so that no answer is wasted.
        response_filters: applied to instruction and answer.
        context: typed text beside the speech, the same for all; "" for none.
        split_of, task_of, kind_of: name an instruction's split, task and kind from its text.
        num_responses: of each instruction of a split, in that many items; 1 where a split is not named.
        batches_at_once: batches sampled, and then answered, at the same time. With more than one, what was kept of a
            batch is not known yet when the next one is answered, so a few answers more are asked for than needed.
    """

    def __init__(self, *, work: TextWork, have_done: HaveDone, instruction_filters: Sequence[Filter],
                 speech_filters: Sequence[Filter], response_filters: Sequence[Filter], context: str,
                 split_of: Callable[[str], str], task_of: Callable[[str], str], kind_of: Callable[[str], str],
                 num_responses: Mapping[str, int], batches_at_once: int):  # fmt: skip
        self._work, self._have_done, self._context = work, have_done, context
        self._instruction_filters, self._speech_filters = instruction_filters, speech_filters
        self._response_filters = response_filters
        self._split_of, self._task_of, self._kind_of = split_of, task_of, kind_of
        self._num_responses, self._batches_at_once = num_responses, batches_at_once

    def run(
        self, quotas: dict[Quota, int], *, max_batches: int, found: Callable[[TextResult], None] = lambda result: None
    ) -> TextResult:
        """Work until every quota is met or ``max_batches`` are sampled; ``result.missing`` says what is lacking.

        It stops too after ``BARREN_SAMPLES`` in a row that the filters all dropped: a teacher that repeats itself, or
        that cannot write what is asked for.

        Args:
            found: told after every round; what stands in ``result.splits`` stays there.
        """
        (self._work.folder / "parts").mkdir(parents=True, exist_ok=True)
        result, lacking = TextResult(), Counter(quotas)
        with tqdm(total=lacking.total(), desc="instructions", unit="") as progress:
            while lacking.total() > 0 and result.num_batches < max_batches and result.num_barren < BARREN_SAMPLES:
                num_sampled, num_dropped = result.num_sampled, len(result.dropped)
                last = min(result.num_batches + self._batches_at_once, max_batches)
                kept = self._round(range(result.num_batches, last), lacking, result)
                unwanted = any(reason.startswith("quota: ") for _, reason in result.dropped[num_dropped:])
                result.num_barren = 0 if kept or unwanted else result.num_barren + result.num_sampled - num_sampled
                result.num_batches = last
                progress.update(kept)
                progress.set_postfix(sampled=result.num_sampled, dropped=len(result.dropped))
                found(result)
        result.missing = dict(+lacking)
        return result

    def _round(self, indices: range, lacking: Counter, result: TextResult) -> int:
        """Account for some batches in ``lacking`` and ``result``; returns how many instructions they gave."""
        batches = self._sample(indices)
        self._say(batches)
        room = Counter(lacking)
        for batch in batches:
            self._choose(batch, room, lacking)
        self._answer(batches)
        kept = 0
        for batch in batches:
            self._keep(batch)
            result.num_sampled += len(batch.drafts)
            kept += self._account(batch, lacking, result)
            result.steps += batch.steps
        return kept

    def _sample(self, indices: range) -> list[_Batch]:
        rows = {i: read_jsonl(self._path(i)) if self._path(i).exists() else None for i in indices}
        absent = [i for i in indices if rows[i] is None and not self._work.part(i, "sample").exists()]
        orders = {batch_name(i): {"index": i} for i in absent}
        if hasattr(self._work.sampler, "learn"):  # it remembers, and the others do not know what
            for order in orders.values():
                self._work.sample(order)()
        else:
            self._have_done("sample", orders)
        return [self._batch(index, rows[index]) for index in indices]

    def _batch(self, index: int, stored: list[dict] | None) -> _Batch:
        rows = read_jsonl(self._work.part(index, "sample")) if stored is None else stored
        drafts = [restored(row) for row in rows]
        sampled = [self._instruction(f"b{index:05d}-{number:04d}", draft) for number, draft in enumerate(drafts)]
        known = None if stored is None else dict(zip([i.id for i in sampled], stored, strict=True))
        return _Batch(index=index, drafts=drafts, stored=known, sampled=sampled)

    def _instruction(self, name: str, draft: Draft) -> Instruction:
        return Instruction(
            id=name, text=draft.text.strip(), response=draft.response.strip(), task=draft.task, aliases=draft.aliases,
            context=self._context if draft.context is None else draft.context, extra=draft.extra,
        )  # fmt: skip

    def _say(self, batches: list[_Batch]) -> None:
        """Filter what was sampled, and find the words to speak."""
        orders, plausible = {}, {}
        for batch in batches:
            pairs = list(zip(batch.sampled, batch.drafts, strict=True))
            batch.dropped += [(i, f"sampler: {draft.reason}") for i, draft in pairs if draft.reason]
            readable = [instruction for instruction, draft in pairs if not draft.reason]
            plausible[batch.index], _, dropped = apply_filters(readable, self._instruction_filters)
            batch.dropped += dropped
            batch.steps.update({SAMPLED: len(batch.drafts), TYPED: len(plausible[batch.index])})
            if self._work.spoken_form is None:
                batch.said = [(i, Spoken(i.text, None)) for i in plausible[batch.index]]
            elif batch.stored is not None:
                self._check_fits(batch, all("spoken" in batch.stored[i.id] for i in plausible[batch.index]))
                batch.said = [(i, Spoken(*batch.stored[i.id]["spoken"])) for i in plausible[batch.index]]
            else:
                texts = [i.text for i in plausible[batch.index]]
                orders[batch_name(batch.index)] = {"index": batch.index, "texts": texts}
        for order, found in self._results("form", orders):
            spoken = [Spoken(*row["spoken"]) for row in found]
            batch = batches[order["index"] - batches[0].index]
            batch.said = list(zip(plausible[batch.index], spoken, strict=True))

    def _choose(self, batch: _Batch, room: Counter, lacking: Counter) -> None:
        """Those that can be spoken and that some quota still has room for."""
        worded = [
            replace(i, text=s.text, typed=i.text if s.text != i.text else "") for i, s in batch.said if not s.reason
        ]
        batch.dropped += [(i, f"spoken form: {spoken.reason}") for i, spoken in batch.said if spoken.reason]
        plausible, _, silenced = apply_filters(worded, self._speech_filters)
        batch.dropped += silenced
        for instruction in plausible:
            quota = self._quota(instruction, lacking)
            if quota is None:
                name, kind = self._split_of(instruction.text), self._kind_of(instruction.text)
                batch.dropped.append((instruction, f"quota: no split {name!r} with kind {kind!r} is asked for"))
            elif room[quota] <= 0:
                batch.dropped.append((instruction, _full(quota)))
            else:
                room[quota] -= self._count(instruction)
                batch.wanted.append(instruction)
        batch.steps.update({WORDED: len(worded), SPEAKABLE: len(plausible), WANTED: len(batch.wanted)})

    def _count(self, instruction: Instruction) -> int:
        return 1 if instruction.response else self._num_responses.get(self._split_of(instruction.text), 1)

    def _answer(self, batches: list[_Batch]) -> None:
        orders = {}
        for batch in batches:
            if batch.stored is not None:
                responses = [stored_responses(row) for row in batch.stored.values()]
                batch.responses = [found for found in responses if found is not None]
                self._check_fits(batch, len(batch.responses) == len(batch.wanted))
                continue
            asked = [instruction for instruction in batch.wanted if not instruction.response]
            orders[batch_name(batch.index)] = {
                "index": batch.index, "texts": [i.typed or i.text for i in asked],
                "contexts": [i.context for i in asked], "counts": [self._count(i) for i in asked],
            }  # fmt: skip
        for order, found in self._results("answer", orders):
            batch, answers = batches[order["index"] - batches[0].index], iter(found)
            batch.responses = [[i.response] if i.response else next(answers)["responses"] for i in batch.wanted]

    def _results(self, kind: str, orders: dict[str, dict]) -> Iterable[tuple[dict, list[dict]]]:
        """Each order with its result, once all are done; those without texts need nobody."""
        waiting = {
            name: o for name, o in orders.items() if o["texts"] and not self._work.part(o["index"], kind).exists()
        }
        self._have_done(kind, waiting)
        for order in orders.values():
            rows = read_jsonl(self._work.part(order["index"], kind)) if order["texts"] else []
            if len(rows) != len(order["texts"]):
                raise ValueError(f"{self._work.part(order['index'], kind)} does not fit this configuration; delete it "
                                 "to have it written again")  # fmt: skip
            yield order, rows

    def _keep(self, batch: _Batch) -> None:
        """Write the complete batch, then drop its parts."""
        if batch.stored is not None:
            return
        responses = {i.id: found for i, found in zip(batch.wanted, batch.responses, strict=True)}
        spoken = {i.id: {"spoken": list(said)} for i, said in batch.said} if self._work.spoken_form is not None else {}
        write_jsonl(self._path(batch.index), [
            {"text": draft.text} | response_fields(responses.get(i.id)) | spoken.get(i.id, {}) | beyond_text(draft)
            for draft, i in zip(batch.drafts, batch.sampled, strict=True)
        ])  # fmt: skip
        for kind in self._work.handlers:
            self._work.part(batch.index, kind).unlink(missing_ok=True)

    def _account(self, batch: _Batch, lacking: Counter, result: TextResult) -> int:
        """What the batch gives, and to which split."""
        answered = []
        for instruction, responses in zip(batch.wanted, batch.responses, strict=True):
            named = replace(instruction, task=instruction.task or self._task_of(instruction.text))
            for number, response in enumerate(responses):
                unanswered = response["unanswered"] if isinstance(response, dict) else ""
                item = replace(
                    named, id=f"{named.id}-{number}" if number else named.id, response="" if unanswered else response
                )
                if unanswered:
                    batch.dropped.append((item, f"teacher: {unanswered}"))
                elif response in responses[:number]:
                    batch.dropped.append((item, "response: the same as another answer to this instruction"))
                else:
                    answered.append(item)
        plausible, _, refused = apply_filters(answered, self._response_filters)
        kept = []
        for instruction in plausible:
            quota = self._quota(instruction, lacking)
            if lacking[quota] <= 0:  # of several answers, or of batches answered at once
                refused.append((instruction, _full(quota)))
                continue
            lacking[quota] -= 1
            result.splits[quota[0]].append(instruction)
            kept.append(instruction)
        result.dropped += batch.dropped + refused
        batch.steps.update({ANSWERS: sum(map(len, batch.responses)), ANSWERED: len(plausible), KEPT: len(kept)})
        self._teach(batch.index, kept)
        return len(kept)

    def _teach(self, index: int, kept: list[Instruction]) -> None:
        """Tell a sampler that learns what became of its batch, as one types it."""
        if not hasattr(self._work.sampler, "learn"):
            return
        texts = defaultdict(list)
        for instruction in kept:
            texts[self._split_of(instruction.text)].append(instruction.typed or instruction.text)
        self._work.sampler.learn(index, texts)

    def _quota(self, instruction: Instruction, quotas: Counter) -> Quota | None:
        split = self._split_of(instruction.text)
        candidates = ((split, self._kind_of(instruction.text)), (split, ""))
        return next((quota for quota in candidates if quota in quotas), None)

    def _path(self, index: int) -> Path:
        return self._work.folder / f"{batch_name(index)}.jsonl"

    def _check_fits(self, batch: _Batch, fits: bool) -> None:
        if not fits:
            raise ValueError(
                f"{self._path(batch.index)} does not fit this configuration; delete it to have it written again"
            )


def _full(quota: Quota) -> str:
    return f"quota: {'/'.join(filter(None, quota))} is full"
