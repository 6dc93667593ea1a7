# SPDX-License-Identifier: Apache-2.0
"""The student beside itself: what it says when it reads, and how it holds out when hearing gets harder."""

from collections.abc import Mapping, Sequence

from nemo_rba.evaluation import plots
from nemo_rba.evaluation.conditions import HeldOut
from nemo_rba.evaluation.document import Block, Figure, Heading, Paragraph, Table
from nemo_rba.evaluation.results import Condition, Roles, compare
from nemo_rba.evaluation.runner import Prediction
from nemo_rba.evaluation.statistics import Interval


def reading_blocks(
    conditions: Sequence[Condition], predictions: Sequence[Prediction], roles: Roles, *, num_draws: int, seed: int
) -> list[Block]:
    """What alignment has cost, or brought, on text: every arm reads the words, beside the start model that reads them.

    Args:
        conditions: the typed ones.
    """
    blocks: list[Block] = []
    for condition in conditions:
        rows, settings = [], {"num_draws": num_draws, "seed": seed}
        of_task = [prediction for prediction in predictions if prediction.task == condition.name]
        for label, score in condition.whole.scores.items():
            change, p_value = "–", "–"
            if label in roles.arms:
                found = compare(of_task, roles.seeds(label), roles.seeds(roles.start), **settings)
                difference = found[condition.name][condition.quantity]
                change, p_value = number(difference, sign=True), f"{difference.p_value:.3f}"
            rows.append([label, number(score), change, p_value])
        blocks += [
            Heading(f"On text: {condition.name} ({condition.whole.num_items} items)"),
            Paragraph(
                "The same words, read instead of heard. An arm that falls behind the start model here has forgotten; "
                "what lies between reading and hearing is the gap that is left."
            ),
            Table(["who reads", "score", "minus the start, points", "p"], rows),
        ]
    return blocks


def robustness_blocks(
    conditions: Sequence[Condition], held_out: Mapping[str, HeldOut], roles: Roles
) -> list[Block]:  # fmt: skip
    """One figure and one table a curve: the score of every system over what was varied.

    Args:
        conditions: those on a curve.
        held_out: says where on which.
    """
    blocks: list[Block] = []
    for number_of_curve, curve in enumerate(dict.fromkeys(held_out[c.name].curve for c in conditions)):
        points = {held_out[c.name].at: c for c in conditions if held_out[c.name].curve == curve}
        points = dict(sorted(points.items()))
        labels = [label for label in roles.labels if all(label in c.whole.scores for c in points.values())]
        scores = {label: [c.whole.scores[label] for c in points.values()] for label in labels}
        figure = plots.robustness_figure(list(points), scores, roles, x_label=curve)
        name = f"robustness-{number_of_curve + 1}"
        blocks += [
            Heading(f"Robustness: {curve}"),
            Figure(name, figure, f"Score over {curve}; bands: 95 % intervals over items."),
            Table(
                ["system", *(f"{at:g}" for at in points)],
                [[label, *(number(score) for score in row)] for label, row in scores.items()],
            ),
        ]
    return blocks


def number(interval: Interval, unit: str = "", *, sign: bool = False) -> str:
    """An estimate with its interval, or a dash."""
    if not interval.is_defined:
        return "–"
    form = "+.1f" if sign else ".1f"
    return f"{interval.value:{form}}{unit} [{interval.low:{form}}, {interval.high:{form}}]"
