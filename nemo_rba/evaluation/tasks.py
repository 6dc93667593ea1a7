# SPDX-License-Identifier: Apache-2.0
"""What is measured on a held-out set. One task is one set in one condition, e.g. "held-out voices".

Every measure here is a ratio of two sums over items: mean verifier score = sum of scores / number of items, word error
rate = sum of errors / sum of reference words. So a task only says what an item adds to both sums, and totals, tables by
family and bootstraps (``statistics.py``) follow. All results are in percent.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import kaldialign
import torch

from nemo_rba.protocols import EvalTask, Metrics, RewardFunction
from nemo_rba.rewards.text import normalize
from nemo_rba.types import Instruction, Rollout, SpeechBatch


class ItemTask(EvalTask, Protocol):
    """An ``EvalTask`` that scores item by item."""

    measure: str  # "score" (higher is better) or "wer" (lower is better)

    def kind(self, instruction: Instruction) -> str:
        """Coarser group of the family ``instruction.task`` for tables, or ""."""

    def item(self, instruction: Instruction, response: str) -> tuple[float, float]:
        """(numerator, denominator) that this answer adds to the corpus measure, in percent."""


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
        return _kind(self.kinds, instruction)

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
        metrics = {"score": _corpus(self, rollouts)}
        for group in (lambda rollout: rollout.instruction.task, lambda rollout: self.kind(rollout.instruction)):
            for name in sorted({group(rollout) for rollout in rollouts} - {""}):
                metrics[f"score/{name}"] = _corpus(self, [rollout for rollout in rollouts if group(rollout) == name])
        return metrics


class RewardTask:
    """Any reward in [0, 1] as a measure, in percent: one definition of "good" for training and for the report.

    Args:
        name, batches, kinds: as for ``InstructionFollowingTask``.
        reward: scores an answer; it sees the teacher's answer in ``rollout.instruction.response``.
    """

    measure = "score"

    def __init__(
        self,
        *,
        name: str,
        batches: Callable[[], Iterable[SpeechBatch]],
        reward: RewardFunction,
        kinds: Mapping[str, str],
    ):
        self.name = name
        self.batches = batches
        self.reward = reward
        self.kinds = dict(kinds)

    def kind(self, instruction: Instruction) -> str:
        return _kind(self.kinds, instruction)

    def item(self, instruction: Instruction, response: str) -> tuple[float, float]:
        rollout = Rollout(
            prompt_index=0,
            instruction=instruction,
            response=response,
            token_ids=torch.empty(0, dtype=torch.int64),
            logprobs=None,
            truncated=False,
        )
        return 100 * float(self.reward([rollout])[0]), 1.0

    def score(self, rollouts: Sequence[Rollout]) -> Metrics:
        return {"score": _corpus(self, rollouts)}


class TranscriptionTask:
    """Word error rate of answers that should repeat ``instruction.text``, in percent; case and punctuation forgiven.

    Args:
        name: of the condition; also the folder of its predictions.
        batches: gives the whole set, with a ``context`` that asks for a transcript.
    """

    measure = "wer"

    def __init__(self, *, name: str, batches: Callable[[], Iterable[SpeechBatch]]):
        self.name = name
        self.batches = batches

    def kind(self, instruction: Instruction) -> str:
        return ""

    def item(self, instruction: Instruction, response: str) -> tuple[float, float]:
        errors, words = word_errors(instruction.text, response)
        return 100.0 * errors, float(words)

    def score(self, rollouts: Sequence[Rollout]) -> Metrics:
        return {"wer": _corpus(self, rollouts)}


def word_errors(reference: str, hypothesis: str) -> tuple[int, int]:
    """Substitutions, deletions and insertions of normalised words, and the number of reference words."""
    words = normalize(reference).split()
    if not words:
        raise ValueError(
            f"word error rate needs a reference with words, got {reference!r}: filter it from the manifest"
        )
    return kaldialign.edit_distance(words, normalize(hypothesis).split())["total"], len(words)


def _corpus(task: ItemTask, rollouts: Sequence[Rollout]) -> float:
    if not rollouts:
        raise ValueError(f"task {task.name!r} was asked to score no rollouts: is its manifest empty?")
    sums = [task.item(rollout.instruction, rollout.response) for rollout in rollouts]
    return sum(numerator for numerator, _ in sums) / sum(denominator for _, denominator in sums)


def _kind(kinds: Mapping[str, str], instruction: Instruction) -> str:
    if not kinds:
        return ""
    if instruction.task not in kinds:
        raise ValueError(
            f"instruction {instruction.id!r} is of family {instruction.task!r}, which has no kind; known families: "
            f"{sorted(kinds)}: add it to task.kinds, or set task.kinds to {{}}"
        )
    return kinds[instruction.task]
