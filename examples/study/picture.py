# SPDX-License-Identifier: Apache-2.0
"""A study in one picture: a row an arm, a line of panels for each number of prompts, a panel a condition."""

import io
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from nemo_rba.evaluation import plots

TRIAL, RIVAL = plots.ARM_COLOURS[0], "#57606a"


def draw_study(results: Mapping[str, dict], labels: Sequence[str]) -> bytes:
    """PNG: how much of the gap each arm has closed in the first condition, and what it scores in the others.

    Args:
        results: number of prompts -> what ``evaluation.report.write_report`` returned; the same conditions in all.
        labels: of the arms, from above; the first is on trial.
    """
    conditions = [condition["name"] for condition in next(iter(results.values()))["conditions"]]
    with matplotlib.rc_context(plots.SETTINGS):
        size = (3.0 + 3.6 + 1.7 * (len(conditions) - 1), len(results) * (1.1 + 0.27 * len(labels)))
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(
            len(results), len(conditions), squeeze=False, sharey=True, sharex="col",
            width_ratios=[2.0, *[1.0] * (len(conditions) - 1)],
        )  # fmt: skip
        for line, (prompts, result) in zip(grid, results.items(), strict=True):
            for axes, condition in zip(line, result["conditions"], strict=True):
                is_first = axes is line[0]
                _panel(axes, condition["whole"], labels, result["roles"], is_gap=is_first)
                name = f"{prompts} prompts, {condition['name']}" if is_first else condition["name"]
                axes.set_title(name, fontsize=9.5)
                axes.set_xlabel("modality gap closed, %" if is_first else "score, %")
        for number, column in enumerate(grid.T):  # whose panels have one scale
            left, right = column[0].get_xlim()
            column[0].set_xlim(left, right + (0.2 if number else 0.08) * (right - left))  # room for the numbers
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160, facecolor="white")
    return buffer.getvalue()


def _panel(axes: Axes, whole: dict, labels: Sequence[str], roles: dict, *, is_gap: bool) -> None:
    """Dots with intervals; small rings are seeds; the upright line is the start model."""
    low, high = (whole["scores"][roles[who]]["value"] for who in ("start", "teacher"))
    axes.axvline(0 if is_gap else low, color=plots.GREY, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
    for row, label in enumerate(labels):
        found = whole["gap_closed" if is_gap else "scores"][label]
        seeds = whole["seeds"][label]
        if is_gap:
            seeds = [100 * (score - low) / (high - low) for score in seeds if high != low]
        colour = RIVAL if row else TRIAL
        axes.plot([found["low"], found["high"]], [row, row], color=colour, linewidth=2.0, alpha=0.5)
        axes.plot(found["value"], row, "o", color=colour, markersize=5.5)
        if len(seeds) > 1:
            axes.plot(seeds, [row + 0.3] * len(seeds), "o", color="white", markeredgecolor=colour, markersize=2.6)
        axes.annotate(
            f"{found['value']:.1f}", (max(found["high"], *seeds), row), xytext=(4, 0), textcoords="offset points",
            va="center", color=colour, fontsize=8, fontweight="normal" if row else "bold",
            path_effects=[withStroke(linewidth=2.0, foreground="white")],
        )  # fmt: skip
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.7)
    axes.grid(axis="x", color=plots.PALE, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.margins(x=0.08)
