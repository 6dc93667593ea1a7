# SPDX-License-Identifier: Apache-2.0
"""What a judge's reply says: a grade, which of two answers is better, yes or no. None where it does not say one thing.

A misread grade is worse than none: a reply without one is asked for anew and counted (``judge.Voter``), "2/5" taken
for 5 is a lie in the report. So these readers want a reply that says nothing else of the kind.
"""

import re

_FINAL = re.compile(r"\[\[\s*([^\[\]]*?)\s*\]\]")  # MT-Bench's form, for a judge that explains first (arXiv 2306.05685)
_CHOOSING = frozenset(
    ("the", "a", "better", "best", "preferred", "answer", "response", "option", "assistant", "output", "one", "number",
     "is", "it", "i", "i'd", "would", "say", "choose", "pick", "prefer", "my", "choice", "verdict", "winner", "final")
)  # fmt: skip
_BETTER = re.compile(
    r"(?<![\w.])([12])\b\W{0,3}(?:is|was|seems)\s+(?:(?:the|a|much|slightly|clearly|far|somewhat|by far)\s+){0,3}"
    r"(?:better|best|preferred|preferable|superior|stronger)\b",
    re.IGNORECASE,
)
_WORSE = re.compile(r"\b(?:not|neither|never|both|worse|tie|draw|equal\w*|cannot|if|unless)\b|n['’]t\b", re.IGNORECASE)
_SAYS = re.compile(
    r"\A\W*(yes|no)\b(?=\W*\Z|[*_\"'”’`)\]]*[.,:;!\n–—]|\s*-\s)"  # opens the reply, closed off
    r"|\b(?:is|:)\W*\b(yes|no)\W*\Z",
    re.IGNORECASE,
)


def read_grade(reply: str, *, low: float, high: float) -> float | None:
    """The only number that stands in a reply, or in its [[double brackets]], if it is on the scale.

    What speaks of the scale is passed over: "/5", "out of 5", "4 of 5", "1-5", "from 1 to 5", where 5 is ``high``. So
    "4", "4/5", "Score: 4", "**4** out of 5" and "2 (scale 1-5)" have a grade; "10", "4/10", "4 or 5", "4-5" and "4th"
    have none.
    """
    marked = _FINAL.findall(reply)
    rest = _without_scale(" ".join(marked) if marked else reply, f"{low:g}", f"{high:g}")
    found = set()
    for token in re.findall(r"[\w.,%+½¼¾-]*\d[\w.,%+½¼¾-]*", rest):
        number = token.strip(".,")
        if not re.fullmatch(r"-?\d+(?:\.\d+)?", number):
            return None
        found.add(float(number))
    if len(found) != 1:
        return None
    (grade,) = found
    return grade if low <= grade <= high else None


def read_choice(reply: str) -> float | None:
    """1 or 2, the better of two answers: "2", "Answer 2", "[[2]]", "Answer 2 is better than Answer 1".

    None where both are named without that, for "not 1" and for a draw.
    """
    marked = _FINAL.findall(reply)
    said = " ".join(marked) if marked else reply
    if _WORSE.search(said):
        return None
    tokens = re.findall(r"[^\W\d_]+(?:['’]\w+)?|\d[\w.]*", said.lower())
    numbers = {token.rstrip(".") for token in tokens if token[0].isdigit()}
    words = {token.replace("’", "'") for token in tokens if not token[0].isdigit()}
    if numbers in ({"1"}, {"2"}) and words <= _CHOOSING:
        return float(numbers.pop())
    better = set(_BETTER.findall(said))
    return float(better.pop()) if len(better) == 1 else None


def read_yes_no(reply: str) -> float | None:
    """1 for yes, 0 for no: the reply opens with the word, closed off, or ends with it after "is" or a colon.

    None where the other word stands there too, and where it is no verdict: "there is no error".
    """
    verdicts = {(match[1] or match[2]).lower() for match in _SAYS.finditer(reply)}
    words = {word.lower() for word in re.findall(r"\b(?:yes|no)\b", reply, re.IGNORECASE)}
    if len(verdicts) != 1 or words != verdicts:
        return None
    return float(verdicts.pop() == "yes")


def _without_scale(text: str, low: str, high: str) -> str:
    """``text`` without what names the scale."""
    low, high = re.escape(low), re.escape(high)
    end = r"(?:\.0+)?(?![\w%½¼¾]|[.,]\d)"
    between = rf"(?<![\w.,-]){low}\s*(?:-|–|—|to|\.\.|and)\s*{high}{end}"
    of = rf"(?:/|\bout\s+of)\s*{high}{end}|(?<=[\d*_])\s+of\s+{high}{end}"
    return re.sub(f"{between}|{of}", " ", text, flags=re.IGNORECASE)
