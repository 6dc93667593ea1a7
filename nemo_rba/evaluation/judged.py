# SPDX-License-Identifier: Apache-2.0
"""Tasks whose measure is a reward: of any kind, a judge's grades, or a judge's choice between two answers."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from nemo_rba.distributed.once import once_per_model
from nemo_rba.evaluation.measures import LENGTH_CONTROLLED, Statistics
from nemo_rba.evaluation.tasks import MeasuredTask, as_rollout, corpus_score, kind_of
from nemo_rba.protocols import Metrics, RewardFunction
from nemo_rba.rewards.judge import Judged, baseline
from nemo_rba.rewards.votes import Accounted
from nemo_rba.types import Instruction, Rollout, SpeechBatch


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
        return kind_of(self.kinds, instruction)

    def prepare(self, answers: Sequence[tuple[Instruction, str]]) -> None:
        """Score many answers in one call of the reward: a judge is then asked in parallel."""
        self._rewarded.prepare(answers)

    def item(self, instruction: Instruction, response: str) -> tuple[float, float]:
        return 100 * self._rewarded.score(instruction, response), 1.0

    def account(self) -> dict[str, float]:
        """What a judge was paid for; {} for a reward that counts nothing."""
        return self._rewarded.account()

    def score(self, rollouts: Sequence[Rollout]) -> Metrics:
        return {"score": corpus_score(self, rollouts)}


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
