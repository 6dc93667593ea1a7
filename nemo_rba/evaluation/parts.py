# SPDX-License-Identifier: Apache-2.0
"""Tables of parts of a condition: its kinds, its families, and whose voice was heard."""

import math
from collections.abc import Mapping, Sequence

from nemo_rba.evaluation import plots
from nemo_rba.evaluation.document import Block, Figure, Heading, Paragraph, Strong, Table
from nemo_rba.evaluation.modality import number
from nemo_rba.evaluation.results import MIN_ITEMS_OF_A_VOICE, Condition, Roles, Slice
from nemo_rba.evaluation.statistics import Interval

MOST_VOICES = 12  # in a table; of more, as many of the worst as of the best
LONGEST_NAME = 24  # of a voice; some sets call their speakers by a digest of 128 characters


def part_blocks(conditions: Sequence[Condition], roles: Roles) -> list[Block]:
    """One table for the kinds of each condition, then one for its families; the first with a figure.

    Args:
        conditions: those that are compared.
    """
    blocks: list[Block] = []
    for condition in conditions:
        if condition.kinds:
            closed = roles.arms if roles.start else ()
            header = ["kind", "items", *roles.labels, *(f"gap closed, {arm}" for arm in closed)]
            rows = [
                [*_row(kind, part, roles), *(number(part.gap_closed[arm], " %") for arm in closed)]
                for kind, part in condition.kinds.items()
            ]
            blocks += [Heading(f"By kind: {condition.name}"), Table(header, rows)]
    for condition in conditions:
        rows = [_row(family, part, roles) for family, part in condition.families.items()]
        blocks.append(Heading(f"By family: {condition.name}"))
        if condition is conditions[0]:
            what = f"What {roles.arms[0]} changed" if roles.start else f"What {roles.arms[0]} lacks"
            caption = f"{what}, family by family (number of items); the widest gap left is on top."
            blocks.append(Figure("families", plots.families_figure(condition, roles), caption))
        blocks.append(Table(["family", "items", *roles.labels], rows))
    return blocks


def voice_blocks(conditions: Sequence[Condition], roles: Roles) -> list[Block]:
    """One table for the voices of each condition that has several, the one on which the first arm fails on top.

    Args:
        conditions: compared ones, the first with a figure, or those of measure "wer".
    """
    blocks: list[Block] = []
    several = [condition for condition in conditions if condition.num_voices > 1]
    for condition in several:
        worst, best = _ends(condition, roles)
        shown = {voice: _short(voice) for voice in (*worst, *best)}
        blocks += [Heading(f"By voice: {condition.name}"), Paragraph(_told(condition, roles, len(shown)))]
        if condition is several[0] and condition.measure == "score" and shown:
            figure = plots.voices_figure(condition, shown, roles, num_between=len(condition.voices) - len(shown))
            caption = f"{roles.arms[0]} voice by voice (number of items), with its 95 % interval over items."
            blocks.append(Figure("voices", figure, caption))
        is_wer = condition.measure == "wer"
        rows = [_row(name, condition.voices[voice], roles, lower_is_better=is_wer) for voice, name in shown.items()]
        blocks += [Table(["voice", "items", *roles.labels], rows)] if rows else []
    return blocks


def _ends(condition: Condition, roles: Roles) -> tuple[list[str], list[str]]:
    """The voices to show, worst first, and of many the worst and the best alone."""
    judged_by = _judged_by(condition, roles)
    sign = -1 if condition.measure == "wer" else 1

    def place(voice: str) -> tuple[bool, float, str]:
        score = condition.voices[voice].scores[judged_by]
        return not score.is_defined, sign * score.value if score.is_defined else 0.0, voice

    order = sorted(condition.voices, key=place)
    return (order, []) if len(order) <= MOST_VOICES else (order[: MOST_VOICES // 2], order[-(MOST_VOICES // 2) :])


def _judged_by(condition: Condition, roles: Roles) -> str:
    labels = list(condition.whole.scores)
    return next((arm for arm in roles.arms if arm in labels), labels[0])


def _told(condition: Condition, roles: Roles, num_shown: int) -> str:
    """Which voices these are, and how many are left out and why."""
    known, few = len(condition.voices), condition.num_voices - len(condition.voices)
    heard = sum(part.num_clips for part in condition.voices.values())
    words = [f"{condition.num_voices} voices speak; that on which {_judged_by(condition, roles)} does worst is on top."]
    if num_shown < known:
        words.append(f"The {num_shown // 2} worst and as many best of {known} are shown; results.json has all.")
    if few:
        words.append(f"Left out, with fewer than {MIN_ITEMS_OF_A_VOICE} items: {few}.")
    if heard < condition.whole.num_clips:
        words.append(f"These are {heard} of {condition.whole.num_clips} items.")
    words.append("The worst of several is worst by chance too: read the intervals.")
    return " ".join(words)


def _short(voice: str) -> str:
    end = (LONGEST_NAME - 1) // 2
    return voice if len(voice) <= LONGEST_NAME else f"{voice[:end]}…{voice[-end:]}"


def _row(name: str, part: Slice, roles: Roles, *, lower_is_better: bool = False) -> list[str]:
    return [name, str(part.num_items), *cells(part.scores, roles, lower_is_better=lower_is_better)]


def cells(scores: Mapping[str, Interval], roles: Roles, *, lower_is_better: bool = False) -> list[str]:
    """Every system's score, the best arm's in bold where it is ahead of another one."""
    values = {arm: scores[arm].value for arm in roles.arms if arm in scores and scores[arm].is_defined}
    choose = min if lower_is_better else max
    best = choose(values.values(), default=math.nan) if len(set(values.values())) > 1 else math.nan
    texts = {label: number(scores[label]) if label in scores else "–" for label in roles.labels}
    return [Strong(text) if values.get(label) == best else text for label, text in texts.items()]
