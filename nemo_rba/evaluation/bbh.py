# SPDX-License-Identifier: Apache-2.0
"""BIG-Bench Hard as VoiceBench has it spoken (arXiv 2210.09261, 2410.17196): yes, no, or one of two sentences.

VoiceBench's ``src/evaluator/bbh.py`` looks for some 400 phrases of the models that its authors had tried, in the order
of a list, and draws an answer where none is found, which is right half of the time. Here a few rules read the same;
what they cannot read is wrong and counted, as luck does not score. Where the two differ on purpose: there a bare "b"
chooses (a), "the sentence ... is not plausible" and "must be lying" are yes, and "Nobody knows" is no, as it begins so.
"""

import re

from nemo_rba.evaluation.measures import Statistics
from nemo_rba.evaluation.options import chosen_option
from nemo_rba.evaluation.tasks import MeasuredTask
from nemo_rba.types import Instruction

FAMILIES = ("sports_understanding", "navigate", "web_of_lies", "hyperbaton")  # the last one asks for a or b
REFERENCES = {"yes": "yes", "no": "no", "(a)": "A", "(b)": "B"}

_WORD = r"\b(yes|no|true|false)\b(?!\s+(?:doubt|matter|one|problem|question|way|longer|need)\b)"
_FILLERS = (
    r"(?:\W|\b(?:that|it|is|the|most|likely|probably|definitely|clearly|directly|simply|without any modification)\b)*"
)
_SAID = re.compile(
    rf"\b(?:answer|conclusion|verdict|prefix)\b(?:[^.!\n]{{0,120}}?(?:\bis\b|\bas\b|\bbe\b|[:=]))?{_FILLERS}"
    rf"(?:\\?(?:boxed|text|textbf|mathrm)\{{\W*){{0,2}}{_WORD}",
    re.IGNORECASE,
)
_OPENING = re.compile(rf"\W*{_WORD}", re.IGNORECASE)
_CLOSING = re.compile(r"\b(yes|no|true|false)\W*\Z", re.IGNORECASE)
_NEGATION = re.compile(r"\b(?:not|never|cannot|hardly|neither|nor|fails?)\b|n['’]t\b", re.IGNORECASE)
_OPEN_QUESTION = re.compile(r"\?\W*\Z|\b(?:whether|(?:see|check|know|find out|determine) if)\b", re.IGNORECASE)
# What an answer says instead of yes, and instead of no; a negation before it turns it round.
_STATED = {
    "sports_understanding": (r"\b(?:plausible|makes sense)\b", r"\b(?:implausible|unlikely|impossible)\b"),
    "navigate": (
        r"\b(?:return\w*|back|end\w* up|are|were|is|be)\b[^.!?\n]{0,60}"
        r"\b(?:start\w*|original)\s+(?:point|position|place)\b"
        r"|\bback\b[^.!?\n]{0,20}\bwhere\s+\w+\s+(?:started|began)\b",
        r"\baway from\b[^.!?\n]{0,30}\bstart\w*\s+(?:point|position|place)\b",
    ),
    "web_of_lies": (
        r"\b(?:tell\w*|speak\w*|says)\s+the\s+truth\b|\btruthful\b",
        r"\b(?:lies|lying|tells?\s+(?:a|the)\s+lie)\b",
    ),
}  # fmt: skip


class BBHTask(MeasuredTask):
    """Share of questions answered as the reference says, in percent; an answer that cannot be read is wrong.

    ``instruction.response`` is Yes, No, (A) or (B), ``instruction.extra["id"]`` names the family, e.g.
    "bbh_navigate_147": as ``benchmarks.voicebench.VoiceBench`` writes them. What could not be read is the measure
    "unparsable".

    Args:
        name, batches, kinds: as for ``InstructionFollowingTask``.
    """

    def statistics(self, instruction: Instruction, response: str) -> Statistics:
        identity = str(instruction.extra.get("id", ""))
        family = next((family for family in FAMILIES if family in identity), None)
        right = REFERENCES.get(instruction.response.strip().lower())
        if family is None or right not in (("A", "B") if family == "hyperbaton" else ("yes", "no")):
            raise ValueError(
                f"task {self.name!r}: item {instruction.id!r} has extra.id {identity!r} and response "
                f"{instruction.response!r}; expected an id with one of {', '.join(FAMILIES)} in it, and (A) or (B) for "
                "hyperbaton, else Yes or No: write them into the manifest"
            )
        found = chosen_verdict(response, family)
        return {"accuracy": [100.0 * (found == right), 1.0], "unparsable": [100.0 * (found is None), 1.0]}


def chosen_verdict(answer: str, family: str) -> str | None:
    """ "yes" or "no", for hyperbaton "A" or "B" (``options.chosen_option``), or None. The first rule that finds one:

    1. what is said to be the answer, the last one said: "the answer is no", "Final answer: **yes**";
    2. the word that opens the answer: "No, you would not";
    3. the family's own words, as the last statement has them: "it is not plausible", "you end up back where you
       started", and, in the last sentence only, "Vina tells the truth";
    4. the word that ends it: "So, yes."
    """
    if family == "hyperbaton":
        return chosen_option(answer, ["", ""])
    said = _SAID.findall(answer)
    if said:
        return _plain(said[-1])
    opening = _OPENING.match(answer)
    if opening:
        return _plain(opening[1])
    stated = _statement(answer, family)
    if stated:
        return stated
    closing = _CLOSING.search(answer)
    return _plain(closing[1]) if closing else None


def _statement(answer: str, family: str) -> str | None:
    sentences = [part for part in re.split(r"(?<=[.!?])\s+|\n+", answer.strip()) if part.strip()]
    for sentence in reversed(sentences[-1:] if family == "web_of_lies" else sentences):
        if _OPEN_QUESTION.search(sentence):
            continue
        found = [
            (match.end(), is_yes != bool(_NEGATION.search(sentence[: match.end()])))
            for is_yes, pattern in zip((True, False), _STATED[family], strict=True)
            for match in re.finditer(pattern, sentence, re.IGNORECASE)
        ]
        if found:
            return "yes" if max(found)[1] else "no"
    return None


def _plain(word: str) -> str:
    return {"true": "yes", "false": "no"}.get(word.lower(), word.lower())
