# SPDX-License-Identifier: Apache-2.0
"""A judge: a language model that reads instruction and answer, and gives a grade (LLM-as-a-judge, 2306.05685).

Any ``protocols.Teacher`` can be the judge: a server (``OpenAITeacher``) or a folder (``HFTeacher``). A grade is the
mean of several votes and is kept by what was judged, so that neither a group that repeats itself nor a restart pays
twice.
"""

import re
from collections import Counter
from collections.abc import Sequence

import torch
from nemo.utils import logging
from torch import Tensor

from nemo_rba.functional import typed
from nemo_rba.memory import Memory, fingerprint
from nemo_rba.protocols import Teacher
from nemo_rba.types import Rollout, SamplingParams

_SLOTS = ("instruction", "response", "reference")
_SEED_STEP = 1_000_003  # so that the further votes on an item draw other random numbers


class JudgeReward:
    """Mean grade of ``votes`` votes, scaled to [0, 1].

    A vote without a grade is asked for once more, then left out, and counted in ``counts["no grade"]``; an answer
    without any grade gets the lowest one and is counted in ``counts["ungraded"]``. ``counts["votes"]``: all paid for.

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
        if not low < high:
            raise ValueError(f"judge: low={low} and high={high}; expected low < high")
        if votes < 1 or (votes > 1 and temperature <= 0):
            raise ValueError(
                f"judge: votes={votes} at temperature={temperature}; expected 1 vote or more, and a temperature "
                "above 0 for several, or all would be alike"
            )
        absent = [slot for slot in _SLOTS[:2] if f"{{{slot}}}" not in prompt]
        if absent or re.compile(pattern).groups < 1:
            raise ValueError(
                f"judge: prompt lacks the slots {absent}, pattern {pattern!r} has {re.compile(pattern).groups} groups; "
                "expected {instruction} and {response}, and one group that is the grade"
            )
        self._judge, self._prompt, self._pattern, self._low, self._high = judge, prompt, re.compile(pattern), low, high
        self._votes, self._seed = votes, seed
        self._decoding = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        self.identity = {"judge": name, "prompt": prompt, "pattern": pattern, "scale": [low, high], "votes": votes}
        self.identity |= self._decoding | {"seed": seed}
        self._memory = Memory(path=memory, owner=self.identity)
        self.counts: Counter[str] = Counter()

    def __call__(self, rollouts: Sequence[Rollout]) -> Tensor:
        asked = {fingerprint(slots): slots for slots in map(self._slots, rollouts)}
        new = {key: slots for key, slots in asked.items() if key not in self._memory}
        if new:
            self._memory.keep(dict(zip(new, self._grade(list(new.values())), strict=True)))
        grades = [self._memory[fingerprint(self._slots(rollout))] for rollout in rollouts]
        return torch.tensor([self._scaled(votes) for votes in grades], dtype=torch.float32)

    def _slots(self, rollout: Rollout) -> dict[str, str]:
        instruction = rollout.instruction
        found = {"instruction": typed(instruction), "response": rollout.response}
        return found | ({"reference": instruction.response} if "{reference}" in self._prompt else {})

    def _grade(self, items: Sequence[dict[str, str]]) -> list[list[float]]:
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
                f"{self.identity['judge']} gave {ungraded} of {len(items)} answers no grade; they get the lowest"
            )
        return votes

    def _fill(self, item: dict[str, str]) -> str:
        """The prompt with its slots filled; braces in an answer are no slots."""
        return re.sub(r"\{(\w+)\}", lambda match: item.get(match[1], match[0]), self._prompt)

    def _read(self, text: str) -> float | None:
        found = [match[1] for match in self._pattern.finditer(text)]
        if not found:
            return None
        grade = float(found[-1])
        return grade if self._low <= grade <= self._high else None

    def _scaled(self, votes: Sequence[float]) -> float:
        mean = sum(votes) / len(votes) if votes else self._low
        return (mean - self._low) / (self._high - self._low)
