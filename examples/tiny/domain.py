# SPDX-License-Identifier: Apache-2.0
"""What people ask the tiny assistant, and which answers are right.

Half of the drawn requests have one answer ("closed": arithmetic, capitals, spelling, word order, ...), half have many
("open": lists, sentences under constraints, stories, greetings, invitations). Everything here works from the text of a
request alone, so any text, sampled from a teacher or recognised from speech, can be parsed, answered and judged.
"""

import hashlib
import re
from dataclasses import dataclass, field
from functools import lru_cache
from random import Random

from . import closed, open_requests
from . import words as w

TRANSCRIBE = "transcribe"  # "transcribe <words>" asks for the words; not a family, ``parse`` does not know it
_TEST_PERCENT, _DEV_PERCENT = 14, 8


@dataclass(frozen=True)
class Item:
    """A request with one valid answer."""

    instruction: str
    task: str
    kind: str  # "closed" or "open"
    reference: str


@dataclass(frozen=True)
class ParsedRequest:
    """What a request asks for."""

    text: str
    task: str
    kind: str  # "closed" or "open"
    answer: str | None = None  # closed: the only right answer, punctuation split off
    slots: dict[str, str | None] = field(default_factory=dict)  # open: what was asked for


def sample_item(rng: Random) -> Item:
    """A random request: closed or open with equal probability."""
    text = closed.sample(rng) if rng.random() < 0.5 else open_requests.sample(rng)
    return Item(text, task_of(text), kind_of(text), reference_answer(rng, text))


@lru_cache(maxsize=65536)
def parse(text: str) -> ParsedRequest | None:
    """What a request asks for, from its words; None if the grammar does not know it."""
    text = " ".join(split_words(text))
    if solved := closed.solve(text):
        return ParsedRequest(text, task=solved[0], kind="closed", answer=solved[1])
    if parsed := open_requests.parse(text):
        return ParsedRequest(text, task=parsed[0].name, kind="open", slots=parsed[1])
    return None


def verify(instruction: str, response: str) -> float:
    """1.0 if ``response`` is a right answer to ``instruction``, else 0.0."""
    request = parse(instruction)
    if request is None:
        return 0.0
    answer = " ".join(split_words(response))
    if request.kind == "closed":
        return float(answer == request.answer)
    return float(_open_family(request).check(request.slots, answer))


def reference_answer(rng: Random, text: str) -> str | None:
    """A right answer to a request, drawn at random where there are many; None if the grammar does not know it."""
    request = parse(text)
    if request is None:
        return None
    if request.kind == "closed":
        return join_words(request.answer)
    family = _open_family(request)
    for _ in range(2000):
        candidate = family.write(rng, request.slots)
        if family.check(request.slots, candidate):
            return join_words(candidate)
    raise RuntimeError(f"no answer found to {text!r}")


def task_of(text: str) -> str | None:
    """The family of a request."""
    request = parse(text)
    return request.task if request else None


def kind_of(text: str) -> str | None:
    """ "closed" or "open"."""
    request = parse(text)
    return request.kind if request else None


def kinds() -> dict[str, str]:
    """Every family's kind."""
    return {family.name: "closed" for family in closed.FAMILIES} | {
        family.name: "open" for family in open_requests.FAMILIES
    }


def split_of(text: str) -> str:
    """The split a request belongs to, by hash: the same text is never in two splits."""
    bucket = int(hashlib.md5(text.encode()).hexdigest(), 16) % 100
    if bucket < _TEST_PERCENT:
        return "test"
    return "dev" if bucket < _TEST_PERCENT + _DEV_PERCENT else "train"


def sample_split(rng: Random, split: str) -> Item:
    """A random request of one split."""
    while True:
        item = sample_item(rng)
        if split_of(item.instruction) == split:
            return item


def split_words(text: str) -> list[str]:
    """Lower-case words, with punctuation marks as words of their own."""
    return re.findall(r"[\w'-]+|[.,?!]", text.lower())


def join_words(text: str) -> str:
    """The reverse of ``split_words``, joined: punctuation sits against the word before it."""
    return re.sub(r" ([.,?!])", r"\1", text)


@lru_cache(maxsize=1)
def vocabulary() -> tuple[list[str], list[str]]:
    """(words that occur in requests, words that occur in answers), sorted; found by drawing many items."""
    rng, spoken, written = Random(0), set(), set()
    for _ in range(40_000):
        item = sample_item(rng)
        spoken.update(split_words(item.instruction))
        written.update(split_words(item.reference))
    for word in w.LIST_WORDS:
        written.update(word)  # letters
    return sorted(spoken), sorted(written)


def _open_family(request: ParsedRequest) -> open_requests.OpenFamily:
    return next(family for family in open_requests.FAMILIES if family.name == request.task)
