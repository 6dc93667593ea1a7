# SPDX-License-Identifier: Apache-2.0
"""A judge: a language model that reads instruction and answer and gives a grade, or says which of two answers is better
(LLM-as-a-judge, arXiv 2306.05685).

Any ``protocols.Teacher`` can be the judge: a server (``OpenAITeacher``) or a folder (``HFTeacher``). A grade is the
mean of several votes and is kept by what was judged, so that neither a group that repeats itself nor a restart pays
twice.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from nemo.utils import logging
from torch import Tensor

from nemo_rba.functional import typed
from nemo_rba.memory import Memory, fingerprint
from nemo_rba.protocols import Teacher
from nemo_rba.types import Instruction, Rollout, SamplingParams

_SEED_STEP = 1_000_003  # so that the further votes on an item draw other random numbers


@runtime_checkable
class Accounted(Protocol):
    """What can say what its work has cost."""

    def account(self) -> dict[str, float]:
        """What was counted, e.g. {"votes paid": 12}, in this process."""


class Voter:
    """A judge's mean grade of whatever is put into its prompt.

    A vote without a grade is asked for once more, then left out, and counted in ``counts["no grade"]``; what has no
    grade at all is counted in ``counts["ungraded"]``. ``counts["votes"]``: all paid for. ``counts["remembered"]``:
    votes that were there already.

    Args:
        judge, name, prompt, pattern, low, high, votes, max_new_tokens, temperature, seed, memory: as for
            ``JudgeReward``.
        slots: what stands in braces in the prompt and is to be filled.
        ungraded: the grade of what has none.

    Raises:
        ValueError: as ``JudgeReward``.
    """

    def __init__(
        self, *, judge: Teacher, name: str, prompt: str, slots: Sequence[str], pattern: str, low: float, high: float,
        ungraded: float, votes: int, max_new_tokens: int, temperature: float, seed: int, memory: str,
    ):  # fmt: skip
        if not low < high or votes < 1 or (votes > 1 and temperature == 0):
            raise ValueError(
                f"judge: low={low}, high={high}; expected low < high; votes={votes} at temperature={temperature}; "
                "expected 1 vote or more, and a temperature above 0 for several, or all would be alike"
            )
        absent = [slot for slot in slots if f"{{{slot}}}" not in prompt]
        if absent or re.compile(pattern).groups < 1:
            raise ValueError(
                f"judge: prompt lacks the slots {absent}, pattern {pattern!r} has {re.compile(pattern).groups} groups; "
                f"expected {' and '.join(f'{{{slot}}}' for slot in slots)}, and one group that is the grade"
            )
        self._judge, self._prompt, self._pattern, self._low, self._high = judge, prompt, re.compile(pattern), low, high
        self._votes, self._seed, self._ungraded = votes, seed, ungraded
        self._decoding = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        self.identity = {"judge": name, "prompt": prompt, "pattern": pattern, "scale": [low, high], "votes": votes}
        self.identity |= self._decoding | {"seed": seed}
        self._memory = Memory(path=memory, owner=self.identity)
        self.counts: Counter[str] = Counter()
        self._judged: set[str] = set()

    def __call__(self, items: Sequence[Mapping[str, str]]) -> list[float]:
        """Slot -> text for each -> their mean grades."""
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
        prompts = [self._judge.render([{"role": "user", "content": self._fill(item)}], open_turn="assistant")
                   for item in items]  # fmt: skip
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
                f"{self.identity['judge']} gave no grade to {ungraded} of {len(items)}; they get {self._ungraded:g}"
            )
        return votes

    def _fill(self, item: Mapping[str, str]) -> str:
        """The prompt with its slots filled; braces in an answer are no slots."""
        return re.sub(r"\{(\w+)\}", lambda match: item.get(match[1], match[0]), self._prompt)

    def _read(self, text: str) -> float | None:
        found = [match[1] for match in self._pattern.finditer(text)]
        if not found:
            return None
        grade = float(found[-1])
        return grade if self._low <= grade <= self._high else None


class JudgeReward:
    """Mean grade of ``votes`` votes, scaled to [0, 1]; an answer without any grade gets the lowest one.

    ``counts`` are those of ``Voter``.

    Args:
        judge: who grades.
        name: of the judge, as it is told in results: grades of different judges never mix.
        prompt: what the judge is asked, with {instruction}, {response} and, if wanted, {reference}, the teacher's
            answer in the manifest.
        pattern: regular expression whose first group, in its last match, is the grade.
        low, high: the scale.
        votes: how many; above 1 needs a temperature above 0.
        max_new_tokens, temperature, seed: of a vote.
        memory: JSONL file that keeps votes; "" for this process only.

    Raises:
        ValueError: a setting cannot work; the file holds grades of another judge, prompt or decoding.
    """

    def __init__(
        self, *, judge: Teacher, name: str, prompt: str, pattern: str, low: float, high: float, votes: int,
        max_new_tokens: int, temperature: float, seed: int, memory: str,
    ):  # fmt: skip
        self._voter = Voter(
            judge=judge, name=name, prompt=prompt, slots=("instruction", "response"), pattern=pattern, low=low,
            high=high, ungraded=low, votes=votes, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
            memory=memory,
        )  # fmt: skip
        self._low, self._high, self._sees_reference = low, high, "{reference}" in prompt
        self.identity, self.counts, self.account = self._voter.identity, self._voter.counts, self._voter.account

    def __call__(self, rollouts: Sequence[Rollout]) -> Tensor:
        grades = self._voter([self._slots(rollout) for rollout in rollouts])
        return (torch.tensor(grades, dtype=torch.float64) - self._low).div(self._high - self._low).float()

    def _slots(self, rollout: Rollout) -> dict[str, str]:
        instruction = rollout.instruction
        found = {"instruction": typed(instruction), "response": rollout.response}
        return found | ({"reference": instruction.response} if self._sees_reference else {})


class PairwiseJudgeReward:
    """How much a judge prefers the answer to a baseline's: 0 never, 1 always, as in AlpacaEval (arXiv 2404.04475).

    The judge sees two answers and names the better one, 1 or 2. Which of them stands first is drawn by (seed, id of the
    instruction): judges like one of the places, and so all systems get the same one. An answer that is the baseline's
    own counts as 0.5 and is not asked about; so does one about which the judge names neither.

    Args:
        judge, name, votes, max_new_tokens, temperature, memory: as for ``JudgeReward``.
        prompt: what the judge is asked, with {instruction}, {first} and {second}.
        pattern: regular expression whose first group, in its last match, is 1 or 2, or 1.5 for a draw.
        seed: of votes and places.

    Raises:
        ValueError: as ``JudgeReward``; later: an instruction without a baseline's answer.
    """

    def __init__(
        self, *, judge: Teacher, name: str, prompt: str, pattern: str, votes: int, max_new_tokens: int,
        temperature: float, seed: int, memory: str,
    ):  # fmt: skip
        self._voter = Voter(
            judge=judge, name=name, prompt=prompt, slots=("instruction", "first", "second"), pattern=pattern, low=1,
            high=2, ungraded=1.5, votes=votes, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
            memory=memory,
        )  # fmt: skip
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
