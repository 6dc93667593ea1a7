# SPDX-License-Identifier: Apache-2.0
"""Filters: an instruction is kept, or dropped for a reason that is counted.

A filter has a ``name`` and ``reason(instruction) -> str | None`` (None = keep). Reasons name the rule and not the
item, so that their counts mean something. Most filters look at the text, ``ResponseFilter`` at the answer. A filter
that is faster over many items offers ``reasons(instructions)`` too. A filter that remembers (duplicates) is resumed by
being shown the same items again in the same order, which ``text.TextStage`` does from the batches it has kept.

Here are the filters that look at one text by itself, and ``apply_filters``. Others: ``filters_content.py`` (markup,
language, refusals), ``filters_quality.py`` (rewards, teacher's score), ``deduplicate.py`` (near duplicates,
contamination).
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import regex

from nemo_rba.types import Instruction

URL = re.compile(r"https?://|www\.|\b\w+\.(?:com|org|net|io|edu|gov)\b", re.IGNORECASE)
MARKDOWN = re.compile(r"\*\*|__|\]\(|^\s*(?:#{1,6}|[-*+]|\d+[.)])\s", re.MULTILINE)
CODE = re.compile(r"`|</?\w+>|\w\(\)|[{};]\s*$", re.MULTILINE)


class Filter(Protocol):
    """What ``apply_filters`` asks for."""

    name: str

    def reason(self, instruction: Instruction) -> str | None:
        """Why to drop the instruction, or None to keep it."""


class LengthFilter:
    """Keeps texts of ``min_words`` to ``max_words`` words and at most ``max_characters`` characters."""

    name = "length"

    def __init__(self, *, min_words: int, max_words: int, max_characters: int):
        if not 1 <= min_words <= max_words or max_characters < 1:
            raise ValueError(f"LengthFilter: min_words={min_words}, max_words={max_words}, max_characters="
                             f"{max_characters}; expected 1 <= min_words <= max_words, max_characters > 0")  # fmt: skip
        self._min_words, self._max_words, self._max_characters = min_words, max_words, max_characters

    def reason(self, instruction: Instruction) -> str | None:
        """See ``Filter``."""
        num_words = len(instruction.text.split())
        if num_words == 0:
            return "empty or never ended"
        if num_words < self._min_words:
            return f"fewer than {self._min_words} words"
        if num_words > self._max_words:
            return f"more than {self._max_words} words"
        if len(instruction.text) > self._max_characters:
            return f"more than {self._max_characters} characters"
        return None


class CharacterFilter:
    """Keeps what can be spoken: letters, blanks and ``punctuation``; no code, markdown or URLs.

    Args:
        punctuation: the marks allowed, e.g. ``.,?!'"-:;``.
        digits: whether digits and other numbers are allowed; false for synthesizers that drop them (FastPitch).
        scripts: whose letters are allowed, by their Unicode names (UAX #24), e.g. ``[Latin]``, or ``[Han, Hiragana,
            Katakana]``; accents go with every script. ``[]`` lets any pass, for a synthesizer of many languages.

    Raises:
        ValueError: a script that Unicode does not have.
    """

    name = "characters"

    def __init__(self, *, punctuation: str, digits: bool, scripts: Sequence[str]):
        self._punctuation, self._digits = frozenset(punctuation), digits
        self._letter = _letter_of(scripts)

    def reason(self, instruction: Instruction) -> str | None:
        """See ``Filter``."""
        text = instruction.text
        for pattern, what in ((URL, "a URL"), (CODE, "code"), (MARKDOWN, "markdown")):
            if pattern.search(text):
                return f"has {what}"
        kinds = {character: unicodedata.category(character)[0] for character in text}
        if not self._digits and "N" in kinds.values():
            return "has digits"
        # L letters, M combining marks (accents, vowel signs), N numbers
        if any(kind in "LM" and not self._letter.match(character) for character, kind in kinds.items()):
            return "has letters of another script"
        speakable = (c in self._punctuation or c == " " or kind in "LMN" for c, kind in kinds.items())
        return None if all(speakable) else "has unspeakable characters"


def _letter_of(scripts: Sequence[str]) -> regex.Pattern:
    """A pattern of one letter or accent of the scripts; of any where there are none."""
    classes = "".join(f"\\p{{scx={script}}}" for script in (*scripts, "Inherited"))
    try:
        if isinstance(scripts, str) or not all(re.fullmatch(r"[A-Za-z_ ]+", script) for script in scripts):
            raise regex.error("not a list of names")
        return regex.compile(f"[{classes}]" if scripts else ".", regex.DOTALL)
    except regex.error as error:
        raise ValueError(f"CharacterFilter: scripts={scripts!r}; expected a list of Unicode's names of scripts, such "
                         "as Latin, Cyrillic, Han, or [] for any") from error  # fmt: skip


class RepetitionFilter:
    """Drops texts in which some run of ``ngram`` words occurs more than ``max_repeats`` times."""

    name = "repetition"

    def __init__(self, *, ngram: int, max_repeats: int):
        if ngram < 1 or max_repeats < 1:
            raise ValueError(f"RepetitionFilter: ngram={ngram}, max_repeats={max_repeats}; expected both at least 1")
        self._ngram, self._max_repeats = ngram, max_repeats

    def reason(self, instruction: Instruction) -> str | None:
        """See ``Filter``."""
        words = normalize_text(instruction.text).split()
        runs = Counter(tuple(words[i : i + self._ngram]) for i in range(len(words) - self._ngram + 1))
        if runs and max(runs.values()) > self._max_repeats:
            return f"repeats {self._ngram} words more than {self._max_repeats} times"
        return None


class DuplicateFilter:
    """Drops texts seen before, compared by ``normalize_text``. Has a memory: one instance per data set."""

    name = "duplicate"

    def __init__(self):
        self._seen: set[str] = set()

    def reason(self, instruction: Instruction) -> str | None:
        """See ``Filter``; remembers the text."""
        text = normalize_text(instruction.text)
        if text in self._seen:
            return "seen before"
        self._seen.add(text)
        return None


class ResponseFilter:
    """Drops answers that are empty, never ended, or have more than ``max_words`` words."""

    name = "response"

    def __init__(self, *, max_words: int):
        if max_words < 1:
            raise ValueError(f"ResponseFilter: max_words={max_words}; expected at least 1")
        self._max_words = max_words

    def reason(self, instruction: Instruction) -> str | None:
        """See ``Filter``."""
        num_words = len(instruction.response.split())
        if num_words == 0:
            return "empty or never ended"
        return f"more than {self._max_words} words" if num_words > self._max_words else None


class CallableFilter:
    """A domain's own check of the text: ``keep(text)`` says whether to keep it."""

    def __init__(self, *, name: str, keep: Callable[[str], bool]):
        self.name = name
        self._keep = keep

    def reason(self, instruction: Instruction) -> str | None:
        """See ``Filter``."""
        return None if self._keep(instruction.text) else "refused"


def in_order(**filters: Filter | None) -> list[Filter]:
    """Filters by name as a list, in the order written, without those that are None.

    For YAML: a list can only be replaced as a whole, but to names others are added, changed and switched off.
    """
    return [chosen for chosen in filters.values() if chosen is not None]


def apply_filters(
    instructions: Iterable[Instruction], filters: Sequence[Filter]
) -> tuple[list[Instruction], Counter, list[tuple[Instruction, str]]]:
    """Pass each instruction through the filters until one drops it.

    Filter by filter, not item by item, so that one with ``reasons(instructions) -> list[str | None]`` gets its batch at
    once; each filter still sees what the ones before it kept, in order.

    Returns:
        The kept ones in order, the counts by ``"<filter name>: <reason>"``, and the dropped ones with their reasons.
    """
    instructions = list(instructions)
    verdicts: dict[int, str] = {}  # place -> why it is dropped
    places = list(range(len(instructions)))
    for candidate in filters:
        reasons = _reasons(candidate, [instructions[place] for place in places])
        verdicts |= {p: f"{candidate.name}: {r}" for p, r in zip(places, reasons, strict=True) if r is not None}
        places = [place for place in places if place not in verdicts]
    dropped = [(instructions[place], verdicts[place]) for place in sorted(verdicts)]
    return [instructions[place] for place in places], Counter(reason for _, reason in dropped), dropped


def _reasons(candidate: Filter, instructions: Sequence[Instruction]) -> list[str | None]:
    """One reason or None for each, all at once where the filter can."""
    if not instructions:
        return []
    at_once = getattr(candidate, "reasons", None)
    return at_once(instructions) if at_once else [candidate.reason(instruction) for instruction in instructions]


def first_reason(instruction: Instruction, filters: Sequence[Filter]) -> str | None:
    """``"<filter name>: <reason>"`` of the first filter that drops the instruction, or None."""
    for candidate in filters:
        reason = candidate.reason(instruction)
        if reason is not None:
            return f"{candidate.name}: {reason}"
    return None


def normalize_text(text: str) -> str:
    """Lower case, without punctuation, single blanks: two texts that sound alike come out equal."""
    letters = "".join(c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in text.replace("'", ""))
    return " ".join(unicodedata.normalize("NFKC", letters).casefold().split())
