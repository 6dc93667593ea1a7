# SPDX-License-Identifier: Apache-2.0
"""Requests with one right answer: eleven families, times six forms of the answer.

A family is a regular expression, a solver that maps its groups to the answer, and a sampler. A form is a suffix of the
request ("... politely") and what it does to the answer ("of course , ...").
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from . import words as w

MAX_ANSWER_WORDS = 22
ORDINALS = ("first", "second", "third")
REPEATS = w.NUMBERS[2:6]
REPEATABLE = [*w.LIST_WORDS, "goodbye", "friend", "water", "bread", "summer", "music", "sugar", "family", "kitchen"]

FORMS: dict[str, Callable[[str], str]] = {
    "": lambda answer: answer,
    "twice": lambda answer: f"{answer} {answer}",
    "politely": lambda answer: f"of course , {answer} .",
    "in a full sentence": lambda answer: f"the answer is {answer} .",
    "beginning with certainly": lambda answer: f"certainly , {answer} .",
    "and then say goodbye": lambda answer: f"{answer} . goodbye .",
}


@dataclass(frozen=True)
class ClosedFamily:
    """One kind of question."""

    name: str
    pattern: re.Pattern
    solve: Callable[..., str | None]  # gets the pattern's groups
    sample: Callable[[Random], str]  # a request without its form


def _number(value: int) -> str | None:
    return w.NUMBERS[value] if 0 <= value < len(w.NUMBERS) else None


def _arithmetic(left: str, operation: str, right: str) -> str | None:
    a, b = w.VALUE_OF[left], w.VALUE_OF[right]
    return _number(a + b if operation in ("plus", "and") else a - b)


def _compare(which: str, left: str, right: str) -> str | None:
    if left == right:
        return None
    pick = max if which == "bigger" else min
    return pick(left, right, key=w.VALUE_OF.__getitem__)


def _count(start: str, stop: str) -> str | None:
    a, b = w.VALUE_OF[start], w.VALUE_OF[stop]
    if not 1 <= abs(a - b) <= 5:
        return None
    step = 1 if b > a else -1
    return " ".join(w.NUMBERS[value] for value in range(a, b + step, step))


def _neighbour(side: str, word: str) -> str | None:
    step = 1 if side == "after" else -1
    for cycle in (w.DAYS, w.MONTHS):
        if word in cycle:
            return cycle[(cycle.index(word) + step) % len(cycle)]
    return _number(w.VALUE_OF[word] + step)


def _translate(phrase: str, language: str) -> str:
    return w.TRANSLATIONS[phrase][w.LANGUAGES.index(language)]


def _spell(word: str, backwards: str | None) -> str:
    return " ".join(word[::-1] if backwards else word)


def _pick(ordinal: str, *three: str) -> str | None:
    return three[ORDINALS.index(ordinal)] if len(set(three)) == 3 else None


def _reverse(*three: str) -> str | None:
    return " ".join(reversed(three)) if len(set(three)) == 3 else None


def _choose(kind: str, *three: str) -> str | None:
    fitting = [word for word in three if w.SINGULAR_WITH_ARTICLE[w.CATEGORY_OF[word]] == kind]
    return fitting[0] if len(fitting) == 1 and len(set(three)) == 3 else None


def _sample_arithmetic(rng: Random) -> str:
    a, b = rng.randrange(13), rng.randrange(13)
    if rng.random() < 0.4:
        a, b = max(a, b), min(a, b)
        return f"{rng.choice(['what is', 'tell me'])} {w.NUMBERS[a]} minus {w.NUMBERS[b]}"
    if rng.random() < 0.67:
        return f"{rng.choice(['what is', 'tell me'])} {w.NUMBERS[a]} plus {w.NUMBERS[b]}"
    return f"add {w.NUMBERS[a]} and {w.NUMBERS[b]}"


def _sample_count(rng: Random) -> str:
    start = rng.randrange(13)
    stop = rng.choice([value for value in range(13) if 2 <= abs(value - start) <= 5])
    return f"count from {w.NUMBERS[start]} until {w.NUMBERS[stop]}"


def _sample_choose(rng: Random) -> str:
    three = rng.sample([rng.choice(members) for members in w.CATEGORIES.values()], 3)
    kind = w.SINGULAR_WITH_ARTICLE[w.CATEGORY_OF[rng.choice(three)]]
    return f"which word is {kind} {' '.join(three)}"


def _three(rng: Random) -> str:
    return " ".join(rng.sample(w.LIST_WORDS, 3))


_NUM, _SPOKEN = w.one_of(w.SPOKEN_NUMBERS[:13]), w.one_of(w.SPOKEN_NUMBERS)
_WORD = w.one_of(w.LIST_WORDS)
_THREE = rf"({_WORD}) ({_WORD}) ({_WORD})"
_NEIGHBOURS = [*w.DAYS, *w.MONTHS, *w.SPOKEN_NUMBERS[1:]]


def _family(name, pattern, solve, sample) -> ClosedFamily:
    return ClosedFamily(name, re.compile(pattern), solve, sample)


FAMILIES = [
    _family("arithmetic", rf"(?:what is|tell me) ({_NUM}) (plus|minus) ({_NUM})", _arithmetic, _sample_arithmetic),
    _family("arithmetic", rf"add ({_NUM}) (and) ({_NUM})", _arithmetic, _sample_arithmetic),
    _family(
        "compare",
        rf"which is (bigger|smaller) ({_SPOKEN}) or ({_SPOKEN})",
        _compare,
        lambda rng: f"which is {rng.choice(['bigger', 'smaller'])} {' or '.join(rng.sample(w.SPOKEN_NUMBERS, 2))}",
    ),
    _family("count", rf"count from ({_NUM}) until ({_NUM})", _count, _sample_count),
    _family(
        "capital",
        rf"(?:what is|tell me|name) the capital of ({w.one_of(w.CAPITALS)})",
        w.CAPITALS.__getitem__,
        lambda rng: f"{rng.choice(['what is', 'tell me', 'name'])} the capital of {rng.choice(list(w.CAPITALS))}",
    ),
    _family(
        "opposite",
        rf"(?:what is|tell me) the opposite of ({w.one_of(w.OPPOSITES)})",
        w.OPPOSITES.__getitem__,
        lambda rng: f"{rng.choice(['what is', 'tell me'])} the opposite of {rng.choice(list(w.OPPOSITES))}",
    ),
    _family(
        "calendar",
        rf"what comes (after|before) ({w.one_of(_NEIGHBOURS)})",
        _neighbour,
        lambda rng: f"what comes {rng.choice(['after', 'before'])} {rng.choice(_NEIGHBOURS)}",
    ),
    _family(
        "translate",
        rf"(?:translate|how do you say) ({w.one_of(w.TRANSLATIONS)}) (?:into|in) ({w.one_of(w.LANGUAGES)})",
        _translate,
        lambda rng: rng.choice(["translate {} into {}", "how do you say {} in {}"]).format(
            rng.choice(list(w.TRANSLATIONS)), rng.choice(w.LANGUAGES)
        ),
    ),
    _family(
        "spell",
        rf"spell (?:the word )?({_WORD})( backwards)?",
        _spell,
        lambda rng: f"spell {rng.choice(['', 'the word '])}{rng.choice(w.LIST_WORDS)}{rng.choice(['', ' backwards'])}",
    ),
    _family(
        "order",
        rf"(?:what is|tell me) the ({w.one_of(ORDINALS)}) word in {_THREE}",
        _pick,
        lambda rng: f"{rng.choice(['what is', 'tell me'])} the {rng.choice(ORDINALS)} word in {_three(rng)}",
    ),
    _family("reverse", rf"reverse (?:the order )?{_THREE}", _reverse, lambda rng: f"reverse {_three(rng)}"),
    _family(
        "choose",
        rf"which word is ({w.one_of(w.SINGULAR_WITH_ARTICLE.values())}) {_THREE}",
        _choose,
        _sample_choose,
    ),
    _family(
        "repeat",
        rf"(?:say|repeat) ({w.one_of(REPEATABLE)}) ({w.one_of(REPEATS)}) times",
        lambda word, times: " ".join([word] * w.VALUE_OF[times]),
        lambda rng: f"{rng.choice(['say', 'repeat'])} {rng.choice(REPEATABLE)} {rng.choice(REPEATS)} times",
    ),
]
# How often each family is drawn, in the order of FAMILIES (the two arithmetic patterns share one sampler).
WEIGHTS = [1.5, 0, 1.2, 1, 1, 1, 1, 1.2, 1.2, 1.6, 1.6, 1.4, 1]


def solve(text: str) -> tuple[str, str] | None:
    """(family, the one right answer) of a request, or None if it is not one of these."""
    for form, apply in FORMS.items():
        base = text.removesuffix(f" {form}") if form else text
        if form and base == text:
            continue
        for family in FAMILIES:
            match = family.pattern.fullmatch(base)
            answer = family.solve(*match.groups()) if match else None
            if answer is not None and len(apply(answer).split()) <= MAX_ANSWER_WORDS:
                return family.name, apply(answer)
    return None


def sample(rng: Random) -> str:
    """Text of a random request."""
    while True:
        family = rng.choices(FAMILIES, WEIGHTS)[0]
        form = rng.choice(list(FORMS)) if rng.random() < 0.65 else ""
        text = f"{family.sample(rng)} {form}".strip()
        if solve(text) is not None:
            return text
