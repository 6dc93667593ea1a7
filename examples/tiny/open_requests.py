# SPDX-License-Identifier: Apache-2.0
"""Requests with many good answers: seven families, each judged by rule, never by one reference.

A family is a regular expression with named groups (the slots), a sampler of requests, a writer of candidate answers,
and a check. ``parse`` finds the slots from the words of the request alone.
"""

import re
from random import Random

from . import conversation
from . import words as w
from .family import OpenFamily, Slots, maybe
from .sentences import parse_sentence, write_sentence

# --- list: "name three animals without camel or tiger starting with monkey"


def _sample_list(rng: Random) -> str:
    category = rng.choice(list(w.CATEGORIES))
    first, *banned = rng.sample(w.CATEGORIES[category], 3)
    text = f"{rng.choice(['name', 'list'])} {rng.choice(w.NUMBERS[2:5])} {category}"
    draw = rng.random()
    if draw < 0.8:
        text += " without " + " or ".join(banned[: 2 if draw < 0.45 else 1])
    return text + (f" starting with {first}" if draw > 0.8 or rng.random() < 0.4 else "")


def _write_list(rng: Random, slots: Slots) -> str:
    allowed = [x for x in w.CATEGORIES[slots["category"]] if x not in (slots["ban"], slots["ban2"], slots["start"])]
    count = w.VALUE_OF[slots["count"]]
    picked = [slots["start"], *rng.sample(allowed, count - 1)] if slots["start"] else rng.sample(allowed, count)
    return f"{' , '.join(picked[:-1])} and {picked[-1]}"


def _check_list(slots: Slots, answer: str) -> bool:
    answer = answer.removesuffix(" .")
    if not re.fullmatch(r"\w+(?: , \w+)* and \w+", answer):
        return False
    items = [word for word in answer.split() if word not in (",", "and")]
    return (
        len(items) == w.VALUE_OF[slots["count"]] == len(set(items))
        and all(w.CATEGORY_OF.get(item) == slots["category"] for item in items)
        and not {slots["ban"], slots["ban2"]} & set(items)
        and slots["start"] in (None, items[0])
    )


# --- about, describe, sentence: one sentence of the small grammar in sentences.py, under constraints


def _sample_about(rng: Random) -> str:
    text = f"{rng.choice(['say', 'tell me'])} something about the {rng.choice(w.NOUNS)}"
    count = rng.randrange(4, 10)
    if rng.random() < 0.6:
        text += f" in {w.NUMBERS[count]} words at most"
    else:
        count = rng.choice([4, 6, 7, 9])
        text += f" in exactly {w.NUMBERS[count]} words"
    if rng.random() < 0.4 and count > 4:
        return f"{text} without the word {rng.choice(['is', 'near', 'and'])}"
    return text + maybe(rng, 0.6, f" starting with {rng.choice(w.SPOKEN_DETERMINERS)}")


def _sample_describe(rng: Random) -> str:
    noun, other = rng.sample(w.NOUNS, 2)
    start = rng.choice(w.SPOKEN_DETERMINERS)
    text = f"{rng.choice(['describe', 'picture'])} the {noun} in one sentence that starts with {start}"
    return text + maybe(rng, 0.8, f" and mentions the {other}")


def _sample_sentence(rng: Random) -> str:
    noun, other = rng.sample(w.NOUNS, 2)
    text = f"make a sentence with {noun} and {other}"
    text += maybe(rng, 0.6, f" in {w.NUMBERS[rng.randrange(6, 10)]} words at most")
    return text + maybe(rng, 0.6, f" starting with {rng.choice(w.SPOKEN_DETERMINERS)}")


def _write_about(rng: Random, slots: Slots) -> str:
    noun, place = slots["noun"], slots.get("other")
    if "pair" in slots and rng.random() < 0.5:
        noun, place = place, noun
    return write_sentence(rng, noun, slots.get("start"), place)


def _check_about(slots: Slots, answer: str) -> bool:
    sentence = parse_sentence(answer)
    if sentence is None:
        return False
    if "pair" in slots:
        nouns_fit = {sentence.noun, sentence.place} == {slots["noun"], slots["other"]}
    else:
        nouns_fit = sentence.noun == slots["noun"] and slots.get("other") in (None, sentence.place)
    most, exactly = slots.get("most"), slots.get("exactly")
    return (
        nouns_fit
        and slots.get("start") in (None, sentence.determiner)
        and (most is None or sentence.length <= w.VALUE_OF[most])
        and (exactly is None or sentence.length == w.VALUE_OF[exactly])
        and slots.get("ban") not in answer.split()
    )


_NOUN, _DET = w.one_of(w.NOUNS), w.one_of(w.SPOKEN_DETERMINERS)
_FEW = w.one_of(w.NUMBERS[4:10])
FAMILIES = [
    OpenFamily(
        "list",
        re.compile(
            rf"(?:name|list) (?P<count>two|three|four) (?P<category>{w.one_of(w.CATEGORIES)})"
            r"(?: without (?P<ban>\w+)(?: or (?P<ban2>\w+))?)?(?: starting with (?P<start>\w+))?"
        ),
        _sample_list,
        _write_list,
        _check_list,
    ),
    OpenFamily(
        "about",
        re.compile(
            rf"(?:say|tell me) something about the (?P<noun>{_NOUN}) in "
            rf"(?:(?P<most>{_FEW}) words at most|exactly (?P<exactly>four|six|seven|nine) words)"
            rf"(?: without the word (?P<ban>is|near|and)| starting with (?P<start>{_DET}))?"
        ),
        _sample_about,
        _write_about,
        _check_about,
    ),
    OpenFamily(
        "describe",
        re.compile(
            rf"(?:describe|picture) the (?P<noun>{_NOUN}) in one sentence that starts with (?P<start>{_DET})"
            rf"(?: and mentions the (?P<other>{_NOUN}))?"
        ),
        _sample_describe,
        _write_about,
        _check_about,
    ),
    OpenFamily(
        "sentence",
        re.compile(
            rf"make a (?P<pair>sentence) with (?P<noun>{_NOUN}) and (?P<other>{_NOUN})"
            rf"(?: in (?P<most>six|seven|eight|nine) words at most)?(?: starting with (?P<start>{_DET}))?"
        ),
        _sample_sentence,
        _write_about,
        _check_about,
    ),
]
FAMILIES += conversation.FAMILIES
WEIGHTS = [2, 1.5, 1.2, 2, *conversation.WEIGHTS]


_NO_SUCH_SENTENCE = [("seven", "near"), ("nine", "is"), ("nine", "near"), ("nine", "and")]


def _slots_make_sense(slots: Slots) -> bool:
    """False for requests that contradict themselves or that name a word outside their category."""
    if "category" in slots:
        named = [slots[key] for key in ("ban", "ban2", "start") if slots[key]]
        return len(set(named)) == len(named) and all(w.CATEGORY_OF.get(x) == slots["category"] for x in named)
    if "hero" in slots:
        return slots["hero"] != slots["friend"]
    if "exactly" in slots and (slots["exactly"], slots["ban"]) in _NO_SUCH_SENTENCE:
        return False
    return slots.get("noun") is None or slots.get("noun") != slots.get("other")


def parse(text: str) -> tuple[OpenFamily, Slots] | None:
    """The family and slots of a request, or None if it is not one of these."""
    for family in FAMILIES:
        if match := family.pattern.fullmatch(text):
            slots = match.groupdict()
            return (family, slots) if _slots_make_sense(slots) else None
    return None


def sample(rng: Random) -> str:
    """Text of a random request."""
    while True:
        text = rng.choices(FAMILIES, WEIGHTS)[0].sample(rng)
        if parse(text) is not None:
            return text
