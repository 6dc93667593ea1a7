# SPDX-License-Identifier: Apache-2.0
"""Open requests of several sentences or in conversation: short stories, greetings, invitations."""

import re
from random import Random

from . import words as w
from .family import OpenFamily, Slots, maybe

# --- story


def _sample_story(rng: Random) -> str:
    hero, friend = rng.sample(w.ANIMALS, 2)
    text = f"{rng.choice(['tell', 'tell me'])} a short story about {hero} and {friend}"
    text += maybe(rng, 0.5, f" near the {rng.choice(w.PLACES)}")
    return text + maybe(rng, 0.7, f" that ends with the word {rng.choice(w.ENDINGS)}")


def _write_story(rng: Random, slots: Slots) -> str:
    pair = [slots["hero"], slots["friend"]]
    rng.shuffle(pair)
    first, second = (f"{rng.choice(['', rng.choice(w.ADJECTIVES[x]) + ' '])}{x}" for x in pair)
    where = f"near the {slots['place'] or rng.choice(w.PLACES)}" if slots["place"] or rng.random() < 0.5 else "together"
    return (
        f"{rng.choice(w.STORY_OPENINGS)} the {first} {rng.choice(w.MEETINGS)} the {second} . "
        f"they {rng.choice(w.DEEDS)} {where} . "
        f"it was a {rng.choice(w.ENDING_ADJECTIVES)} {slots['end'] or rng.choice(w.ENDINGS)} ."
    )


_STORY = re.compile(
    rf"{w.one_of(w.STORY_OPENINGS)} the (?:(\w+) )?({w.one_of(w.ANIMALS)}) {w.one_of(w.MEETINGS)} "
    rf"the (?:(\w+) )?({w.one_of(w.ANIMALS)}) \. "
    rf"they {w.one_of(w.DEEDS)} (?:together|near the ({w.one_of(w.PLACES)})) \. "
    rf"it was a {w.one_of(w.ENDING_ADJECTIVES)} ({w.one_of(w.ENDINGS)}) \."
)


def _check_story(slots: Slots, answer: str) -> bool:
    match = _STORY.fullmatch(answer)
    if match is None:
        return False
    adjective, animal, adjective2, animal2, place, end = match.groups()
    return (
        {animal, animal2} == {slots["hero"], slots["friend"]}
        and (adjective is None or adjective in w.ADJECTIVES[animal])
        and (adjective2 is None or adjective2 in w.ADJECTIVES[animal2])
        and slots["place"] in (None, place)
        and slots["end"] in (None, end)
    )


# --- greet and invite


def _sample_greet(rng: Random) -> str:
    text = f"greet {rng.choice(list(w.PEOPLE))} {rng.choice(['politely', 'warmly'])}"
    text += maybe(rng, 0.7, f" {rng.choice(list(w.GREETING_AT))}")
    return text + maybe(rng, 0.8, f" and ask about the {rng.choice(w.NOUNS)}")


def _address(slots: Slots) -> list[str]:
    prefix = "my dear " if slots.get("manner") == "warmly" else ""
    return [prefix + name for name in w.PEOPLE[slots["person"]]]


_PLEASANTRIES = ("it is lovely to see you .", "i am happy to see you .")


def _questions(noun: str | None) -> list[str]:
    return [f"how is the {noun} ?", f"is the {noun} well ?", f"please tell me about the {noun} ."] if noun else [""]


def _greetings(slots: Slots) -> tuple[str, ...]:
    return (w.GREETING_AT[slots["time"]],) if slots["time"] else w.GREETINGS


def _write_greet(rng: Random, slots: Slots) -> str:
    pleasantry, question = rng.choice(["", *_PLEASANTRIES]), rng.choice(_questions(slots["noun"]))
    text = f"{rng.choice(_greetings(slots))} , {rng.choice(_address(slots))} . {pleasantry} {question}"
    return " ".join(text.split())


def _check_greet(slots: Slots, answer: str) -> bool:
    rest = next((x for x in _greetings(slots) if answer.startswith(f"{x} , ")), None)
    name = next((x for x in _address(slots) if rest and answer.startswith(f"{rest} , {x} .")), None)
    if name is None:
        return False
    tail = answer.removeprefix(f"{rest} , {name} .").strip()
    for pleasantry in _PLEASANTRIES:
        tail = tail.removeprefix(pleasantry).strip()
    return tail in _questions(slots["noun"])


def _sample_invite(rng: Random) -> str:
    text = f"invite {rng.choice(list(w.PEOPLE))} somewhere on {rng.choice(w.DAYS)}"
    text += maybe(rng, 0.5, " with a question")
    return text + maybe(rng, 0.8, f" and mention the {rng.choice(w.PLACES)}")


_INVITATIONS = {  # opening -> its closing mark
    "shall we": "?", "would you like to": "?", "please": ".", "let us": ".", "i hope you can": ".",
}  # fmt: skip
_OUTINGS = ("visit the", "walk near the", "sing near the", "play near the")


def _write_invite(rng: Random, slots: Slots) -> str:
    opening = rng.choice([x for x, mark in _INVITATIONS.items() if mark == "?" or not slots["question"]])
    place = slots["noun"] or rng.choice(w.PLACES)
    text = f"{opening} {rng.choice(_OUTINGS)} {place} on {slots['day']} {_INVITATIONS[opening]}"
    return f"{rng.choice(_address(slots))} , {text}"


def _check_invite(slots: Slots, answer: str) -> bool:
    pattern = rf"({w.one_of(_address(slots))}) , ({w.one_of(_INVITATIONS)}) {w.one_of(_OUTINGS)} (\w+) on (\w+) ([.?])"
    match = re.fullmatch(pattern, answer)
    if match is None:
        return False
    _, opening, place, day, mark = match.groups()
    return (
        place in w.PLACES
        and slots["noun"] in (None, place)
        and day == slots["day"]
        and mark == _INVITATIONS[opening]
        and (mark == "?" or not slots["question"])
    )


_PERSON = w.one_of(w.PEOPLE)
FAMILIES = [
    OpenFamily(
        "story",
        re.compile(
            rf"tell (?:me )?a short story about (?P<hero>{w.one_of(w.ANIMALS)}) and (?P<friend>{w.one_of(w.ANIMALS)})"
            rf"(?: near the (?P<place>{w.one_of(w.PLACES)}))?"
            rf"(?: that ends with the word (?P<end>{w.one_of(w.ENDINGS)}))?"
        ),
        _sample_story,
        _write_story,
        _check_story,
    ),
    OpenFamily(
        "greet",
        re.compile(
            rf"greet (?P<person>{_PERSON}) (?P<manner>politely|warmly)(?: (?P<time>{w.one_of(w.GREETING_AT)}))?"
            rf"(?: and ask about the (?P<noun>{w.one_of(w.NOUNS)}))?"
        ),
        _sample_greet,
        _write_greet,
        _check_greet,
    ),
    OpenFamily(
        "invite",
        re.compile(
            rf"invite (?P<person>{_PERSON}) somewhere on (?P<day>{w.one_of(w.DAYS)})(?P<question> with a question)?"
            rf"(?: and mention the (?P<noun>{w.one_of(w.PLACES)}))?"
        ),
        _sample_invite,
        _write_invite,
        _check_invite,
    ),
]
WEIGHTS = [1.8, 1, 1]
