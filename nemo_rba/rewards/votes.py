# SPDX-License-Identifier: Apache-2.0
"""How a judge is asked: votes on what is put into its prompt, kept by what was judged, and counted."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Protocol, runtime_checkable

from nemo.utils import logging

from nemo_rba.functional import user_prompt
from nemo_rba.memory import Memory, fingerprint
from nemo_rba.protocols import Teacher
from nemo_rba.types import SamplingParams

_SEED_STEP = 1_000_003  # so that the further votes on an item draw other random numbers


@runtime_checkable
class Accounted(Protocol):
    """What can say what its work has cost."""

    def account(self) -> dict[str, float]:
        """What was counted, e.g. {"votes paid": 12}, in this process."""


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
