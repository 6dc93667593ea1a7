# SPDX-License-Identifier: Apache-2.0
"""What is measured on a held-out set. One task is one set in one condition, e.g. "held-out voices".

A measure is a function of sums over items, mostly the ratio of two: mean verifier score = sum of scores / number of
items, word error rate = sum of errors / sum of reference words. So a task only says what an item adds to the sums, and
totals, tables by family and bootstraps (``statistics.py``) follow. A ``SeveralMeasures`` task reads more than one
number off the same answers, such as BLEU, chrF and TER, and says what an item adds to each (``measures.py``). All
results are in percent. A task whose measure is paid for, such as a judge's, says what it has cost
(``rewards.judge.Accounted``). Other tasks: ``answers.py``, ``translation.py``, ``ifeval.py``.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import kaldialign
import numpy as np
import torch

from nemo_rba.distributed.once import once_per_model
from nemo_rba.evaluation.measures import LENGTH_CONTROLLED, Statistics, item_share, set_score, short_name
from nemo_rba.protocols import EvalTask, Metrics, RewardFunction
from nemo_rba.rewards.judge import Accounted, Judged, baseline
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
        return _kind(self.kinds, instruction)

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


@dataclass(frozen=True, slots=True)
class _Judge:
    """A reward by a name that ``once_per_model`` can call."""

    reward: RewardFunction

    def scores(self, answers: Sequence[tuple[Instruction, str]]) -> list[float]:
        return self.reward([as_rollout(instruction, response) for instruction, response in answers]).tolist()


class _Rewarded:
    """Scores of a reward, asked for once for each answer and model, and what they have cost."""

    def __init__(self, reward: RewardFunction, prices: Mapping[str, float] | None):
        self._reward = reward
        self._judge = once_per_model(lambda: _Judge(reward))
        self._prices = dict(prices or {})
        self._known: dict[tuple[str, str], float] = {}  # (id, answer) -> score
        self.account()  # so that a price of nothing is refused before anything is paid

    def prepare(self, answers: Sequence[tuple[Instruction, str]]) -> None:
        if not answers:
            return
        for (instruction, response), score in zip(answers, self._judge.scores(answers), strict=True):
            self._known[instruction.id, response] = score

    def score(self, instruction: Instruction, response: str) -> float:
        if (instruction.id, response) not in self._known:
            self.prepare([(instruction, response)])
        return self._known[instruction.id, response]

    def account(self) -> dict[str, float]:
        counted = self._reward.account() if isinstance(self._reward, Accounted) else {}
        unknown = sorted(set(self._prices) - set(counted))
        if unknown:
            raise ValueError(
                f"task.prices has {unknown}, but {', '.join(counted) or 'nothing'} is counted: change task.prices"
            )
        cost = sum(price * counted[what] for what, price in self._prices.items()) / 1e6
        return counted | ({"cost": cost} if self._prices else {})


class RewardTask:
    """Any reward in [0, 1] as a measure, in percent: one definition of "good" for training and for the report.

    Of a judge, ``JudgedTask`` says more.

    Args:
        name, batches, kinds: as for ``InstructionFollowingTask``.
        reward: scores an answer; it sees the teacher's answer in ``rollout.instruction.response``.
        prices: of a million of what the reward counts, e.g. {"prompt tokens": 2.5, "completion tokens": 10.0}, for
            "cost" in its account; None for none.
    """

    measure = "score"

    def __init__(
        self,
        *,
        name: str,
        batches: Callable[[], Iterable[SpeechBatch]],
        reward: RewardFunction,
        prices: Mapping[str, float] | None,
        kinds: Mapping[str, str],
    ):
        self.name = name
        self.batches = batches
        self.kinds = dict(kinds)
        self._rewarded = _Rewarded(reward, prices)

    def kind(self, instruction: Instruction) -> str:
        return _kind(self.kinds, instruction)

    def prepare(self, answers: Sequence[tuple[Instruction, str]]) -> None:
        """Score many answers in one call of the reward: a judge is then asked in parallel."""
        self._rewarded.prepare(answers)

    def item(self, instruction: Instruction, response: str) -> tuple[float, float]:
        return 100 * self._rewarded.score(instruction, response), 1.0

    def account(self) -> dict[str, float]:
        """What a judge was paid for; {} for a reward that counts nothing."""
        return self._rewarded.account()

    def score(self, rollouts: Sequence[Rollout]) -> Metrics:
        return {"score": _corpus(self, rollouts)}


class JudgedTask(MeasuredTask):
    """What a judge says of the answers, under names that say so: who judged, by which prompt and with how many votes.

    Args:
        name, batches, kinds: as for ``InstructionFollowingTask``.
        reward: ``rewards.judge.JudgeReward`` (measures: its grade as a percentage, and the mean grade itself) or
            ``AnswerJudgeReward`` (the share of answers that are right).
        prices: as for ``RewardTask``.
    """

    def __init__(
        self,
        *,
        name: str,
        batches: Callable[[], Iterable[SpeechBatch]],
        reward: Judged,
        prices: Mapping[str, float] | None,
        kinds: Mapping[str, str],
    ):
        super().__init__(name=name, batches=batches, kinds=kinds)
        self._rewarded = _Rewarded(reward, prices)
        self._measures = {f"{measure}|{reward.signature}": how for measure, how in reward.measures.items()}

    def prepare(self, answers: Sequence[tuple[Instruction, str]]) -> None:
        """Judge many answers in one call of the reward: the judge is then asked in parallel."""
        self._rewarded.prepare(answers)

    def statistics(self, instruction: Instruction, response: str) -> Statistics:
        found = self._rewarded.score(instruction, response)
        return {measure: [factor * found + offset, 1.0] for measure, (factor, offset) in self._measures.items()}

    def account(self) -> dict[str, float]:
        """What the judge was paid for."""
        return self._rewarded.account()

    def score(self, rollouts: Sequence[Rollout]) -> Metrics:
        self.prepare([(rollout.instruction, rollout.response) for rollout in rollouts])
        return super().score(rollouts)


class WinRateTask(JudgedTask):
    """Share of answers that are preferred to a baseline's, in percent, and the same with lengths controlled.

    The latter is AlpacaEval 2's (arXiv 2404.04475), see ``length_control.py`` for what it leaves out; lengths are
    characters. It is given for a whole set with its interval, but no p-value.

    Args:
        name, batches, kinds: as for ``InstructionFollowingTask``.
        reward: ``rewards.judge.PairwiseJudgeReward``.
        prices: as for ``RewardTask``.
    """

    def statistics(self, instruction: Instruction, response: str) -> Statistics:
        preference = self._rewarded.score(instruction, response)
        excess = float(len(response) - len(baseline(instruction)))
        controlled = f"{LENGTH_CONTROLLED}|glm:length_controlled_minimal"
        return {**super().statistics(instruction, response), controlled: [preference, excess]}


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


def _corpus(task: ItemTask, rollouts: Sequence[Rollout]) -> float:
    _require(task, rollouts)
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
