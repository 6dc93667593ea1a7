# SPDX-License-Identifier: Apache-2.0
"""Filters that read what a text holds: markup that no voice can say, its language, refusals.

Each looks at one field, ``text`` (what is spoken) or ``response`` (the answer). The rules of ``MarkupFilter`` are
narrower than those of ``filters.CharacterFilter`` and say what they found: with a spoken form behind them
(``spoken_form.py``), "3 + 4" and "$5" are fine, and "$x^2$" is not.
"""

import re
from collections.abc import Mapping, Sequence

from nemo_rba.language import language_identifier, num_letter_bytes
from nemo_rba.synthesis.filters import normalize_text
from nemo_rba.types import Instruction

FIELDS = ("text", "response")
HTML_TAGS = (
    "a|b|i|p|u|br|hr|h[1-6]|ul|ol|li|em|div|img|pre|sub|sup|svg|span|code|body|head|html|form|link|meta|nav|main|table"
    "|t[dhr]|thead|tbody|title|strong|script|style|input|label|button|header|footer|section|select|option|textarea"
)
# What a text must not hold -> how to see it. The first that matches is the reason, so the order is part of the rule:
# a fenced table is code, an address in a Markdown link is a URL.
MARKUP = {
    "code block": re.compile(r"```|~~~|^(?: {4}|\t)\S.*[;{}():=]\s*$", re.MULTILINE),
    "inline code": re.compile(r"`[^`\n]+`"),
    "HTML": re.compile(rf"</?(?:{HTML_TAGS})(?:\s[^<>]*)?/?>|<!--|<!DOCTYPE|&(?:nbsp|amp|lt|gt|quot|#\d+);", re.I),
    "e-mail address": re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+"),
    "URL": re.compile(
        r"\b(?:https?|ftp|file)://|\bwww\.|(?<![\w@.-])(?:[\w-]+\.)+(?:com|org|net|io|edu|gov|dev|ai)\b", re.I
    ),
    "LaTeX": re.compile(
        r"\$\$|\\[()\[\]]|\\(?:frac|sqrt|sum|int|prod|lim|left|right|begin|end|text|cdot|times|leq?|geq?|alpha|beta|pi|"
        r"theta|infty|mathbb|mathrm|partial|nabla|sin|cos|log)\b|\$[^$\n]*[\\^_=+{}][^$\n]*\$|\$[A-Za-z]\$|[A-Za-z0-9)]_\{"
    ),
    "formula": re.compile(
        "[∀-⋿]|[⁰-₎]"  # mathematical operators; superscripts and subscripts
        r"|\b[A-Za-z]\([A-Za-z]\)\s*=|[A-Za-z0-9)\]]\s?\^\s?[({A-Za-z0-9-]"  # f(x) =, x^2
        r"|(?<![\w<>=!])[A-Za-z0-9)]+\s=\s-?[A-Za-z0-9(]+|\b[A-Za-z]\d?=-?\w"  # x = 5, x=5
    ),
    "table": re.compile(r"^\s*\|.*\|\s*$|^\s*:?-{3,}:?\s*\||(?:[^|\n]*\|){3,}|^[^\t\n]+\t[^\t\n]+\t", re.MULTILINE),
    "code": re.compile(
        r"\b\w+(?:\.\w+)*\(\)|\b(?:def|function|fn|func)\s+\w+\s*\(|^\s*(?:import\s+[\w.]+\s+as|from\s+[\w.]+\s+import)\s"
        r"|#include\b|\bconsole\.log\b|\bprint\(|\bSELECT\b.+\bFROM\b|[{};]\s*$|(?<![=!])[!=]==?(?!=)|&&|\|\||[-=]>|::|\b\w+_\w+\b",
        re.MULTILINE,
    ),
    "file path": re.compile(r"(?:^|\s)(?:~|\.{0,2})/\w[\w.-]*(?:/[\w.-]+)+|\b[A-Za-z]:\\\w"),
    "heading": re.compile(r"^\s*#{1,6}\s+\S|^[^\n]+\n\s*(?:={3,}|-{3,})\s*$", re.MULTILINE),
    "list": re.compile(
        r"^\s*(?:[-*+•‣▪–]|\d{1,3}[.)]|\(?[a-z]\)|\(\d{1,3}\))\s+\S"  # at the start of a line
        r"|(?:^|\s)\(?1[.)]\s.+\s\(?2[.)]\s|(?:^|\s)\(?a\)\s.+\s\(?b\)\s",  # running on: 1) ... 2) ...
        re.MULTILINE | re.DOTALL,
    ),
    "Markdown": re.compile(
        r"\*\*\S|__\S|(?<![\w*])\*[^\s*][^*\n]*\*(?![\w*])|!?\[[^\]\n]*\]\(|^\s*>\s|^\s*(?:[-*_]\s?){3,}$", re.M
    ),
}  # fmt: skip

# What an answer says at its beginning instead of answering. Compared after ``normalize_text`` (no apostrophes), as
# whole words. The first group is of the kind that arXiv 2307.15043 matches; the second and third are what Magpie's
# sampled turns (arXiv 2406.08464) draw from a teacher, e.g. for "Summarize this article:".
REFUSALS = {
    "refuses": (
        "i cant assist", "i cannot assist", "i cant help with", "i cannot help with", "i cant help you",
        "i cannot help you", "i cant fulfill", "i cannot fulfill", "i cant provide", "i cannot provide",
        "i cant create", "i cannot create", "i cant write", "i cannot write", "i cant generate", "i cannot generate",
        "i cant comply", "i cannot comply", "i cant do that", "i cannot do that", "i cant discuss",
        "i cannot discuss", "i cant engage", "i cannot engage", "i cant support", "i cannot support", "i cant share",
        "i cannot share", "i cant answer", "i cannot answer", "im not able to", "i am not able to", "im unable to",
        "i am unable to", "i wont be able to", "i will not be able to", "i must decline", "i have to decline",
        "not something i can help",
    ),
    "speaks of itself as a machine": (
        "as an ai", "as a language model", "as a large language model", "as an artificial intelligence", "im an ai",
        "i am an ai", "im just an ai", "i am just an ai", "im a language model", "i am a language model",
        "im a large language model", "i am a large language model", "my training data", "my knowledge cutoff",
        "i dont have personal", "i do not have personal", "i dont have feelings", "i dont have access to real time",
        "i dont have real time", "i do not have real time",
    ),
    "asks for what was not given": (
        "you havent provided", "you have not provided", "you didnt provide", "you did not provide",
        "you havent included", "you forgot to", "please provide the", "please share the", "please paste",
        "please provide me with", "please provide more", "could you please provide", "can you please provide",
        "there is no text", "there is no attachment", "i dont see any", "i do not see any", "i dont see a",
        "no text provided", "your message was cut off", "your message got cut off",
        "your message seems to be incomplete",
    ),
}  # fmt: skip


class MarkupFilter:
    """Drops texts with markup: one reason for each kind of ``MARKUP``.

    Args:
        allow: kinds to let pass, e.g. ``["e-mail address", "formula"]`` where a spoken form reads them; [] for none.
        field: ``text`` (what is spoken) or ``response``.
    """

    name = "markup"

    def __init__(self, *, allow: Sequence[str], field: str):
        unknown = sorted(set(allow) - set(MARKUP))
        if unknown:
            raise ValueError(f"MarkupFilter: allow={unknown}; expected kinds from {', '.join(MARKUP)}")
        self._field = check_field(field, "MarkupFilter")
        self._kinds = tuple(kind for kind in MARKUP if kind not in allow)

    def reason(self, instruction: Instruction) -> str | None:
        """See ``Filter``."""
        text = getattr(instruction, self._field)
        return next((f"has {kind}" for kind in self._kinds if MARKUP[kind].search(text)), None)


class LanguageFilter:
    """Keeps texts of the given languages, by py3langid: the naive Bayes model of langid.py (ACL 2012, P12-3005).

    Its model of about a hundred languages comes inside the package, so that nothing is downloaded. A few words decide
    little: short texts are kept unjudged, and telling apart a dozen likely languages is safer than all hundred.

    Args:
        languages: codes to keep, e.g. ``[en]`` (ISO 639-1).
        min_probability: of the text being in one of ``languages``, among ``candidates``.
        min_bytes: texts whose letters have fewer bytes in UTF-8 are kept; a Latin letter has one, a Chinese one three.
        candidates: the languages to tell apart, ``languages`` among them; empty = all that py3langid knows.
        field: ``text`` (what is spoken) or ``response``.

    Raises:
        ValueError: settings out of range, or a code that py3langid does not know.
        ImportError: py3langid is missing.
    """

    name = "language"

    def __init__(self, *, languages: Sequence[str], min_probability: float, min_bytes: int, candidates: Sequence[str],
                 field: str):  # fmt: skip
        if isinstance(languages, str) or not languages or (candidates and not set(languages) < set(candidates)):
            raise ValueError(f"LanguageFilter: languages={list(languages)}, candidates={list(candidates)}; expected at "
                             "least one language, and candidates that hold them all and others, or none")  # fmt: skip
        if not 0 < min_probability < 1 or min_bytes < 0:
            raise ValueError(f"LanguageFilter: min_probability={min_probability}, min_bytes={min_bytes}; expected "
                             "0 < min_probability < 1 and min_bytes at least 0")  # fmt: skip
        self._languages, self._candidates = frozenset(languages), tuple(sorted(set(candidates)))
        self._min_probability, self._min_bytes = min_probability, min_bytes
        self._field = check_field(field, "LanguageFilter")
        _, known = language_identifier(self._candidates)
        if not self._languages <= known:
            raise ValueError(f"LanguageFilter: py3langid does not know {sorted(self._languages - known)} of languages; "
                             "expected ISO 639-1 codes such as en, de, zh")  # fmt: skip

    def reason(self, instruction: Instruction) -> str | None:
        """See ``Filter``."""
        text = getattr(instruction, self._field)
        if num_letter_bytes(text) < self._min_bytes:
            return None
        identifier, _ = language_identifier(self._candidates)
        ranked = identifier.rank(text)
        if sum(float(p) for code, p in ranked if code in self._languages) >= self._min_probability:
            return None
        likeliest = ranked[0][0]
        return "no language stands out" if likeliest in self._languages else f"is in another language ({likeliest})"


class RefusalFilter:
    """Drops answers that begin by refusing, by talking of the speaker as a machine, or by asking for what is missing.

    Args:
        first_words: how much of the answer is the beginning; a later "I cannot" may be part of a good answer.
        phrases: reason -> phrases, e.g. for another language; None = ``REFUSALS``.
    """

    name, field = "refusal", "response"

    def __init__(self, *, first_words: int, phrases: Mapping[str, Sequence[str]] | None):
        if first_words < 1:
            raise ValueError(f"RefusalFilter: first_words={first_words}; expected at least 1")
        groups = REFUSALS if phrases is None else phrases
        self._phrases = {reason: [f" {_plain(phrase)} " for phrase in group] for reason, group in groups.items()}
        if not groups or any(not group or "  " in group for group in self._phrases.values()):
            raise ValueError(f"RefusalFilter: phrases={phrases}; expected phrases with words under every reason")
        self._first_words = first_words

    def reason(self, instruction: Instruction) -> str | None:
        """See ``Filter``."""
        words = _plain(getattr(instruction, self.field)).split()
        beginning = f" {' '.join(words[: self._first_words])} "
        found = (reason for reason, group in self._phrases.items() if any(phrase in beginning for phrase in group))
        return next(found, None)


class InstructionRefusalFilter(RefusalFilter):
    """Drops instructions that begin so: a teacher that wrote its own words into the user's turn."""

    name, field = "refusal in the instruction", "text"


def check_field(field: str, owner: str) -> str:
    """``field`` if instructions have a text of that name that filters may look at; else ValueError."""
    if field not in FIELDS:
        raise ValueError(f"{owner}: field={field!r}; expected one of {', '.join(FIELDS)}")
    return field


def _plain(text: str) -> str:
    return normalize_text(text.replace("’", "'"))  # teachers write both apostrophes
