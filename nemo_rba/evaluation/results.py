# SPDX-License-Identifier: Apache-2.0
"""Predictions -> numbers with intervals: for each condition as a whole, each kind and each family the same ``Slice``.

Several systems under one label are training seeds of one arm: their items are averaged before the bootstrap, and each
seed's own score is kept beside the mean.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nemo_rba.evaluation.runner import Prediction
from nemo_rba.evaluation.statistics import Bootstrap, Interval
from nemo_rba.evaluation.tasks import word_errors


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """Who is who in a comparison."""

    systems: Mapping[str, str]  # system name -> label, in the order of tables; seeds of an arm share a label
    teacher: str  # label of T
    start: str  # label of S0
    arms: Sequence[str]  # labels of S1; the first is the method on trial, the others its rivals

    def __post_init__(self) -> None:
        missing = [label for label in (self.teacher, self.start, *self.arms) if label not in self.labels]
        if missing or not self.arms:
            raise ValueError(
                f"teacher {self.teacher!r}, start {self.start!r} and at least one of arms {list(self.arms)} must be "
                f"labels in report.systems, but {missing or 'arms'} is not in {self.labels}: change report"
            )

    @property
    def labels(self) -> list[str]:
        return list(dict.fromkeys(self.systems.values()))

    def seeds(self, label: str) -> list[str]:
        return [name for name, its_label in self.systems.items() if its_label == label]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """Some items of one condition, all systems on the same ones."""

    num_items: int
    scores: dict[str, Interval]  # label -> score in percent, mean over seeds
    seeds: dict[str, list[float]]  # label -> score of each seed
    gap_closed: dict[str, Interval]  # arm -> percent of the gap between start and teacher
    differences: dict[str, Interval]  # rival arm -> first arm minus rival, in points

    def best_arm(self, arms: Iterable[str]) -> str:
        return max(arms, key=lambda arm: self.scores[arm].value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """One task, e.g. one group of voices."""

    name: str
    measure: str  # "score" or "wer"
    whole: Slice
    kinds: dict[str, Slice]
    families: dict[str, Slice]
    heard_wer: dict[str, float]  # label -> word error rate of what it took for the instruction, where not perfect


def summarise(predictions: Sequence[Prediction], roles: Roles, *, num_draws: int, seed: int) -> list[Condition]:
    """One ``Condition`` per task, in order of appearance.

    Raises:
        ValueError: predictions of a system without a role; teacher, start or an arm missing in a condition of measure
            "score"; systems of a condition that did not answer the same items.
    """
    unknown = sorted({prediction.system for prediction in predictions} - set(roles.systems))
    if unknown:
        raise ValueError(
            f"predictions of systems {unknown} without a label, expected {list(roles.systems)}: see report.systems"
        )
    names = dict.fromkeys(prediction.task for prediction in predictions)
    by_task = {name: [p for p in predictions if p.task == name] for name in names}
    return [_condition(name, by_task[name], roles, num_draws, seed) for name in names]


def _condition(name: str, predictions: list[Prediction], roles: Roles, num_draws: int, seed: int) -> Condition:
    table = _by_system(name, predictions, roles)
    any_system = next(iter(table.values()))
    measure = any_system[0].measure

    def part(rows: list[int]) -> Slice:
        items = {s: np.array([[answers[r].value, answers[r].weight] for r in rows]) for s, answers in table.items()}
        bootstrap = Bootstrap(num_items=len(rows), num_draws=num_draws, seed=seed)
        return _slice(items, roles, bootstrap, compares=measure == "score")

    def parts(group: list[str]) -> dict[str, Slice]:
        return {g: part([r for r, its in enumerate(group) if its == g]) for g in sorted(set(group) - {""})}

    return Condition(
        name=name,
        measure=measure,
        whole=part(list(range(len(any_system)))),
        kinds=parts([prediction.kind for prediction in any_system]),
        families=parts([prediction.family for prediction in any_system]),
        heard_wer=_heard_wer(table, roles),
    )


def _by_system(condition: str, predictions: list[Prediction], roles: Roles) -> dict[str, list[Prediction]]:
    """System -> its predictions, all in the same order of items; checks that they pair."""
    table = {s: {p.id: p for p in predictions if p.system == s} for s in roles.systems}
    table = {system: answers for system, answers in table.items() if answers}
    ids = list(next(iter(table.values())))
    for system, answers in table.items():
        if set(answers) != set(ids):
            odd = sorted(set(answers) ^ set(ids))[:3]
            raise ValueError(
                f"condition {condition!r}: system {system!r} answered other items than {next(iter(table))!r}, "
                f"e.g. {odd}: finish its run, or leave it out of report.systems"
            )
    if predictions[0].measure == "score":
        needed = [s for label in (roles.teacher, roles.start, *roles.arms) for s in roles.seeds(label)]
        absent = [system for system in needed if system not in table]
        if absent:
            raise ValueError(
                f"condition {condition!r} has no predictions of {absent}: run them, or change report.systems"
            )
    return {system: [answers[id] for id in ids] for system, answers in table.items()}


def _slice(items: dict[str, np.ndarray], roles: Roles, bootstrap: Bootstrap, *, compares: bool) -> Slice:
    seeds = {label: [items[s] for s in roles.seeds(label) if s in items] for label in roles.labels}
    means = {label: np.mean(arrays, axis=0) for label, arrays in seeds.items() if arrays}
    start, teacher, first = (means[x] if compares else None for x in (roles.start, roles.teacher, roles.arms[0]))
    arms = roles.arms if compares else ()
    return Slice(
        num_items=len(next(iter(means.values()))),
        scores={label: bootstrap.score(array) for label, array in means.items()},
        seeds={x: [float(a[:, 0].sum() / a[:, 1].sum()) for a in seeds[x]] for x in means},
        gap_closed={arm: bootstrap.gap_closed(start, means[arm], teacher) for arm in arms},
        differences={arm: bootstrap.difference(first, means[arm]) for arm in arms[1:]},
    )


def _heard_wer(table: dict[str, list[Prediction]], roles: Roles) -> dict[str, float]:
    rates = {}
    for system, answers in table.items():
        if any(answer.heard != answer.text for answer in answers):
            errors, words = np.array([word_errors(answer.text, answer.heard) for answer in answers]).sum(0)
            rates[roles.systems[system]] = 100 * float(errors / words)
    return rates
