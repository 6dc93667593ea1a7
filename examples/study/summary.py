# SPDX-License-Identifier: Apache-2.0
"""A study's results: a report for each number of prompts, and one table and one picture over all of them."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig
from recipe_identity import identity
from recipe_parts import clips_heard

from nemo_rba.evaluation.conditions import HeldOut
from nemo_rba.evaluation.document import Bullets, Figure, Heading, Paragraph, Table, write_document
from nemo_rba.evaluation.plots import TrainingCurves
from nemo_rba.evaluation.report import write_report
from nemo_rba.evaluation.results import Roles
from nemo_rba.evaluation.runner import Prediction
from study.picture import draw_study
from study.runs import Run, config, is_bracketed

FIXED = {"teacher": "Teacher reads the text (T)", "cascade": "Cascade", "start": "Start (S0)"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """Everything that was found."""

    config: DictConfig
    recipe: DictConfig
    scores: dict[Run, float]  # dev score of the grid's runs
    chosen: dict[tuple[int, str], Run]
    predictions: Sequence[Prediction]
    sets: dict[str, HeldOut]


def write_study(study: Study, folder: Callable[[DictConfig, Run], Path]) -> None:
    """Reports of all sizes, then ``study.md`` and ``study.html`` in the study's folder."""
    output = Path(study.config.output)
    results = {size: _report(study, int(size), folder, output / f"n{size}") for size in study.config.prompts}
    labels = {arm: choice.label for arm, choice in study.config.arms.items()}
    blocks = [
        *(Paragraph(f"{size} prompts. {line}", is_lead=True) for size, r in results.items() for line in r["headline"]),
        Heading("How much of the modality gap was closed"),
        Figure("arms", draw_study(results, list(labels.values())), _caption(study)),
        *(_table(size, result, labels.values()) for size, result in results.items()),
        Heading(f"Learning rates: 100 x {_monitor(study)} on dev of each; the chosen one is marked"),
        *(_grid(study, int(size)) for size in results),
        Heading("Protocol"),
        Bullets(_protocol(study)),
    ]
    write_document(output, "study", f"{study.config.name}: does reinforcement beat distillation?", blocks)
    (output / "study.json").write_text(json.dumps(results, indent=2) + "\n")


def _report(study: Study, prompts: int, folder: Callable, output: Path) -> dict:
    seeds = study.config.seeds
    arms = {arm: choice.label for arm, choice in study.config.arms.items()}
    final = {
        arm: [
            Run(arm=arm, prompts=prompts, learning_rate=study.chosen[prompts, arm].learning_rate, seed=s) for s in seeds
        ]
        for arm in arms
    }
    systems = FIXED | {run.name: arms[arm] for arm, runs in final.items() for run in runs}
    paths = {arm: [folder(study.config, run) for run in runs] for arm, runs in final.items()}
    cfg = study.recipe
    recipes = {arm: config(study.config, runs[0]) for arm, runs in final.items()}  # an arm may have other steps
    clips = {arm: clips_heard(its, its.trainer.max_steps) for arm, its in recipes.items()}
    seconds = {
        arm: [json.loads((p / "done.json").read_text())["seconds"] for p in found] for arm, found in paths.items()
    }
    return write_report(
        folder=output,
        title=f"{study.config.name}: {prompts} spoken prompts",
        roles=Roles(systems=systems, teacher=FIXED["teacher"], start=FIXED["start"], arms=list(arms.values())),
        predictions=[prediction for prediction in study.predictions if prediction.system in systems],
        curves=TrainingCurves(
            runs={arms[arm]: [p / "metrics.jsonl" for p in found] for arm, found in paths.items()},
            panels={"Dev": _monitor(study), "Reward": "reward/mean"},
            step="step",
        ),
        budget={
            arms[arm]: {
                "rate": f"{study.chosen[prompts, arm].learning_rate:g}", "clips": f"{clips[arm]:,}",
                "time": f"{sum(found) / len(found):.0f} s",
            }
            for arm, found in seconds.items()
        },
        notes=_protocol(study),
        held_out=study.sets,
        num_samples=cfg.evaluation.num_samples,
        num_draws=cfg.evaluation.num_draws,
        seed=cfg.seed,
        identity=identity(cfg, study.sets, list(arms.values())),
    )  # fmt: skip


def _monitor(study: Study) -> str:
    return study.recipe.exp_manager.checkpoint_callback_params.monitor


def _table(size: str, result: dict, labels: Sequence[str]) -> Table:
    """One row an arm: its budget, the gap closed in the first condition and its kinds, and what else was asked."""
    first, *others = result["conditions"]
    whole, kinds = first["whole"], first["kinds"]
    trial = result["roles"]["arms"][0]
    header = [f"{size} prompts", "rate", "clips", "time", "gap closed", *kinds, f"{trial} minus it, points"]
    header += [f"{c['name']}: score" for c in others]
    rows = []
    for label in labels:
        budget = result["budget"][label]
        row = [label, budget["rate"], budget["clips"], budget["time"], _interval(whole["gap_closed"][label], " %")]
        row += [f"{part['gap_closed'][label]['value']:.1f} %" for part in kinds.values()]
        row.append(_difference(whole, trial, label) if label in whole["differences"] else "–")
        rows.append(row + [f"{c['whole']['scores'][label]['value']:.1f}" for c in others])
    start = result["roles"]["start"]
    rows.append([start, *["–"] * (5 + len(kinds)), *(f"{c['whole']['scores'][start]['value']:.1f}" for c in others)])
    return Table(header, rows)


def _difference(whole: dict, trial: str, label: str) -> str:
    """Of the means, its interval over items, and each seed's own: how runs differ is in no interval over items."""
    mean, seeds = _interval(whole["differences"][label], ""), whole["seeds"]
    single = [f"{ours - theirs:.1f}" for ours, theirs in zip(seeds[trial], seeds[label], strict=True)]
    return f"{mean}; {', '.join(single)}" if len(single) > 1 else mean


def _interval(found: dict, unit: str) -> str:
    return f"{found['value']:.1f}{unit} [{found['low']:.1f}, {found['high']:.1f}]"


def _grid(study: Study, prompts: int) -> Table:
    rows = []
    for arm, choice in study.config.arms.items():
        best, cells = study.chosen[prompts, arm], []
        for rate in sorted(choice.learning_rates):
            run = Run(arm=arm, prompts=prompts, learning_rate=rate, seed=study.config.seeds[0])
            cells.append(f"{rate:g}: {100 * study.scores[run]:.1f}{' ◄' if run == best else ''}")
        rows.append([choice.label, *cells, "yes" if is_bracketed(study.config, best) else "no"])
    count = len(rows[0]) - 2
    return Table([f"{prompts} prompts", *(f"rate {i + 1}" for i in range(count)), "bracketed"], rows)


def _caption(study: Study) -> str:
    seeds = len(study.config.seeds)
    line = (
        f"Left: mean over {seeds} seed{'s' if seeds > 1 else ''} of (aligned - start) / (teacher - start); right: "
        "scores. Broken line: the start. Bars: 95 % intervals, paired bootstrap over items."
    )
    return line if seeds == 1 else f"{line} Small rings: single seeds, whose differences are in no bar."


def _protocol(study: Study) -> list[str]:
    seeds = list(study.config.seeds)
    return [
        "Every arm: the same start, size of batches, voices, noise, frozen parts and checkpoint rule; a grid of "
        f"learning rates of the same size, chosen on dev with seed {seeds[0]}. Test sets were read once, at the end.",
        f"Seeds {seeds}: each draws its own prompts from the same pool of {study.recipe.data.num_train} (all of it "
        "where a size is as large), its own order and its own samples.",
        "Clips heard, and the time of a run, two side by side, are in the table; an arm with more clips is named so.",
    ]
