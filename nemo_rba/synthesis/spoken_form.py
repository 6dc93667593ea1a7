# SPDX-License-Identifier: Apache-2.0
"""The spoken form: numbers, dates, units, symbols and abbreviations in the words in which one says them.

A synthesizer is given the spoken form, the teacher who answers keeps the typed one ("What is 3 + 4?" is read, "what is
three plus four" is heard). A spoken form that still holds what cannot be said is refused with a reason that can be
counted, like a filter's. Two ways to make it: NeMo's grammars (``NeMoTextNormalizer``: exact, a dozen languages) and
the teacher (``TeacherRewrite``: every language it writes, checked word by word).
"""

import logging
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, Protocol

from nemo_rba.functional import user_prompt
from nemo_rba.protocols import Teacher
from nemo_rba.types import SamplingParams

PROMPT_VERSION = "spoken-form-1"  # goes up with every change of PROMPT
PROMPT = (
    "Write the message below the way a person would say it aloud. Put numbers, dates, times, amounts, units, symbols "
    "and abbreviations into words. Keep all other words and their order. Do not answer the message and do not explain. "
    "Write only the result.\n\nMessage: {text}"
)
MAX_WORDS_PER_SYMBOL = 14  # words one number, date or symbol may become: "1,234,567.89" takes thirteen
_ABBREVIATION = re.compile(
    r"\b(?:[^\W\d_]\.){2,}"  # e.g., p.m., U.S.
    r"|\b(?:Dr|Mrs?|Ms|Prof|St|Jr|Sr|Gov|Gen|Capt|Lt|Sgt|Rev|Inc|Ltd|Corp|Ave|Blvd|Rd|No|vs|etc|approx|Jan|Feb|Mar|Apr"
    r"|Jun|Jul|Aug|Sept?|Oct|Nov|Dec|Mon|Tues?|Wed|Thu|Fri|Sat|Sun)\."
    r"|\b[^\W\d_]{1,6}\.(?=\s+[a-z])"  # a point that ends no sentence
)
_PLAIN = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")  # a word without digits and symbols


class Spoken(NamedTuple):
    """A spoken form, or why there is none."""

    text: str  # the spoken form; what was tried, where there is a reason
    reason: str | None  # None = can be spoken


class SpokenForm(Protocol):
    """Turns typed texts into words; deterministic, or kept by its caller."""

    def __call__(self, texts: Sequence[str]) -> list[Spoken]:
        """One result for each text, in order."""


class NeMoTextNormalizer:
    """NeMo's text normalization for TTS: weighted finite-state grammars (arXiv 2104.05055).

    nemo_text_processing comes with ``nemo_toolkit[tts]`` on Linux x86-64. Compiling the English grammars takes a minute
    or two, reading them from ``cache_folder`` a few seconds; they are compiled aside and moved into place, so that an
    interruption leaves no half of one; not before the first text that needs them comes.

    Args:
        language: of the texts: ``en``, ``de``, ``es``, ``fr``, ``it``, ... as nemo_text_processing has them.
        cache_folder: where compiled grammars are kept; "" compiles them anew in every process.
        punctuation: the marks that the synthesizer takes, as ``filters.CharacterFilter``; anything else that the
            grammars leave is a reason.

    Raises:
        ValueError: an unknown language (when the first text comes).
        ImportError: nemo_text_processing is missing (when the first text comes).
    """

    def __init__(self, *, language: str, cache_folder: str, punctuation: str):
        self._language, self._cache, self._punctuation = language, cache_folder, punctuation
        self._normalizer = None

    def __deepcopy__(self, memo: dict) -> "NeMoTextNormalizer":
        """Itself: grammars do not change and cannot be copied."""
        return self

    def __call__(self, texts: Sequence[str]) -> list[Spoken]:
        """See ``SpokenForm``. Texts that can be spoken as they are come back as they are."""
        results = []
        for text in texts:
            text = " ".join(text.split())
            if unspeakable(text, self._punctuation) is not None or _ABBREVIATION.search(text):
                if self._normalizer is None:
                    self._normalizer = self._load()
                    logging.getLogger("NeMo-text-processing").setLevel(logging.WARNING)  # it tells of every text
                text = self._normalizer.normalize(text, verbose=False, punct_post_process=True)
                text = re.sub(r"approximately(?=\w)", "approximately ", text)  # 1.2.0 says "approximatelyfive" for "~5"
                text = " ".join(text.split())
            results.append(Spoken(text, unspeakable(text, self._punctuation)))
        return results

    def _load(self):
        try:
            from nemo_text_processing.text_normalization.normalize import Normalizer
        except ImportError as error:
            raise ImportError(
                "NeMoTextNormalizer needs nemo_text_processing (Linux x86-64): pip install nemo_text_processing; "
                "elsewhere choose spoken_form.TeacherRewrite"
            ) from error
        arguments = {"input_case": "cased", "lang": self._language}
        try:
            if not self._cache:
                return Normalizer(**arguments)
            folder = Path(self._cache) / f"{self._language}-{version('nemo_text_processing')}"
            if not folder.is_dir():
                _compile_aside(Normalizer, arguments, folder)
            return Normalizer(**arguments, cache_dir=str(folder))
        except NotImplementedError as error:
            raise ValueError(f"NeMoTextNormalizer: language={self._language!r} is unknown to nemo_text_processing; "
                             "expected en, de, es, fr, it, zh, ...") from error  # fmt: skip


class TeacherRewrite:
    """The teacher writes the spoken form, greedily; every rewrite is checked and a doubtful one refused.

    Texts that can be spoken as they are are not shown to the teacher. Of the others the rewrite must hold no digits and
    no symbols, must keep the plain words in their order, and must not add more than numbers and symbols can become, so
    that a teacher who answers the message instead of rewriting it is found. Whether the words name the *same* number is
    not checked. What a teacher wrote must be kept by the caller, for a resumed run.

    Args:
        teacher: who writes.
        punctuation: the marks that the synthesizer takes, as ``filters.CharacterFilter``.
        min_kept: the least share of the plain words to find again, in order; in (0, 1].
        max_new_tokens: room for a rewrite.
    """

    prompt_version = PROMPT_VERSION

    def __init__(self, *, teacher: Teacher, punctuation: str, min_kept: float, max_new_tokens: int):
        if not 0 < min_kept <= 1 or max_new_tokens < 1:
            raise ValueError(f"TeacherRewrite: min_kept={min_kept}, max_new_tokens={max_new_tokens}; expected "
                             "0 < min_kept <= 1 and max_new_tokens at least 1")  # fmt: skip
        self._teacher, self._punctuation, self._min_kept = teacher, punctuation, min_kept
        self._params = SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0)

    def __deepcopy__(self, memo: dict) -> "TeacherRewrite":
        """Itself: there is no memory, and the teacher must not be copied."""
        return self

    def __call__(self, texts: Sequence[str]) -> list[Spoken]:
        """See ``SpokenForm``."""
        texts = [" ".join(text.split()) for text in texts]
        asked = [n for n, t in enumerate(texts) if unspeakable(t, self._punctuation) or _ABBREVIATION.search(t)]
        results = [Spoken(text, None) for text in texts]
        prompts = [user_prompt(self._teacher, PROMPT.format(text=texts[n])) for n in asked]
        rewrites = self._teacher.generate(prompts, self._params) if asked else []
        for n, rewrite in zip(asked, rewrites, strict=True):
            rewrite = " ".join(rewrite.strip().strip('"“”').split())
            results[n] = Spoken(rewrite, self._doubt(texts[n], rewrite))
        return results

    def _doubt(self, text: str, rewrite: str) -> str | None:
        """Why not to trust a rewrite, or None."""
        if not rewrite:
            return "the rewrite is empty or never ended"
        left = unspeakable(rewrite, self._punctuation)
        if left is not None:
            return left
        plain, num_symbols = _plain_words(text)
        said = [word.casefold() for word in _PLAIN.findall(rewrite)]
        kept = _common_length(plain, said)
        if kept < self._min_kept * len(plain):
            return "the rewrite lost words"
        return "the rewrite added words" if len(said) - kept > MAX_WORDS_PER_SYMBOL * num_symbols else None


def unspeakable(text: str, punctuation: str) -> str | None:
    """What of a text cannot be said, as a reason, or None: digits, or symbols other than ``punctuation``."""
    if any(unicodedata.category(character)[0] == "N" for character in text):
        return "has digits left"
    is_said = [c in punctuation or c == " " or unicodedata.category(c)[0] in "LM" for c in text]
    return None if all(is_said) else "has symbols left"


def _plain_words(text: str) -> tuple[list[str], int]:
    """The words that a spoken form keeps, casefolded, and how many pieces it may put into other words.

    Not kept as they are: pieces with digits or symbols, what follows a number (a unit: "5 kg"), abbreviations and
    words in capitals.
    """
    plain, num_symbols, after_number = [], 0, False
    shortened = {place for found in _ABBREVIATION.finditer(text) for place in range(*found.span())}
    for piece in re.finditer(r"\S+", text):
        core = piece[0].strip(".,?!:;'\"()“”‘’")
        is_unit = after_number and len(core) < 4
        is_acronym = core.isupper() and len(core) > 1
        if not _PLAIN.fullmatch(core) or is_unit or is_acronym or not shortened.isdisjoint(range(*piece.span())):
            num_symbols += 1
        else:
            plain.append(core.casefold())
        after_number = re.search(r"\d$", core) is not None
    return plain, num_symbols


def _common_length(words: Sequence[str], others: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(others) + 1)
    for word in words:
        before = 0
        for place, other in enumerate(others, start=1):
            before, row[place] = row[place], before + 1 if word == other else max(row[place], row[place - 1])
    return row[-1]


def _compile_aside(normalizer, arguments: dict, folder: Path) -> None:
    """Compile grammars beside ``folder`` and move them into place; another process may have been faster."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        normalizer(**arguments, cache_dir=str(temporary))
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
