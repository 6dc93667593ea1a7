# SPDX-License-Identifier: Apache-2.0
"""What is measured on a held-out set. One task is one set in one condition, e.g. "held-out voices".

A measure is a function of sums over items, mostly the ratio of two: mean verifier score = sum of scores / number of
items, word error rate = sum of errors / sum of reference words. So a task only says what an item adds to the sums, and
totals, tables by family and bootstraps (``statistics.py``) follow. A ``SeveralMeasures`` task reads more than one
number off the same answers, such as BLEU, chrF and TER, and says what an item adds to each (``measures.py``). All
results are in percent. A task whose measure is paid for, such as a judge's, says what it has cost
(``rewards.votes.Accounted``). Other tasks: ``judged.py``, ``answers.py``, ``translation.py``, ``ifeval.py``.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import kaldialign
import numpy as np
import torch

from nemo_rba.evaluation.measures import Statistics, item_share, set_score, short_name
from nemo_rba.protocols import EvalTask, Metrics
from nemo_rba.rewards.text import normalize
from nemo_rba.types import Instruction, Rollout, SpeechBatch


class ItemTask(EvalTask, Protocol):
    """An ``EvalTask`` that scores item by item."""

    measure: str  # "score" (higher is better) or "wer" (lower is better)

    def kind(self, instruction: Instruction) -> str:
        """Coarser group of the family ``instruction.task`` for tables, or ""."""

    def item(self, instruction: Instruction, response: str) -> tuple[float, float]:
        """(numerator, denominator) that this answer adds to the corpus measure, in percent."""


@runtime_checkable
class Batched(Protocol):
    """A task that scores many answers faster than one by one; ``item`` then knows them."""

    def prepare(self, answers: Sequence[tuple[Instruction, str]]) -> None:
        """Score them all."""


@runtime_checkable
class SeveralMeasures(ItemTask, Protocol):
    """An ``ItemTask`` that reads several measures off an answer. Its ``item`` is ``measures.item_share`` of them."""

    def statistics(self, instruction: Instruction, response: str) -> Statistics:
        """What this answer adds to each measure; the task's own first, the same measures for every answer."""


class MeasuredTask:
    """What the tasks with several measures share. A subclass says what an answer adds to them: ``statistics``.

    Args:
        name, batches, kinds: as for ``InstructionFollowingTask``.
    """

    measure = "score"

    def __init__(self, *, name: str, batches: Callable[[], Iterable[SpeechBatch]], kinds: Mapping[str, str]):
        self.name = name
        self.batches = batches
        self.kinds = dict(kinds)

    def kind(self, instruction: Instruction) -> str:
        return kind_of(self.kinds, instruction)

    def statistics(self, instruction: Instruction, response: str) -> Statistics:
        raise NotImplementedError

    def item(self, instruction: Instruction, response: str) -> tuple[float, float]:
        return item_share(self.statistics(instruction, response))

    def score(self, rollouts: Sequence[Rollout]) -> Metrics:
        """Every measure by its short name; the task's own is also called ``measure``, "score" or "wer"."""
        _require(self, rollouts)
        items = [self.statistics(rollout.instruction, rollout.response) for rollout in rollouts]
        scores = {}
        for name in items[0]:
            scores[short_name(name)] = set_score(name, np.array([item[name] for item in items], dtype=float))
        return {self.measure: next(iter(scores.values()))} | scores


class InstructionFollowingTask:
    """Does the answer do what was asked: mean verdict of a verifier, in percent.

    Args:
        name: of the condition; also the folder of its predictions.
        batches: gives the whole set, once, in a fixed order; called anew for every pass.
        verify: (words of the instruction, answer) -> score in [0, 1].
        kinds: family (``instruction.task``) -> kind, e.g. {"sum": "one answer", "animals": "open"}; {} for none.
    """

    measure = "score"

    def __init__(
        self,
        *,
        name: str,
        batches: Callable[[], Iterable[SpeechBatch]],
        verify: Callable[[str, str], float],
        kinds: Mapping[str, str],
    ):
        self.name = name
        self.batches = batches
        self.verify = verify
        self.kinds = dict(kinds)

    def kind(self, instruction: Instruction) -> str:
        return kind_of(self.kinds, instruction)

    def item(self, instruction: Instruction, response: str) -> tuple[float, float]:
        score = float(self.verify(instruction.text, response))
        if not 0 <= score <= 1:
            raise ValueError(
                f"task {self.name!r}: verify gave {score} for {response!r} to {instruction.text!r}, expected a score "
                "in [0, 1]: change task.verify"
            )
        return 100 * score, 1.0

    def score(self, rollouts: Sequence[Rollout]) -> Metrics:
        """ "score", "score/<family>" and, with ``kinds``, "score/<kind>"."""
        metrics = {"score": corpus_score(self, rollouts)}
        for group in (lambda rollout: rollout.instruction.task, lambda rollout: self.kind(rollout.instruction)):
            for name in sorted({group(rollout) for rollout in rollouts} - {""}):
                members = [rollout for rollout in rollouts if group(rollout) == name]
                metrics[f"score/{name}"] = corpus_score(self, members)
        return metrics


class TranscriptionTask(MeasuredTask):
    """Word and character error rate of answers that should repeat ``instruction.text``, in percent.

    Both are summed over the set: errors of all items / words (characters, with the spaces between words) of all
    references. A reference that ``normalizer`` leaves empty, "[noise]" to Whisper's, still counts what was inserted.

    Args:
        name: of the condition; also the folder of its predictions.
        batches: gives the whole set, with a ``context`` that asks for a transcript.
        normalizer: text -> words that count: ``rewards.text.normalize`` forgives case and punctuation; for numbers that
            compare with published ones, Whisper's (arXiv 2212.04356, appendix C) of the package whisper_normalizer,
            ``EnglishTextNormalizer`` for English and ``BasicTextNormalizer`` for other languages
            (``split_letters: true`` where words are not spaced, ``preserve_marks: true`` for Indic scripts).
    """

    measure = "wer"

    def __init__(self, *, name: str, batches: Callable[[], Iterable[SpeechBatch]], normalizer: Callable[[str], str]):
        super().__init__(name=name, batches=batches, kinds={})
        self.normalizer = normalizer
        how = getattr(normalizer, "__name__", type(normalizer).__name__)
        self._names = (f"WER|normalizer:{how}", f"CER|normalizer:{how}")

    def statistics(self, instruction: Instruction, response: str) -> Statistics:
        reference, answer = (" ".join(self.normalizer(text).split()) for text in (instruction.text, response))
        pairs = ((reference.split(), answer.split()), (list(reference), list(answer)))
        counts = [(kaldialign.edit_distance(ours, theirs)["total"], len(ours)) for ours, theirs in pairs]
        return {name: [100.0 * errors, float(of)] for name, (errors, of) in zip(self._names, counts, strict=True)}


def word_errors(reference: str, hypothesis: str) -> tuple[int, int]:
    """Substitutions, deletions and insertions of normalised words, and the number of reference words."""
    words = normalize(reference).split()
    if not words:
        raise ValueError(
            f"word error rate needs a reference with words, got {reference!r}: filter it from the manifest"
        )
    return kaldialign.edit_distance(words, normalize(hypothesis).split())["total"], len(words)


def as_rollout(instruction: Instruction, response: str) -> Rollout:
    """An answer as rewards take it, without the tokens it was made of."""
    ids = torch.empty(0, dtype=torch.int64)
    return Rollout(
        prompt_index=0, instruction=instruction, response=response, token_ids=ids, logprobs=None, truncated=False
    )


def _require(task: ItemTask, rollouts: Sequence[Rollout]) -> None:
    if not rollouts:
        raise ValueError(f"task {task.name!r} was asked to score no rollouts: is its manifest empty?")


def corpus_score(task: ItemTask, rollouts: Sequence[Rollout]) -> float:
    """The task's measure of all ``rollouts``, in percent. Raises ValueError where there are none."""
    _require(task, rollouts)
    sums = [task.item(rollout.instruction, rollout.response) for rollout in rollouts]
    return sum(numerator for numerator, _ in sums) / sum(denominator for _, denominator in sums)


def kind_of(kinds: Mapping[str, str], instruction: Instruction) -> str:
    """The kind of the instruction's family, "" without ``kinds``. Raises ValueError for a family that has none."""
    if not kinds:
        return ""
    if instruction.task not in kinds:
        raise ValueError(
            f"instruction {instruction.id!r} is of family {instruction.task!r}, which has no kind; known families: "
            f"{sorted(kinds)}: add it to task.kinds, or set task.kinds to {{}}"
        )
    return kinds[instruction.task]
