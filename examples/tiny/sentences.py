# SPDX-License-Identifier: Apache-2.0
"""One-sentence answers: a small grammar, written at random and recognised by rule."""

from dataclasses import dataclass
from random import Random

from . import words as w


@dataclass(frozen=True)
class Sentence:
    """What the rules look at."""

    determiner: str
    noun: str
    place: str | None  # the noun after "near the"
    length: int  # in words


def write_sentence(rng: Random, noun: str, determiner: str | None = None, place: str | None = None) -> str:
    """A sentence about ``noun``; any of six shapes, three if it must mention ``place``."""
    determiner = determiner or rng.choice(w.DETERMINERS)
    adjective, adjective2 = rng.sample(w.ADJECTIVES[noun], 2)
    verb = rng.choice(w.VERBS[noun])
    somewhere = place or rng.choice([other for other in w.NOUNS if other != noun])
    shapes = [
        f"{noun} {verb} near the {somewhere}",
        f"{adjective} {noun} {verb} near the {somewhere}",
        f"{noun} is {adjective} and {verb} near the {somewhere}",
    ]
    if place is None:
        shapes += [f"{noun} is {adjective}", f"{noun} is {adjective} and {adjective2}", f"{adjective} {noun} {verb}"]
    return f"{determiner} {rng.choice(shapes)} ."


def parse_sentence(text: str) -> Sentence | None:
    """The parts of a sentence of this grammar, or None. ``text`` has its punctuation split off."""
    words = text.split()
    if len(words) < 5 or words[-1] != "." or words[0] not in w.DETERMINERS:
        return None
    determiner, words = words[0], words[1:-1]
    length, place = len(words) + 1, None
    if words[-3:-1] == ["near", "the"]:
        words, place = words[:-3], words[-1]
        if place not in w.NOUNS:
            return None
    noun = _noun_if_well_formed(words, has_place=place is not None)
    return Sentence(determiner, noun, place, length) if noun and noun != place else None


def _noun_if_well_formed(words: list[str], *, has_place: bool) -> str | None:
    match words:
        case [noun, verb] if noun in w.NOUNS:
            return noun if has_place and verb in w.VERBS[noun] else None
        case [noun, "is", adjective] if noun in w.NOUNS:
            return noun if not has_place and adjective in w.ADJECTIVES[noun] else None
        case [adjective, noun, verb] if noun in w.NOUNS:
            return noun if adjective in w.ADJECTIVES[noun] and verb in w.VERBS[noun] else None
        case [noun, "is", adjective, "and", last] if noun in w.NOUNS and adjective in w.ADJECTIVES[noun]:
            second = w.VERBS[noun] if has_place else [x for x in w.ADJECTIVES[noun] if x != adjective]
            return noun if last in second else None
    return None
