# SPDX-License-Identifier: Apache-2.0
"""A judge: a language model that reads instruction and answer and gives a grade, says which of two answers is better,
or whether an answer is right (LLM-as-a-judge, arXiv 2306.05685).

Any ``protocols.Teacher`` can be the judge: a server (``OpenAITeacher``) or a folder (``HFTeacher``). Votes are kept by
what was judged, so that neither a group that repeats itself nor a restart pays twice (``votes.py``);
``verdicts.py`` reads them.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from nemo_rba.functional import typed
from nemo_rba.memory import fingerprint
from nemo_rba.protocols import Teacher
from nemo_rba.rewards.verdicts import read_choice, read_grade, read_yes_no
from nemo_rba.rewards.votes import Voter
from nemo_rba.types import Instruction, Rollout


@runtime_checkable
class Judged(Protocol):
    """A reward in [0, 1] by a judge, that says what its numbers are and whose."""

    signature: str  # who judged and how, e.g. "judge:m|prompt:judge-1|votes:3|temperature:0.7"
    measures: Mapping[str, tuple[float, float]]  # name -> (factor, offset): factor x reward + offset is the measure

    def __call__(self, rollouts: Sequence[Rollout]) -> Tensor:
        """(N,) finite float32."""


class JudgeReward:
    """Mean grade of ``votes`` votes, scaled to [0, 1]; an answer without any grade gets the lowest one.

    ``counts`` are those of ``Voter``; a grade is read by ``verdicts.read_grade``.

    Args:
        judge: who grades.
        model: what the judge is, as results tell it: the name under which its server offers it, or its folder.
        version: of the prompt, for people, e.g. "judge-1"; told in results. Votes of other models, versions, prompts or
            decodings never mix.
        prompt: what the judge is asked, with {instruction}, {response} and, if wanted, {reference}, the teacher's
            answer in the manifest.
        low, high: the scale.
        votes: how many; above 1 needs a temperature above 0.
        max_new_tokens, temperature, seed: of a vote.
        memory: JSONL file that keeps votes; "" for this process only.

    Raises:
        ValueError: a setting cannot work; the file holds votes of another judge, prompt or decoding.
    """

    def __init__(
        self, *, judge: Teacher, model: str, version: str, prompt: str, low: float, high: float, votes: int,
        max_new_tokens: int, temperature: float, seed: int, memory: str,
    ):  # fmt: skip
        if not low < high:
            raise ValueError(f"judge: low={low}, high={high}; expected low < high: change low or high")
        self._voter = Voter(
            judge=judge, model=model, version=version, prompt=prompt, slots=("instruction", "response"),
            read=partial(read_grade, low=low, high=high), scale=f"{low:g} to {high:g}", ungraded=low, votes=votes,
            max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, memory=memory,
        )  # fmt: skip
        self._low, self._high, self._sees_reference = low, high, "{reference}" in prompt
        self.identity, self.counts, self.account = self._voter.identity, self._voter.counts, self._voter.account
        self.signature = self._voter.signature
        self.measures = {
            f"judge, {low:g}-{high:g} as 0-100": (100.0, 0.0),
            f"judge, mean grade {low:g}-{high:g}": (float(high - low), float(low)),
        }

    def __call__(self, rollouts: Sequence[Rollout]) -> Tensor:
        grades = self._voter([self._slots(rollout) for rollout in rollouts])
        return (torch.tensor(grades, dtype=torch.float64) - self._low).div(self._high - self._low).float()

    def _slots(self, rollout: Rollout) -> dict[str, str]:
        instruction = rollout.instruction
        found = {"instruction": typed(instruction), "response": rollout.response}
        return found | ({"reference": instruction.response} if self._sees_reference else {})


class AnswerJudgeReward:
    """1 if the majority of votes say that an answer is right, else 0: VoiceBench's measure of sd-qa (arXiv 2410.17196).

    The judge sees question, right answer and answer, and says yes or no (``verdicts.read_yes_no``). As many for as
    against, by an even number of votes or by replies that say neither, is wrong, and counted ("answers tied"); so is
    what has no vote. An empty answer is wrong without a vote. VoiceBench takes its three replies as they are, so that
    "Yes." with a full stop counts against the answer there.

    Args:
        judge, model, version, votes, max_new_tokens, temperature, seed, memory: as for ``JudgeReward``.
        prompt: what the judge is asked, with {instruction}, {reference} and {response}; the reference is the manifest's
            response and its aliases, with semicolons between them.

    Raises:
        ValueError: as ``JudgeReward``; later: an item without a right answer.
    """

    def __init__(
        self, *, judge: Teacher, model: str, version: str, prompt: str, votes: int, max_new_tokens: int,
        temperature: float, seed: int, memory: str,
    ):  # fmt: skip
        self._voter = Voter(
            judge=judge, model=model, version=version, prompt=prompt, slots=("instruction", "reference", "response"),
            read=read_yes_no, scale="yes or no", ungraded=0.0, votes=votes, max_new_tokens=max_new_tokens,
            temperature=temperature, seed=seed, memory=memory,
        )  # fmt: skip
        self.identity, self.counts, self.signature = self._voter.identity, self._voter.counts, self._voter.signature
        self.measures = {"judged right, by majority": (100.0, 0.0)}
        self._tied: set[str] = set()

    def __call__(self, rollouts: Sequence[Rollout]) -> Tensor:
        right = torch.zeros(len(rollouts))
        said = [row for row, rollout in enumerate(rollouts) if rollout.response.strip()]
        items = [_question(rollouts[row]) for row in said]
        for row, item, share in zip(said, items, self._voter(items), strict=True):
            right[row] = float(share > 0.5)
            if share == 0.5:
                self._tied.add(fingerprint(item))
        return right

    def account(self) -> dict[str, float]:
        """That of ``Voter``, and of how many answers half of the votes said that they are right."""
        return self._voter.account() | {"answers tied": len(self._tied)}


def _question(rollout: Rollout) -> dict[str, str]:
    instruction = rollout.instruction
    if not instruction.response.strip():
        raise ValueError(
            f"item {instruction.id!r} has response {instruction.response!r}, expected the right answer, which the "
            "judge compares with: write it into the manifest"
        )
    reference = "; ".join((instruction.response, *instruction.aliases))
    return {"instruction": typed(instruction), "reference": reference, "response": rollout.response}


class PairwiseJudgeReward:
    """How much a judge prefers the answer to a baseline's: 0 never, 1 always, as in AlpacaEval (arXiv 2404.04475).

    The judge sees two answers and names the better one, 1 or 2. Which of them stands first is drawn by (seed, id of the
    instruction): judges like one of the places, and so all systems get the same one. An answer that is the baseline's
    own counts as 0.5 and is not asked about; so does one about which the judge names neither.

    Args:
        judge, model, version, votes, max_new_tokens, temperature, memory: as for ``JudgeReward``.
        prompt: what the judge is asked, with {instruction}, {first} and {second}; ``verdicts.read_choice`` reads what
            it says.
        seed: of votes and places.

    Raises:
        ValueError: as ``JudgeReward``; later: an instruction without a baseline's answer.
    """

    def __init__(
        self, *, judge: Teacher, model: str, version: str, prompt: str, votes: int, max_new_tokens: int,
        temperature: float, seed: int, memory: str,
    ):  # fmt: skip
        self._voter = Voter(
            judge=judge, model=model, version=version, prompt=prompt, slots=("instruction", "first", "second"),
            read=read_choice, scale="1 or 2", ungraded=1.5, votes=votes, max_new_tokens=max_new_tokens,
            temperature=temperature, seed=seed, memory=memory,
        )  # fmt: skip
        self.signature = self._voter.signature
        self.measures = {"win rate": (100.0, 0.0)}
        self._seed = seed
        self.identity, self.counts, self.account = self._voter.identity, self._voter.counts, self._voter.account

    def __call__(self, rollouts: Sequence[Rollout]) -> Tensor:
        preferences = torch.full((len(rollouts),), 0.5)
        unlike = [row for row, r in enumerate(rollouts) if r.response != baseline(r.instruction)]
        grades = self._voter([self._slots(rollouts[row]) for row in unlike])
        for row, grade in zip(unlike, grades, strict=True):
            preferences[row] = 2 - grade if self._stands_first(rollouts[row]) else grade - 1
        return preferences

    def _slots(self, rollout: Rollout) -> dict[str, str]:
        answers = [rollout.response, baseline(rollout.instruction)]
        first, second = answers if self._stands_first(rollout) else answers[::-1]
        return {"instruction": typed(rollout.instruction), "first": first, "second": second}

    def _stands_first(self, rollout: Rollout) -> bool:
        return int(fingerprint(self._seed, rollout.instruction.id), 16) % 2 == 0


def baseline(instruction: Instruction) -> str:
    """The answer to compare with: ``extra.baseline``, as AlpacaEval's items have it, else the manifest's response.

    Raises:
        ValueError: there is neither.
    """
    found = instruction.extra.get("baseline") or instruction.response
    if not isinstance(found, str) or not found.strip():
        raise ValueError(
            f"item {instruction.id!r} has no answer to compare with: its response and extra.baseline are "
            f"{instruction.response!r} and {instruction.extra.get('baseline')!r}, expected one of them: write it into "
            "the manifest"
        )
    return found
