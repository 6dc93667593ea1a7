# SPDX-License-Identifier: Apache-2.0
"""The report of a comparison: ``results.json`` for programs, ``report.md`` and ``report.html`` for people.

It says what the numbers allow and no more: every score has its interval and number of items, every arm its number of
seeds, and a difference whose interval contains 0 is called so. Nothing is left out because it looks bad.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from nemo_rba.evaluation import plots
from nemo_rba.evaluation.conditions import HeldOut
from nemo_rba.evaluation.document import Block, Bullets, Figure, Heading, Link, Paragraph, Table, write_document
from nemo_rba.evaluation.modality import gap_blocks, number, probability, reading_blocks, robustness_blocks
from nemo_rba.evaluation.notes import cut_off_notes, honest_notes
from nemo_rba.evaluation.parts import cells, part_blocks, voice_blocks
from nemo_rba.evaluation.quantities import account_blocks, quantity_blocks
from nemo_rba.evaluation.results import Condition, Roles, summarise
from nemo_rba.evaluation.runner import Prediction
from nemo_rba.evaluation.statistics import Interval


def write_report(
    *,
    folder: str | Path,
    title: str,
    roles: Roles,
    predictions: Sequence[Prediction],
    curves: plots.TrainingCurves | None,
    budget: Mapping[str, Mapping[str, str]],
    notes: Sequence[str],
    held_out: Mapping[str, HeldOut],
    num_samples: int,
    num_draws: int,
    seed: int,
    identity: Mapping[str, str] | None = None,
    samples_page: str | None = None,
    accounts: Mapping[str, Mapping[str, float]] | None = None,
) -> dict:
    """Write the report into ``folder`` and return what stands in ``results.json``.

    Args:
        predictions: of all systems on all tasks, from ``runner.run``. Conditions of measure "score" are compared, those
            of measure "wer" are listed. All may have further measures.
        curves: None for none.
        budget: arm -> what it was given, e.g. {"RBA": {"clips": "1.9k", "time": "45 s"}}; columns of the gap table.
        held_out: how a condition's items reach the student, where that is not plain hearing: those that are read, or on
            a robustness curve, are shown on their own and not compared arm by arm.
        notes: what a reader must know besides: how settings were chosen, what was not run.
        num_samples: sample prompts shown, half of them improved and half of them worsened by the first arm.
        num_draws, seed: of the bootstrap and of the choice of samples.
        identity: where the numbers come from: models, data, seeds, decoding, version.
        samples_page: file beside the report that has every item, see ``browser.py``; None for none.
        accounts: condition -> what its scores have cost in this run, see ``rewards.votes.Accounted``; None for nothing.
    """
    conditions = summarise(predictions, roles, num_draws=num_draws, seed=seed)
    read = [condition for condition in conditions if condition.name in held_out and held_out[condition.name].typed]
    varied = [condition for condition in conditions if condition.name in held_out and held_out[condition.name].curve]
    compared = [c for c in conditions if c.measure == "score" and c not in read and c not in varied]
    headline = _headline(compared[0], roles) if compared else []
    all_notes = [*notes, *honest_notes(compared, roles, num_draws), *cut_off_notes(predictions, roles)]
    results = {
        "title": title,
        "identity": dict(identity or {}),
        "headline": headline,
        "notes": all_notes,
        "roles": asdict(roles),
        "conditions": [asdict(condition) for condition in conditions],
        "budget": budget,
    } | ({"accounts": accounts} if accounts else {})
    blocks = [
        *(Paragraph(sentence, is_lead=True) for sentence in headline),
        *(
            (*_systems(compared, roles), *_gap(compared, roles, budget), *part_blocks(compared, roles))
            if compared
            else ()
        ),
        *voice_blocks(compared, roles),
        *quantity_blocks(conditions, roles),
        *reading_blocks(read, predictions, roles, num_draws=num_draws, seed=seed),
        *gap_blocks(conditions, predictions, held_out, roles, num_draws=num_draws, seed=seed),
        *robustness_blocks(varied, held_out, roles),
        *_recognition(conditions, roles),
        *voice_blocks([c for c in conditions if c.measure == "wer" and c not in varied], roles),
        *account_blocks(accounts or {}),
        *_curves(curves, roles),
        *(_samples(compared[0], predictions, roles, num_samples, seed) if compared else ()),
        *([Link("All items, to search, compare and hear", samples_page)] if samples_page else []),
        *(Heading("Notes"), Bullets(all_notes)),
        *((Heading("Where this comes from"), Bullets([f"{k}: {v}" for k, v in identity.items()])) if identity else ()),
    ]
    folder = Path(folder)
    write_document(folder, "report", title, blocks)
    (folder / "results.json").write_text(json.dumps(_plain(results), indent=2, ensure_ascii=False) + "\n")
    return results


def _headline(condition: Condition, roles: Roles) -> list[str]:
    whole, first = condition.whole, roles.arms[0]
    closed, seeds = whole.gap_closed.get(first), len(whole.seeds[first])
    arm, teacher = (whole.scores[label].value for label in (first, roles.teacher))
    before = f"{whole.scores[roles.start].value:.1f}" if roles.start else ""
    basis = f"{condition.name}, {whole.size}, {seeds} seed{'s' if seeds > 1 else ''}"
    if closed is None:
        sentences = [
            f"{first} scores {number(whole.scores[first])} where the teacher, who reads, scores "
            f"{number(whole.scores[roles.teacher])} ({basis})."
        ]
    elif closed.is_defined:
        sentences = [
            f"{first} closed {number(closed, ' %')} of the gap between hearing and reading: {before} before, "
            f"{arm:.1f} after, {teacher:.1f} for the teacher who reads ({basis})."
        ]
    else:
        sentences = [f"There is no gap to close: start {before}, teacher {teacher:.1f}; {first} {arm:.1f} ({basis})."]
    if roles.arms[1:]:
        rival = whole.best_arm(roles.arms[1:])
        difference = whole.differences[rival]
        verdict = "" if difference.excludes_zero else ", which is not distinguishable from 0"
        sentences.append(f"Against the best rival, {rival}: {number(difference, ' points', sign=True)}{verdict}.")
    return sentences


def _systems(conditions: Sequence[Condition], roles: Roles) -> list[Block]:
    columns = [dict(zip(roles.labels, cells(c.whole.scores, roles), strict=True)) for c in conditions]
    rows = [[label, str(len(roles.seeds(label))), *(found[label] for found in columns)] for label in roles.labels]
    header = ["system", "seeds", *(f"{_described(c)} ({c.whole.size})" for c in conditions)]
    caption = (
        "Dots: score, mean over seeds. Bars: 95 % interval over items. Rings: single seeds. Hairlines: "
        f"{'start, teacher' if roles.start else 'teacher'}."
    )
    return [
        Heading("How well each system follows spoken instructions"),
        Figure("systems", plots.systems_figure(conditions, roles), caption),
        Table(header, rows),
    ]


def _described(condition: Condition) -> str:
    return f"{condition.name}, {condition.quantity}" if condition.quantity else condition.name


def _gap(conditions: Sequence[Condition], roles: Roles, budget: Mapping[str, Mapping[str, str]]) -> list[Block]:
    columns = list(dict.fromkeys(column for given in budget.values() for column in given))
    header = ["arm", *columns]
    if not roles.start and not roles.arms[1:]:
        return []
    for condition in conditions:
        header += [f"gap closed, {condition.name}", "minus the start, points"] if roles.start else []
        place = "" if roles.start else f"{condition.name}: "
        header += [f"{place}{roles.arms[0]} minus it, points"] * bool(roles.arms[1:])
    rows = []
    for arm in roles.arms:
        row = [arm, *(budget[arm][c] if arm in budget and c in budget[arm] else "–" for c in columns)]
        for condition in conditions:
            whole = condition.whole
            row += [number(whole.gap_closed[arm], " %"), _tested(whole.gains[arm])] if roles.start else []
            if roles.arms[1:]:
                row.append(_tested(whole.differences[arm]) if arm in whole.differences else "–")
        rows.append(row)
    if not roles.start:
        return [Heading("The first model against the others"), Table(header, rows)]
    caption = (
        "Gap closed = (aligned - start) / (teacher - start), paired bootstrap over items, 95 %. p: two-sided, paired "
        "approximate randomisation over items."
    )
    return [
        Heading("How much of the modality gap was closed"),
        Figure("gap", plots.gap_figure(conditions, roles), caption),
        Table(header, rows),
    ]


def _tested(difference: Interval) -> str:
    p_value = probability(difference)
    return number(difference, sign=True) + ("" if p_value == "–" else f", p {p_value}")


def _recognition(conditions: Sequence[Condition], roles: Roles) -> list[Block]:
    rows = [
        [
            c.name,
            str(c.whole.num_items),
            *(number(c.whole.scores[x]) if x in c.whole.scores else "–" for x in roles.labels),
        ]
        for c in conditions
        if c.measure == "wer"
    ]
    rows += [
        [f"{c.name}: words a cascade answered to", str(c.whole.num_items)]
        + [f"{c.heard_wer[label]:.1f}" if label in c.heard_wer else "–" for label in roles.labels]
        for c in conditions
        if c.heard_wer
    ]
    if not rows:
        return []
    return [
        Heading("Recognition: word error rate in percent, lower is better"),
        Table(["set", "items", *roles.labels], rows),
    ]


def _curves(curves: plots.TrainingCurves | None, roles: Roles) -> list[Block]:
    if curves is None:
        return []
    caption = "Strong lines: smoothed mean over seeds. Pale lines: single seeds."
    return [Heading("Training"), Figure("curves", plots.curves_figure(curves, roles), caption)]


def _samples(
    condition: Condition, predictions: Sequence[Prediction], roles: Roles, num_samples: int, seed: int
) -> list[Block]:
    """Items on which start and first arm differ in score, half improved and half worsened, chosen by a seeded draw.

    Without a start, those on which first arm and teacher differ.
    """
    labels = [*dict.fromkeys((roles.bounds[0], roles.arms[0], roles.teacher))]
    sides = [
        {p.id: p for p in predictions if p.task == condition.name and p.system == roles.seeds(label)[0]}
        for label in labels
    ]
    before, after = sides[:2]
    change = {id: after[id].value - before[id].value for id in sorted(before)}
    rng = np.random.default_rng(seed)
    rows = []
    for verdict, sign in (("better", 1), ("worse", -1)):
        ids = [id for id, delta in change.items() if sign * delta > 0]
        for pick in rng.permutation(len(ids))[: num_samples // 2]:
            item = before[ids[pick]]
            prompt = f"[{item.context}] {item.text}" if item.context else item.text
            answers = [side[item.id].response for side in sides]
            rows.append([verdict, prompt, *(answer or "(empty)" for answer in answers)])
    counts = [sum(sign * delta > 0 for delta in change.values()) for sign in (1, -1)]
    summary = (
        f"{condition.name}: of {len(change)} items, {roles.arms[0]} (first seed) answers {counts[0]} better and "
        f"{counts[1]} worse than {'the start' if roles.start else 'the teacher'}. A seeded draw from both:"
    )
    heads = [f"before: {roles.start}", f"after: {roles.arms[0]}", roles.teacher] if roles.start else labels
    header = ["now" if roles.start else f"{roles.arms[0]} is", "said", *heads]
    return [Heading("Sample prompts"), Paragraph(summary), Table(header, rows, is_numeric=False)]


def _plain(value: object) -> object:
    """For JSON, which has no nan: null instead."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
