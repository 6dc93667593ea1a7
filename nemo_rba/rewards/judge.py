# SPDX-License-Identifier: Apache-2.0
"""A judge: a language model that reads instruction and answer and gives a grade, says which of two answers is better,
or whether an answer is right (LLM-as-a-judge, arXiv 2306.05685).

Any ``protocols.Teacher`` can be the judge: a server (``OpenAITeacher``) or a folder (``HFTeacher``). Votes are kept by
what was judged, so that neither a group that repeats itself nor a restart pays twice; ``verdicts.py`` reads them.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import PurePath
from typing import Protocol, runtime_checkable

import torch
from nemo.utils import logging
from torch import Tensor

from nemo_rba.functional import typed, user_prompt
from nemo_rba.memory import Memory, fingerprint
from nemo_rba.protocols import Teacher
from nemo_rba.rewards.verdicts import read_choice, read_grade, read_yes_no
from nemo_rba.types import Instruction, Rollout, SamplingParams

_SEED_STEP = 1_000_003  # so that the further votes on an item draw other random numbers


@runtime_checkable
class Accounted(Protocol):
    """What can say what its work has cost."""

    def account(self) -> dict[str, float]:
        """What was counted, e.g. {"votes paid": 12}, in this process."""


@runtime_checkable
class Judged(Protocol):
    """A reward in [0, 1] by a judge, that says what its numbers are and whose."""

    signature: str  # who judged and how, e.g. "judge:m|prompt:judge-1|votes:3|temperature:0.7"
    measures: Mapping[str, tuple[float, float]]  # name -> (factor, offset): factor x reward + offset is the measure

    def __call__(self, rollouts: Sequence[Rollout]) -> Tensor:
        """(N,) finite float32."""


class Voter:
    """A judge's mean vote on whatever is put into its prompt.

    A reply without a vote is asked for once more, then left out, and counted in ``counts["no grade"]``; what has no
    vote at all is counted in ``counts["ungraded"]``. ``counts["votes"]``: all paid for. ``counts["remembered"]``:
    votes that were there already.

    Args:
        judge, model, version, prompt, votes, max_new_tokens, temperature, seed, memory: as for ``JudgeReward``.
        slots: what stands in braces in the prompt and is to be filled.
        read: reply -> vote, or None where it has none; see ``verdicts.py``.
        scale: what a vote is, in words: votes on different scales never mix.
        ungraded: the vote on what has none.

    Raises:
        ValueError: as ``JudgeReward``.
    """

    def __init__(
        self, *, judge: Teacher, model: str, version: str, prompt: str, slots: Sequence[str],
        read: Callable[[str], float | None], scale: str, ungraded: float, votes: int, max_new_tokens: int,
        temperature: float, seed: int, memory: str,
    ):  # fmt: skip
        if votes < 1 or (votes > 1 and temperature == 0):
            raise ValueError(
                f"judge: votes={votes} at temperature={temperature}; expected 1 vote or more, and a temperature above "
                "0 for several, or all would be alike"
            )
        absent = [slot for slot in slots if f"{{{slot}}}" not in prompt]
        if absent:
            raise ValueError(
                f"judge: prompt lacks the slots {absent}; expected {' and '.join(f'{{{slot}}}' for slot in slots)}"
            )
        if not model or not version:
            raise ValueError(
                f"judge: model={model!r}, version={version!r}; expected a name for each: results tell whose votes they "
                "are, and by which prompt"
            )
        self._judge, self._prompt, self._read = judge, prompt, read
        self._votes, self._seed, self._ungraded = votes, seed, ungraded
        self._decoding = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        self.identity = {"model": model, "version": version, "prompt": prompt, "scale": scale, "votes": votes}
        self.identity |= self._decoding | {"seed": seed}
        shown = PurePath(model).name if PurePath(model).is_absolute() else model
        self.signature = f"judge:{shown}|prompt:{version}|votes:{votes}|temperature:{temperature:g}"
        _refuse_others_votes(
            Memory(path=memory, owner=self.identity)
        )  # at setup; the file may grow until the first use
        self._memory = Memory(path=memory, owner=self.identity)
        self.counts: Counter[str] = Counter()
        self._judged: set[str] = set()

    def __call__(self, items: Sequence[Mapping[str, str]]) -> list[float]:
        """Slot -> text for each -> their mean votes."""
        _refuse_others_votes(self._memory)
        keys = [fingerprint(dict(item)) for item in items]
        asked = dict(zip(keys, items, strict=True))
        new = {key: item for key, item in asked.items() if key not in self._memory}
        if remembered := sum(len(self._memory[key]) for key in asked.keys() - new.keys()):
            self.counts["remembered"] += remembered
        self._judged |= asked.keys()
        if new:
            self._memory.keep(dict(zip(new, self._grade(list(new.values())), strict=True)))
        found = [self._memory[key] for key in keys]
        return [sum(votes) / len(votes) if votes else self._ungraded for votes in found]

    def account(self) -> dict[str, float]:
        """Votes paid and remembered, votes and answers without a grade; and what the judge itself has counted."""
        return {
            "answers judged": len(self._judged),
            "answers without grade": sum(not self._memory[key] for key in self._judged),
            "votes paid": self.counts["votes"],
            "votes remembered": self.counts["remembered"],
            "votes without grade": self.counts["no grade"],
        } | (self._judge.account() if isinstance(self._judge, Accounted) else {})

    def _grade(self, items: Sequence[Mapping[str, str]]) -> list[list[float]]:
        """The votes on each item; one that could not be read is asked for once more."""
        prompts = [user_prompt(self._judge, self._fill(item)) for item in items]
        places = [(item, vote) for item in range(len(items)) for vote in range(self._votes)]
        votes: list[list[float]] = [[] for _ in items]
        for attempt in range(2):
            params = SamplingParams(seed=self._seed + attempt * _SEED_STEP, **self._decoding)
            said = self._judge.generate([prompts[item] for item, _ in places], params)
            self.counts["votes"] += len(places)
            unread = []
            for place, text in zip(places, said, strict=True):
                grade = self._read(text)
                if grade is None:
                    unread.append(place)
                else:
                    votes[place[0]].append(grade)
            places = unread
            if not places:
                break
        self.counts["no grade"] += len(places)
        if ungraded := sum(not found for found in votes):
            self.counts["ungraded"] += ungraded
            logging.warning(
                f"{self.identity['model']} gave no grade to {ungraded} of {len(items)}; they get {self._ungraded:g}"
            )
        return votes

    def _fill(self, item: Mapping[str, str]) -> str:
        """The prompt with its slots filled; braces in an answer are no slots."""
        return re.sub(r"\{(\w+)\}", lambda match: item.get(match[1], match[0]), self._prompt)


def _refuse_others_votes(memory: Memory) -> None:
    """Read the file, and say which key to change where it cannot be used."""
    try:
        len(memory)
    except ValueError as error:
        raise ValueError(
            f"{error}. The key of this judge's file is evaluation.task.reward.memory; of one of several tasks, "
            "tasks.<name>.task.reward.memory; in training, memory of the judge under reward.parts"
        ) from error


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
