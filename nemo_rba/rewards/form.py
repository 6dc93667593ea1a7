# SPDX-License-Identifier: Apache-2.0
"""Rewards for the form of an answer, whatever it says: its language, and a pattern. Each gives 1 or 0: (N,) float32.

An answer in the right form may be wrong, and an empty one may fit: these stand beside other rewards in a mixture.
"""

import json
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_rba.language import language_identifier, num_letter_bytes
from nemo_rba.types import Rollout

FORMS = ("whole", "part", "json")


class LanguageReward:
    """1 if an answer is in the language asked for, else 0, by py3langid (langid.py, ACL 2012, P12-3005).

    Asked for is an instruction's ``extra["target_language"]``, as translation sets have it, else ``language``. An
    answer is in the language that is likeliest among ``candidates``: a yes or no, for its probability would be driven
    up by words, not by a change of language. A few letters decide little, and get 1.

    Args:
        language: code of the language of answers to all other instructions, e.g. en (ISO 639-1).
        candidates: codes of the languages to tell apart, all that are asked for among them; [] = all that py3langid
            knows. A dozen likely ones are told apart more safely.
        min_bytes: answers whose letters have fewer bytes in UTF-8 get 1; a Latin letter has one, a Chinese one three.

    Raises:
        ValueError: settings out of range; at a call, a language that is no candidate, or that py3langid does not know.
        ImportError: py3langid is missing (at the first call).
    """

    def __init__(self, *, language: str, candidates: Sequence[str], min_bytes: int):
        if candidates and (language not in candidates or len(set(candidates)) < 2):
            raise ValueError(
                f"candidates must hold language {language!r} and others, or nothing, got {list(candidates)}: change "
                "candidates of the language reward"
            )
        if min_bytes < 0:
            raise ValueError(f"min_bytes must be 0 or more, got {min_bytes}: change min_bytes of the language reward")
        self.language, self.candidates, self.min_bytes = language, tuple(sorted(set(candidates))), min_bytes

    def __call__(self, rollouts: Sequence[Rollout]) -> Tensor:
        return torch.tensor([float(self._fits(rollout)) for rollout in rollouts])

    def _fits(self, rollout: Rollout) -> bool:
        asked = re.split("[-_]", str(rollout.instruction.extra.get("target_language", self.language)).lower())[0]
        identifier, known = language_identifier(self.candidates)
        if asked not in known:
            raise ValueError(
                f"instruction {rollout.instruction.id!r} asks for language {asked!r}, expected one of "
                f"{sorted(known)}: change language or candidates of the language reward"
            )
        too_short = num_letter_bytes(rollout.response) < self.min_bytes
        return too_short or str(identifier.rank(rollout.response)[0][0]) == asked


class FormatReward:
    """1 if an answer has a form that a program can check, else 0.

    Args:
        form: "whole" (the pattern matches the answer from end to end), "part" (some part of it), or "json" (the answer
            is one JSON value, and nothing else). White space around an answer does not count.
        pattern: a regular expression of Python's ``re``, flags inside it, e.g. ``(?is)yes|no``; '' for "json".

    Raises:
        ValueError: there is no such form, the pattern cannot be read, or fits every answer.
    """

    def __init__(self, *, form: str, pattern: str):
        if form not in FORMS:
            raise ValueError(f"form must be one of {FORMS}, got {form!r}: change form of the format reward")
        if (form == "json") != (pattern == ""):
            raise ValueError(
                f"pattern is {pattern!r} with form {form!r}; expected a regular expression for 'whole' and 'part', and "
                "'' for 'json': change pattern of the format reward"
            )
        try:
            self._pattern = re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"pattern {pattern!r} is no regular expression: {error}; change pattern of the format reward"
            ) from None
        if form == "part" and self._pattern.search(""):
            raise ValueError(
                f"pattern {pattern!r} is found in every answer, for it matches nothing at all; change pattern of the "
                "format reward"
            )
        self._form = form

    def __call__(self, rollouts: Sequence[Rollout]) -> Tensor:
        return torch.tensor([float(self._fits(rollout.response.strip())) for rollout in rollouts])

    def _fits(self, answer: str) -> bool:
        if self._form == "json":
            return _is_json(answer)
        match = self._pattern.fullmatch if self._form == "whole" else self._pattern.search
        return match(answer) is not None


def _is_json(text: str) -> bool:
    """Whether ``text`` is JSON as the standard has it: without NaN and Infinity, which Python would read."""
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(constant: str) -> None:
    raise ValueError(constant)
