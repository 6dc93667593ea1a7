# SPDX-License-Identifier: Apache-2.0
"""Tables of everything that was read off the same answers: BLEU, chrF and TER, strict and loose, and how; and of what
was paid for it."""

from collections.abc import Mapping, Sequence

from nemo_rba.evaluation.document import Block, Bullets, Heading, Paragraph, Strong, Table
from nemo_rba.evaluation.modality import number
from nemo_rba.evaluation.results import Condition, Roles

LOWER_IS_BETTER = ("TER", "WER", "CER", "unparsable", "empty", "wer")


def quantity_blocks(conditions: Sequence[Condition], roles: Roles) -> list[Block]:
    """One table for each condition that has several measures, best arm in bold, and the signatures below it."""
    blocks: list[Block] = []
    for condition in conditions:
        if not condition.others:
            continue
        measures = {condition.quantity: condition.whole} | condition.others
        labels = [label for label in roles.labels if label in condition.whole.scores]
        best = {name: _best(name, part.scores, roles) for name, part in measures.items()}
        rows = []
        for label in labels:
            cells = [number(part.scores[label]) for part in measures.values()]
            rows.append([label, *(Strong(c) if best[n] == label else c for n, c in zip(measures, cells, strict=True))])
        blocks += [
            Heading(f"All measures: {condition.name} ({condition.whole.num_items} items)"),
            Table(["system", *measures], rows),
        ]
        if condition.signatures:
            blocks.append(Bullets([f"{name}: {how}" for name, how in condition.signatures.items()]))
    return blocks


def account_blocks(accounts: Mapping[str, Mapping[str, float]]) -> list[Block]:
    """What scoring each condition has cost: votes of a judge, tokens; nothing where nothing was counted.

    Args:
        accounts: condition -> what was counted -> how much.
    """
    counted = list(dict.fromkeys(what for account in accounts.values() for what in account))
    if not counted:
        return []
    rows = [
        [name, *(_amount(account[what]) if what in account else "–" for what in counted)]
        for name, account in accounts.items()
        if account
    ]
    return [
        Heading("What scoring has cost, in this run"),
        Paragraph("What a file had kept from earlier runs was paid for then."),
        Table(["condition", *counted], rows),
    ]


def _amount(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _best(name: str, scores: dict, roles: Roles) -> str | None:
    """The arm that is best on these very items; None where there is only one."""
    arms = [arm for arm in roles.arms if arm in scores and scores[arm].is_defined]
    if len(arms) < 2:
        return None
    sign = -1 if name in LOWER_IS_BETTER else 1
    return max(arms, key=lambda arm: sign * scores[arm].value)
