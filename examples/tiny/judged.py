# SPDX-License-Identifier: Apache-2.0
"""Answers that the domain's verifier has sorted into right and wrong ones: what the reward model is trained on.

The verifier stands for a person who is asked which of two answers is better, and judges training requests only. A
student who listens badly answers another request than the one it got, or gets its own answer wrong; so the answers are
the teacher's, at several temperatures, the teacher's to what somebody understood who misheard, right ones with a slip,
and right ones to another request. Wrong ones are as often too long as too short: length alone tells nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from random import Random

from . import chat, closed, domain
from . import words as w
from .tokenizer import PUNCTUATION, ROLES, SPECIALS

TEMPERATURES = (0.7, 1.0, 1.5, 2.0)  # of the teacher who reads the request: one answer, at one of them
MISUNDERSTOOD, SLIPS = 3, 4  # right answers to another request that may be heard; slips in a right answer

ALIKE = (  # words that may stand in each other's place
    w.NUMBERS, w.LIST_WORDS, w.NOUNS, tuple(w.CATEGORIES), tuple(w.CAPITALS), tuple(w.CAPITALS.values()), w.DAYS,
    w.MONTHS, tuple(w.OPPOSITES), w.LANGUAGES, closed.ORDINALS, closed.REPEATABLE, w.DETERMINERS, w.ENDINGS, w.DEEDS,
    w.MEETINGS, tuple("abcdefghijklmnopqrstuvwxyz"), tuple(chain(*w.ADJECTIVES.values())),
    tuple(chain(*w.VERBS.values())),
    ("plus", "minus"), ("after", "before"), ("bigger", "smaller"), ("politely", "warmly", "twice"),
    ("morning", "evening", "midnight"), ("teacher", "doctor", "captain", "cousin"), (".", ",", "?"),
)  # fmt: skip


@dataclass(frozen=True)
class Judged:
    """Answers to one request, none of them twice, as the verifier sorts them."""

    instruction: str
    right: tuple[str, ...]
    wrong: tuple[str, ...]

    @classmethod
    def sort(cls, instruction: str, answers: Sequence[str]) -> "Judged":
        """By ``domain.verify``."""
        distinct = list(dict.fromkeys(answers))
        marks = [domain.verify(instruction, answer) == 1.0 for answer in distinct]
        sides = [tuple(a for a, m in zip(distinct, marks, strict=True) if m is mark) for mark in (True, False)]
        return cls(instruction, *sides)

    def width(self) -> int:
        """Words of everything."""
        return sum(len(text.split()) for text in (self.instruction, *self.right, *self.wrong))


def are_alike(word: str, other: str) -> bool:
    """Two words of one kind."""
    return word != other and any(word in group and other in group for group in ALIKE)


def mistake(rng: Random, word: str, words: Sequence[str]) -> str:
    """A word taken for another: mostly for one of its kind, where it has one."""
    alike = [other for group in ALIKE if word in group for other in group if other != word]
    return rng.choice(alike if alike and rng.random() < 0.85 else words)


def mishear(rng: Random, text: str, words: Sequence[str]) -> str:
    """A request as a bad listener understands it: its end lost, a word lost, or one or two mistaken."""
    heard, draw = text.split(), rng.random()
    place = rng.randrange(1, len(heard))
    if draw < 0.15:
        return " ".join(heard[:place])
    if draw < 0.3:
        return " ".join(heard[:place] + heard[place + 1 :])
    telling = [i for i, word in enumerate(heard) if any(word in group for group in ALIKE)] or [place]
    for _ in range(rng.choice((1, 1, 2))):
        place = rng.choice(telling)
        heard[place] = mistake(rng, heard[place], words)
    return " ".join(heard)


def slip(rng: Random, request: str, answer: str, words: Sequence[str]) -> str:
    """An answer with one thing amiss: a word lost, said twice, mistaken or misplaced; cut off, or gone on with.

    And, what a student does most: a word of the answer or of the request in the place of another ("the rabbit runs near
    the rabbit", "cherry lemon cherry").
    """
    said = domain.split_words(answer)
    place, other = rng.randrange(len(said)), rng.randrange(len(said))
    known = sorted({*said, *request.split()})
    echoes = [(i, word) for i, mine in enumerate(said) for word in known if are_alike(mine, word)]
    match rng.choice(("lost", "twice", "mistaken", "misplaced", "cut off", "gone on", *["echoed"] * 4)):
        case "lost":
            del said[place]
        case "twice":
            said.insert(place, said[place])
        case "misplaced":
            said[place], said[other] = said[other], said[place]
        case "cut off":
            said = said[:place]
        case "gone on":
            said += said[place:]
        case "echoed" if echoes:
            place, word = rng.choice(echoes)
            said[place] = word
        case _:
            said[place] = mistake(rng, said[place], words)
    return domain.join_words(" ".join(said))


def misunderstand(rng: Random, text: str, words: Sequence[str]) -> str:
    """Another request that one may hear in its place."""
    while True:
        heard = mishear(rng, text, words)
        if heard != text and domain.parse(heard) is not None:
            return heard


def draw_judged(llm, tokenizer, count: int, rng: Random, split: str) -> list[Judged]:
    """Requests of a split with judged answers of every kind; those without a wrong one are left out."""
    words = sorted(set(tokenizer.get_vocab()) - {*SPECIALS, *ROLES, *PUNCTUATION})
    items = [domain.sample_split(rng, split) for _ in range(count)]
    texts, right = [item.instruction for item in items], [item.reference for item in items]
    answers = [right, right[1:] + right[:1]]
    answers += [
        [slip(rng, text, answer, words) for text, answer in zip(texts, right, strict=True)] for _ in range(SLIPS)
    ]
    for _ in range(MISUNDERSTOOD):
        answers.append([domain.reference_answer(rng, misunderstand(rng, text, words)) for text in texts])
    answers.append(chat.answer(llm, tokenizer, [mishear(rng, text, words) for text in texts], temperature=1.0))
    sampled = [""] * count
    for first, temperature in enumerate(TEMPERATURES):
        asked = slice(first, None, len(TEMPERATURES))
        sampled[asked] = chat.answer(llm, tokenizer, texts[asked], temperature=temperature)
    judged = [Judged.sort(text, row) for text, *row in zip(texts, *answers, sampled, strict=True)]
    return [found for found in judged if found.right and found.wrong]
