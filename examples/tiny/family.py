# SPDX-License-Identifier: Apache-2.0
"""What every family of open requests has."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

Slots = dict[str, str | None]


@dataclass(frozen=True)
class OpenFamily:
    """One kind of open request."""

    name: str
    pattern: re.Pattern
    sample: Callable[[Random], str]
    write: Callable[[Random, Slots], str]  # a candidate: likely, not surely, a valid answer
    check: Callable[[Slots, str], bool]


def maybe(rng: Random, probability: float, text: str) -> str:
    """The text, with a probability; else nothing."""
    return text if rng.random() < probability else ""
