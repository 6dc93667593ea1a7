# SPDX-License-Identifier: Apache-2.0
"""Predictions -> numbers with intervals: for each condition as a whole, each kind, family and voice the same ``Slice``.

Several systems under one label are training seeds of one arm: its score is the mean of theirs, which are kept beside
it. A task may have several measures (``measures.py``): its own is there for every slice, the others for the whole
condition. ``compare`` is for any two systems.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nemo_rba.evaluation.measures import corpus_score, short_name
from nemo_rba.evaluation.runner import Prediction
from nemo_rba.evaluation.statistics import Bootstrap, Interval
from nemo_rba.evaluation.tasks import word_errors

MIN_ITEMS_OF_A_VOICE = 5  # a score of fewer tells of the items and not of the voice


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """Who is who in a comparison."""

    systems: Mapping[str, str]  # system name -> label, in the order of tables; seeds of an arm share a label
    teacher: str  # label of T
    start: str | None  # label of S0; None where nobody stands for what was before, and no gap is closed
    arms: Sequence[str]  # labels of S1; the first is the method on trial, the others its rivals

    def __post_init__(self) -> None:
        missing = [label for label in (*self.bounds, *self.arms) if label not in self.labels]
        if missing or not self.arms:
            raise ValueError(
                f"teacher {self.teacher!r}, start {self.start!r} and at least one of arms {list(self.arms)} must be "
                f"labels in report.systems, but {missing or 'arms'} is not in {self.labels}: change report"
            )

    @property
    def labels(self) -> list[str]:
        return list(dict.fromkeys(self.systems.values()))

    @property
    def bounds(self) -> list[str]:
        """Labels of S0, where there is one, and T."""
        return [label for label in (self.start, self.teacher) if label is not None]

    def seeds(self, label: str) -> list[str]:
        return [name for name, its_label in self.systems.items() if its_label == label]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """Some items of one condition, all systems on the same ones."""

    num_items: int  # that differ in more than who speaks them: what is drawn in resamples
    num_clips: int  # as many, or more where items are spoken in several voices
    scores: dict[str, Interval]  # label -> score in percent, mean over seeds
    seeds: dict[str, list[float]]  # label -> score of each seed
    gap_closed: dict[str, Interval]  # arm -> percent of the gap between start and teacher; {} without a start
    gains: dict[str, Interval]  # arm -> arm minus start, in points, with a p-value; {} without a start
    differences: dict[str, Interval]  # rival arm -> first arm minus rival, in points, with a p-value

    @property
    def size(self) -> str:
        """How much was asked, in words."""
        return f"{self.num_items} items" + (f", {self.num_clips} clips" if self.num_clips > self.num_items else "")

    def best_arm(self, arms: Iterable[str]) -> str:
        return max(arms, key=lambda arm: self.scores[arm].value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """One task, e.g. one group of voices."""

    name: str
    measure: str  # "score" or "wer"
    quantity: str  # what the numbers are, e.g. "accuracy", "BLEU"; "" where the task has one measure
    signatures: dict[str, str]  # quantity -> how it was computed, where that was said, e.g. sacrebleu's signature
    whole: Slice
    kinds: dict[str, Slice]
    families: dict[str, Slice]
    num_voices: int  # who speak, as the manifest tells them apart
    voices: dict[str, Slice]  # of those with MIN_ITEMS_OF_A_VOICE items or more; {} where one voice speaks, or none
    heard_wer: dict[str, float]  # label -> word error rate of what it took for the instruction, where not perfect
    others: dict[str, Slice]  # quantity -> the task's other measures, whole condition; no gap is closed in them


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


def compare(
    predictions: Sequence[Prediction], first: Sequence[str], second: Sequence[str], *, num_draws: int, seed: int
) -> dict[str, dict[str, Interval]]:
    """First minus second, paired: task -> quantity ("" where the task has one) -> difference with its p-value.

    Args:
        first, second: names of systems; several are training seeds of one arm.

    Raises:
        ValueError: they did not answer the same items.
    """
    found = {}
    relevant = [prediction for prediction in predictions if prediction.system in {*first, *second}]
    for name in dict.fromkeys(prediction.task for prediction in relevant):
        table = _pair(name, [p for p in relevant if p.task == name], [*first, *second])
        for measure in _measures(name, table):
            bootstrap = _bootstrap(table, measure, num_draws, seed)
            items = _arrays(table, measure)
            ours, theirs = (np.stack([items[system] for system in side]) for side in (first, second))
            found.setdefault(name, {})[short_name(measure)] = bootstrap.difference(ours, theirs)
    return found


def _condition(name: str, predictions: list[Prediction], roles: Roles, num_draws: int, seed: int) -> Condition:
    table = _by_system(name, predictions, roles)
    any_system = next(iter(table.values()))
    role = any_system[0].measure
    own, *others = _measures(name, table)

    def part(rows: Sequence[int], measure: str, *, has_gap: bool) -> Slice:
        some = {system: [answers[row] for row in rows] for system, answers in table.items()}
        bootstrap, size = _bootstrap(some, measure, num_draws, seed), max(_clusters(some)) + 1
        return _slice(_arrays(some, measure), roles, bootstrap, num_items=size, has_gap=has_gap)

    def parts(group: list[str], *, at_least: int = 1) -> dict[str, Slice]:
        rows = {g: [r for r, its in enumerate(group) if its == g] for g in sorted(set(group) - {""})}
        return {g: part(its, own, has_gap=role == "score") for g, its in rows.items() if len(its) >= at_least}

    everything, speakers = range(len(any_system)), [prediction.speaker for prediction in any_system]
    num_voices = len(set(speakers) - {""})
    return Condition(
        name=name,
        measure=role,
        quantity=short_name(own),
        signatures={short_name(m): m.partition("|")[2] for m in (own, *others) if "|" in m},
        whole=part(everything, own, has_gap=role == "score"),
        kinds=parts([prediction.kind for prediction in any_system]),
        families=parts([prediction.family for prediction in any_system]),
        num_voices=num_voices,
        voices=parts(speakers, at_least=MIN_ITEMS_OF_A_VOICE) if num_voices > 1 else {},
        heard_wer=_heard_wer(table, roles),
        others={short_name(measure): part(everything, measure, has_gap=False) for measure in others},
    )


def _measures(condition: str, table: dict[str, list[Prediction]]) -> list[str]:
    """Names of the measures that all predictions have, the task's own first; [""] where it has only one."""
    found = {tuple(prediction.statistics) for answers in table.values() for prediction in answers}
    if len(found) > 1:
        raise ValueError(
            f"condition {condition!r}: predictions were scored by different measures, {sorted(found)}: evaluate again; "
            "answers that are there are scored anew, not asked for anew"
        )
    return list(found.pop()) or [""]


def _arrays(table: dict[str, list[Prediction]], measure: str) -> dict[str, np.ndarray]:
    """System -> what its items add to a measure, (I, S)."""
    return {
        system: np.array([p.statistics[measure] if measure else [p.value, p.weight] for p in answers], dtype=float)
        for system, answers in table.items()
    }


def _bootstrap(table: dict[str, list[Prediction]], measure: str, num_draws: int, seed: int) -> Bootstrap:
    return Bootstrap(clusters=_clusters(table), num_draws=num_draws, seed=seed, corpus_score=corpus_score(measure))


def _clusters(table: dict[str, list[Prediction]]) -> list[int]:
    """For each row a number that is shared by those that differ in nothing but their voice."""
    numbers: dict[tuple[str, str, str], int] = {}
    return [numbers.setdefault((p.text, p.context, p.reference), len(numbers)) for p in next(iter(table.values()))]


def _by_system(condition: str, predictions: list[Prediction], roles: Roles) -> dict[str, list[Prediction]]:
    """``_pair`` of the systems that have a role; those of a comparison must be there."""
    present = {prediction.system for prediction in predictions}
    if predictions[0].measure == "score":
        needed = [s for label in (*roles.bounds, *roles.arms) for s in roles.seeds(label)]
        absent = [system for system in needed if system not in present]
        if absent:
            raise ValueError(
                f"condition {condition!r} has no predictions of {absent}: run them, or change report.systems"
            )
    return _pair(condition, predictions, [system for system in roles.systems if system in present])


def _pair(condition: str, predictions: list[Prediction], systems: Sequence[str]) -> dict[str, list[Prediction]]:
    """System -> its predictions, ordered by id, whatever the order of asking was; checks that they pair."""
    table = {s: {p.id: p for p in predictions if p.system == s} for s in systems}
    ids = sorted(next(iter(table.values())))
    for system, answers in table.items():
        if set(answers) != set(ids):
            odd = sorted(set(answers) ^ set(ids))[:3]
            raise ValueError(
                f"condition {condition!r}: system {system!r} answered other items than {next(iter(table))!r}, "
                f"e.g. {odd}: finish its run, or leave it out of report.systems"
            )
    return {system: [answers[id] for id in ids] for system, answers in table.items()}


def _slice(
    items: dict[str, np.ndarray], roles: Roles, bootstrap: Bootstrap, *, num_items: int, has_gap: bool
) -> Slice:  # fmt: skip
    seeds = {label: [items[s] for s in roles.seeds(label) if s in items] for label in roles.labels}
    arms = {label: np.stack(arrays) for label, arrays in seeds.items() if arrays}
    first, rivals = roles.arms[0], [arm for arm in roles.arms[1:] if arm in arms]
    start, teacher = (arms.get(label) for label in (roles.start, roles.teacher))
    return Slice(
        num_items=num_items,
        num_clips=next(iter(arms.values())).shape[1],
        scores={label: bootstrap.score(arrays) for label, arrays in arms.items()},
        seeds={label: [bootstrap.value(array) for array in arrays] for label, arrays in arms.items()},
        gap_closed={
            arm: bootstrap.gap_closed(start, arms[arm], teacher) for arm in roles.arms if has_gap and roles.start
        },
        gains={arm: bootstrap.difference(arms[arm], start) for arm in roles.arms if arm in arms and start is not None},
        differences={arm: bootstrap.difference(arms[first], arms[arm]) for arm in rivals if first in arms},
    )


def _heard_wer(table: dict[str, list[Prediction]], roles: Roles) -> dict[str, float]:
    rates = {}
    for system, answers in table.items():
        if any(answer.heard != answer.text for answer in answers):
            errors, words = np.array([word_errors(answer.text, answer.heard) for answer in answers]).sum(0)
            rates[roles.systems[system]] = 100 * float(errors / words)
    return rates
