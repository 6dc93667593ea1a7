# SPDX-License-Identifier: Apache-2.0
"""The student beside itself: what it says when it reads, and how it holds out when hearing gets harder."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

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
            if label in roles.arms and roles.start:
                found = compare(of_task, roles.seeds(label), roles.seeds(roles.start), **settings)
                difference = found[condition.name][condition.quantity]
                change, p_value = number(difference, sign=True), probability(difference)
            rows.append([label, number(score), change, p_value])
        blocks += [
            Heading(f"On text: {condition.name} ({condition.whole.size})"),
            Paragraph(
                "The same words, read instead of heard. An arm that falls behind the start model here has forgotten."
                if roles.start
                else "The same words, read instead of heard."
            ),
            Table(["who reads", "score", "minus the start, points", "p"], rows),
        ]
    return blocks


def gap_blocks(
    conditions: Sequence[Condition], predictions: Sequence[Prediction], held_out: Mapping[str, HeldOut], roles: Roles,
    *, num_draws: int, seed: int,
) -> list[Block]:  # fmt: skip
    """What every model loses by hearing: the same items heard and read by it, paired, one table for each such pair.

    The teacher always reads, and loses nothing.

    Args:
        conditions: all; pairs are a typed one and one that hears the same manifest as it is.
    """
    blocks: list[Block] = []
    known = {condition.name: condition for condition in conditions if condition.name in held_out}
    for read, heard in _same_items(held_out, known):
        rows = []
        for label in roles.labels:
            if (
                label == roles.teacher
                or label not in known[read].whole.scores
                or label not in known[heard].whole.scores
            ):
                continue
            pairs = [
                replace(prediction, task=read, system=f"{way} {prediction.system}")
                for way, name in (("heard", heard), ("read", read))
                for prediction in predictions
                if prediction.task == name and prediction.system in roles.seeds(label)
            ]
            sides = ([f"{way} {system}" for system in roles.seeds(label)] for way in ("heard", "read"))
            lost = compare(pairs, *sides, num_draws=num_draws, seed=seed)[read][known[read].quantity]
            scores = (known[name].whole.scores[label] for name in (heard, read))
            rows.append([label, *(number(score) for score in scores), number(lost, sign=True), probability(lost)])
        blocks += [
            Heading(f"The modality gap of each model: {heard} against {read} ({known[read].whole.size})"),
            Table(["who", "heard", "read", "heard minus read, points", "p"], rows),
        ]
    return blocks


def _same_items(held_out: Mapping[str, HeldOut], known: Mapping[str, Condition]) -> list[tuple[str, str]]:
    """(read, heard as it is) of the same manifest and measure."""
    return [
        (read, heard)
        for read in known
        for heard in known
        if held_out[read].typed
        and not (held_out[heard].typed or held_out[heard].augmentation or held_out[heard].curve)
        and held_out[read].manifest == held_out[heard].manifest
        and known[read].quantity == known[heard].quantity
        and known[read].whole.num_clips == known[heard].whole.num_clips
    ]


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
        quantity = next(iter(points.values())).quantity
        figure = plots.robustness_figure(list(points), scores, roles, x_label=curve, y_label=quantity or "score, %")
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


def probability(difference: Interval) -> str:
    """The p-value of a difference, or a dash; never 0, as no number of random exchanges shows that."""
    if not difference.is_defined or difference.p_value is None:
        return "–"
    return f"{difference.p_value:.3f}" if difference.p_value >= 0.0005 else "<.001"


def number(interval: Interval, unit: str = "", *, sign: bool = False) -> str:
    """An estimate with its interval, or a dash."""
    if not interval.is_defined:
        return "–"
    form = "+.1f" if sign else ".1f"
    return f"{interval.value:{form}}{unit} [{interval.low:{form}}, {interval.high:{form}}]"
