# SPDX-License-Identifier: Apache-2.0
"""Which option of a multiple-choice question does an answer choose? A few rules, from sure to less sure.

VoiceBench (arXiv 2410.17196, ``src/evaluator/mcq.py``) tries some 200 phrases around a letter in lower case, in the
order of a list, and draws a letter where none is found; MMLU-Pro's evaluators look for "answer is (X)" alone. In lower
case "the answer is a dog" chooses A: here a small letter counts only where something closes it off. There "not B" and
"A or B" choose too; here a letter that is rejected is as if it were not there, and one of two is none.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from nemo_rba.rewards.text import normalize

_NOT_TEXT = r" (?:not|n t|isn t|never|neither|nor|except|cannot be) (?:a |an |the )?"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_OPEN = r"[\s*_\"'“‘`(\[{:=\\$-]*(?:(?:boxed|text|textbf|mathbf|mathrm)\{[\s(]*\\?)*"  # before a letter: **, (, \boxed{
_CLOSED = r"(?=[*_\"'”’`}\s]*(?:[.,:;!?)\]。，、：；]|\Z))"  # after a letter: punctuation, or the end
_ALONE = r"(?![A-Za-z0-9'’])"
_FILLERS = (
    r"(?:\s*\b(?:that|it|it['’]s|is|the|most|very|likely|probably|definitely|clearly|certainly|therefore|thus|indeed"
    r"|actually|simply|to be|correct|right|best|answer|one)\b)*"
)
_COPULA = r"(?:\b(?:is|was|be)\b|['’]s\b)"
_CHOOSES = r"\b(?:choose|chose|select|selected|pick|picked|go with|going with|go for|say|guess)\b"
_CORRECTS = r"\b(?:no|wait|sorry|actually|correction|i mean|or rather|on second thought)\b[\s,.!:;-]*"
_NEGATES = (
    r"(?:\b(?:not|never|neither|nor|except|cannot|rule out|ruling out|eliminate|exclude)\b|n['’]t\b)"
    r"(?:\s+(?:be|have|choose|select|pick|say|go with|go for|think|necessarily|is|it|it['’]s|the|answer|correct|right)"
    r")*"
)
_WRONG = (
    r"\s+(?:(?:is|are|was|were|can|could|would|does|do)(?:n['’]t\b|\s*not\b)"
    r"|(?:is|are|was|were|would be|must be|seems?)\s+(?:(?:both|all|also|clearly|obviously|definitely|simply)\s+)?"
    r"(?:not|wrong|incorrect|false|out|ruled out)\b)"
)
_NOUN = r"(?:option|choice|letter|sentence)"
_SHUT = r"[)\]*_\"'”’`.]*"  # after a letter
_FOLLOWS = r"(?:has|uses|follows)\s+(?:the|a)\s+(?:\w+\s+)?(?:correct|right|proper|typical|standard|usual)\b"
_RIGHT = r"(?:the\s+)?(?:most\s+|only\s+)?(?:correct|right|best|appropriate|likely|suitable|answer)\b"
_CHINESE = r"答案\s*(?:应该|就)?(?:是|为|选)?\s*(?:选项)?|选(?:择|项)?"


def chosen_option(answer: str, options: Sequence[str]) -> str | None:
    """The letter of the option that an answer chooses, or None. The first rule that finds one decides:

    1. a letter that is said to be the answer: "the correct answer is (B)", "I would choose option b", "B is correct",
       "no wait, B"; the last one said, unless it is one of two: "the answer could be A or B";
    2. a letter that opens the answer, closed off: "B", "b) Paris", "**C.** Because ..."; none, if another option is
       listed after it: "A. Paris or B. Rome?";
    3. the text of an option, as whole words (``rewards.text.normalize``), if no other option's text is there; a text
       inside another's, "York" in "New York", does not count, nor does one after "not";
    4. a letter in brackets, bold or quotes, a capital that is no word, or a small letter after "is" or at the end, if
       no other letter is there: "so it must be (D)", "perhaps b".

    What an answer rejects, "not B", "A is wrong", is no letter for any of them.
    """
    rules = _rules(len(options))
    answer = rules.rejected.sub(" ", answer)
    matches = list(rules.said.finditer(answer))
    if matches:
        last = matches[-1]
        return None if rules.another.match(answer, last.end()) else _letter(last)
    match = rules.opening.match(answer)
    if match:
        listed = {_letter(other) for other in rules.listed.finditer(answer, match.end())}
        is_one = not rules.another.match(answer, match.end()) and listed <= {_letter(match)}
        return _letter(match) if is_one else None
    texts = _texts(answer, options)
    if texts:
        return texts[0] if len(texts) == 1 else None
    found = {_letter(match) for match in rules.loose.finditer(answer)}
    return found.pop() if len(found) == 1 else None


def _texts(answer: str, options: Sequence[str]) -> list[str]:
    """Letters of the options whose text stands in the answer."""
    said = f" {normalize(answer)} "
    texts = {letter: f" {normalize(option)} " for letter, option in zip(LETTERS, options, strict=False)}
    if not any(re.search(_NOT_TEXT, text) for text in texts.values()):  # else the word is part of what can be chosen
        known = "|".join(re.escape(text.strip()) for text in texts.values() if text.strip())
        said = re.sub(rf"{_NOT_TEXT}(?:{known})(?= )", " ", said) if known else said
    found = {letter: text for letter, text in texts.items() if text.strip() and text in said}
    return [
        letter for letter, text in found.items() if not any(text in other and text != other for other in found.values())
    ]


def _letter(match: re.Match) -> str:
    return next(group for group in match.groups() if group).upper()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rules:
    """Patterns of rules 1, 2 and 4, in whose matches the first group that is not empty is the letter; and others."""

    said: re.Pattern
    opening: re.Pattern
    loose: re.Pattern
    another: re.Pattern  # after a letter: an alternative to it
    listed: re.Pattern  # a letter before its option
    rejected: re.Pattern


@lru_cache(maxsize=32)
def _rules(num_options: int) -> _Rules:
    capitals = LETTERS[:num_options].replace("I", "")  # "I" is a word, and is treated as small letters are
    small = LETTERS[:num_options].lower() + ("I" if num_options > LETTERS.index("I") else "")
    letter = rf"(?:([{capitals}]){_ALONE}|([{small}]){_ALONE}{_CLOSED})"
    named = rf"(?i:\b{_NOUN}\b){_OPEN}([{capitals}{small}]){_ALONE}"
    either = rf"(?:\s*{named}|{_OPEN}{letter})"
    said = (
        rf"(?i:\banswer\b[^.!?\n]{{0,80}}?(?:{_COPULA}|[:=])){_i(_FILLERS)}{either}",
        rf"(?i:\b(?:correct|right|proper|best)\s+(?:\w+\s+){{1,3}}?(?:{_COPULA}|[:=])){_i(_FILLERS)}{either}",
        rf"{_i(_CHOOSES)}{_i(_FILLERS)}{either}",
        rf"\b([{capitals}])[*_\"'”’`)\]]*\s+(?i:(?:is|would be|must be|seems)\s+{_RIGHT})",
        rf"(?i:\b{_NOUN})\s+{_OPEN}([{capitals}{small}])[*_\"'”’`)\]]*\s+(?i:(?:is|would be)\s+{_RIGHT}|{_FOLLOWS})",
        rf"{_i(_CORRECTS)}{_i(_FILLERS)}(?:\s*{named}|{_OPEN}{letter}){_CLOSED}",
        rf"(?:{_CHINESE}){_OPEN}([{capitals}{small}]){_ALONE}",
    )
    words = capitals[1:]  # "A" is a word where a sentence begins
    loose = (
        rf"[(\[\"“‘'`{{]\s*([{capitals}{small}])\s*[)\]\"”’'`}}]",
        rf"\*\*\W{{0,2}}([{capitals}{small}])\b[^\w*]{{0,2}}(?:\*\*|\s)",
        rf"(?<![\w.'’])([{words}]){_ALONE}",
        rf"(?<![\w.'’])([{capitals}]){_ALONE}{_CLOSED}",
        rf"(?<=[a-z,] )([{capitals}]){_ALONE}",
        rf"(?<![\w.'’])([{capitals}])(?={_SHUT}\s*(?:,|/|&|\b(?i:or|and)\b){either})",
        rf"(?<=\s)([{small}])(?=\W*\Z)",
        rf"(?<![\w.'’])([{small}])(?=\s+or\s+[{small}]{_ALONE}{_CLOSED})",
        rf"(?i:{_COPULA}){_i(_FILLERS)}{either}",
    )
    return _Rules(
        said=re.compile("|".join(said)),
        opening=re.compile(rf"{_OPEN}(?:{_i(_NOUN)}\s+)?([{capitals}{small}]){_ALONE}{_CLOSED}"),
        loose=re.compile("|".join(loose)),
        another=re.compile(rf"{_SHUT}(?:\s*,)?\s*(?:\b(?i:or|and)\b|/|&)(?i:\s+(?:maybe|perhaps|also))?{either}"),
        listed=re.compile(rf"(?<![\w'’])[(*]{{0,3}}(?:([{capitals}])[).:]|([{small}])\))[*).]{{0,3}}\s+\w"),
        rejected=re.compile(_rejected(capitals, small)),
    )


def _rejected(capitals: str, small: str) -> str:
    """Pattern of what says that letters are wrong: "not B", "neither A nor (c)", "options A and B are wrong"."""
    bare = rf"(?:[{capitals}]{_ALONE}|[{small}]{_ALONE}{_CLOSED})"
    letter = rf"(?:(?i:{_NOUN}s?\s+){_OPEN}[{capitals}{small}]{_ALONE}|{_OPEN}{bare})"
    after_not = rf"{_i(_NEGATES)}(?:\s+|(?=[(\"'“‘*])){letter}{_SHUT}(?:\s*(?i:or|nor)\s+{letter}{_SHUT})*"
    named = rf"(?:(?i:\b{_NOUN}s?\s+){_OPEN}[{capitals}{small}]|(?<![\w'’])[(*_]{{0,3}}[{capitals}]){_ALONE}"
    more = rf"{_OPEN}[{capitals}]{_ALONE}"
    return rf"{after_not}|{named}{_SHUT}(?:\s*(?:,|,?\s*\b(?:and|or)\b){more}{_SHUT})*{_i(_WRONG)}"


def _i(pattern: str) -> str:
    return f"(?i:{pattern})"
