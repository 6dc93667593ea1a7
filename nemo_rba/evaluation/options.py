# SPDX-License-Identifier: Apache-2.0
"""Which option of a multiple-choice question does an answer choose? A few rules, from sure to less sure.

VoiceBench (arXiv 2410.17196, ``src/evaluator/mcq.py``) tries some 200 phrases around a letter in lower case, in the
order of a list, and draws a letter where none is found; MMLU-Pro's evaluators look for "answer is (X)" alone. In lower
case "the answer is a dog" chooses A: here a small letter counts only where something closes it off.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

from nemo_rba.rewards.text import normalize

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_OPEN = r"[\s*_\"'“‘`(\[{:=\\$-]*(?:(?:boxed|text|textbf|mathbf|mathrm)\{[\s(]*\\?)*"  # before a letter: **, (, \boxed{
_CLOSED = r"(?=[*_\"'”’`}\s]*(?:[.,:;!?)\]。，、：；]|\Z))"  # after a letter: punctuation, or the end
_ALONE = r"(?![A-Za-z0-9'’])"
_FILLERS = (
    r"(?:\s*\b(?:that|it|it['’]s|is|the|most|very|likely|probably|definitely|clearly|certainly|therefore|thus|indeed"
    r"|actually|simply|to be|correct|right|best|answer|one)\b)*"
)
_COPULA = r"(?:\b(?:is|was|be)\b|['’]s\b)"
_CHOOSES = (
    r"(?<!not )(?<!n['’]t )(?<!never )"
    r"\b(?:choose|chose|select|selected|pick|picked|go with|going with|go for|say|guess)\b"
)
_RIGHT = r"(?:the\s+)?(?:most\s+|only\s+)?(?:correct|right|best|appropriate|likely|suitable|answer)\b"
_CHINESE = r"答案\s*(?:应该|就)?(?:是|为|选)?\s*(?:选项)?|选(?:择|项)?"


def chosen_option(answer: str, options: Sequence[str]) -> str | None:
    """The letter of the option that an answer chooses, or None. The first rule that finds one decides:

    1. a letter that is said to be the answer: "the correct answer is (B)", "I would choose option b", "B is correct";
       the last one said;
    2. a letter that opens the answer, closed off: "B", "b) Paris", "**C.** Because ...";
    3. the text of an option, as whole words (``rewards.text.normalize``), if no other option's text is there; a text
       inside another's, "York" in "New York", does not count;
    4. a letter in brackets, bold or quotes, a capital that is no word, or a small letter after "is" or at the end, if
       no other letter is there: "so it must be (D)", "perhaps b".
    """
    said, opening, loose = _rules(len(options))
    found = [_letter(match) for match in said.finditer(answer)]
    if found:
        return found[-1]
    match = opening.match(answer)
    if match:
        return _letter(match)
    texts = _texts(answer, options)
    if texts:
        return texts[0] if len(texts) == 1 else None
    found = sorted({_letter(match) for match in loose.finditer(answer)})
    return found[0] if len(found) == 1 else None


def _texts(answer: str, options: Sequence[str]) -> list[str]:
    """Letters of the options whose text stands in the answer."""
    said = f" {normalize(answer)} "
    texts = {letter: f" {normalize(option)} " for letter, option in zip(LETTERS, options, strict=False)}
    found = {letter: text for letter, text in texts.items() if text.strip() and text in said}
    return [
        letter for letter, text in found.items() if not any(text in other and text != other for other in found.values())
    ]


def _letter(match: re.Match) -> str:
    return next(group for group in match.groups() if group).upper()


@lru_cache(maxsize=32)
def _rules(num_options: int) -> tuple[re.Pattern, re.Pattern, re.Pattern]:
    """Patterns of rules 1, 2 and 4; each match has one group that is not empty, the letter."""
    capitals = LETTERS[:num_options].replace("I", "")  # "I" is a word, and is treated as small letters are
    small = LETTERS[:num_options].lower() + ("I" if num_options > LETTERS.index("I") else "")
    letter = rf"(?:([{capitals}]){_ALONE}|([{small}]){_ALONE}{_CLOSED})"
    named = rf"(?i:\b(?:option|choice|letter))\b{_OPEN}([{capitals}{small}]){_ALONE}"
    either = rf"(?:\s*{named}|{_OPEN}{letter})"
    said = "|".join(
        (
            rf"(?i:\banswer\b[^.!?\n]{{0,80}}?(?:{_COPULA}|[:=])){_i(_FILLERS)}{either}",
            rf"{_i(_CHOOSES)}{_i(_FILLERS)}{either}",
            rf"\b([{capitals}])[*_\"'”’`)\]]*\s+(?i:(?:is|would be|must be|seems)\s+{_RIGHT})",
            rf"(?i:\b(?:option|choice))\s+{_OPEN}([{capitals}{small}])[*_\"'”’`)\]]*\s+(?i:(?:is|would be)\s+{_RIGHT})",
            rf"(?:{_CHINESE}){_OPEN}([{capitals}{small}]){_ALONE}",
        )
    )
    opening = rf"{_OPEN}(?:(?i:option|choice)\s+)?([{capitals}{small}]){_ALONE}{_CLOSED}"
    words = capitals[1:]  # "A" is a word where a sentence begins
    loose = "|".join(
        (
            rf"[(\[\"“‘'`{{]\s*([{capitals}{small}])\s*[)\]\"”’'`}}]",
            rf"\*\*\W{{0,2}}([{capitals}{small}])\b[^\w*]{{0,2}}(?:\*\*|\s)",
            rf"(?<![\w.'’])(?<!not )([{words}]){_ALONE}",
            rf"(?<![\w.'’])(?<!not )([{capitals}]){_ALONE}{_CLOSED}",
            rf"(?<=[a-z,] )(?<!not )([{capitals}]){_ALONE}",
            rf"(?<=\s)(?<!not )([{small}])(?=\W*\Z)",
            rf"(?i:{_COPULA}){_i(_FILLERS)}{either}",
        )
    )
    return re.compile(said), re.compile(opening), re.compile(loose)


def _i(pattern: str) -> str:
    return f"(?i:{pattern})"
