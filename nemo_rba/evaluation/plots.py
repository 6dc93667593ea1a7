# SPDX-License-Identifier: Apache-2.0
"""Figures of the report, as PNG bytes. Results in, pictures out; no state, no pyplot, nothing written to disk.

One colour means one system in every figure: ink for the teacher, grey for the start and what is neither, colours for
the arms, the first arm strongest. Horizontal dot plots with 95 % intervals; small rings are single training seeds.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from nemo_rba.evaluation.results import Condition, Roles, Slice
from nemo_rba.evaluation.statistics import Interval

INK, GREY, PALE = "#1f2328", "#8c959f", "#d8dee4"
ARM_COLOURS = (
    "#0969a8", "#d97706", "#4d8c57", "#8a5a9e", "#b5485d", "#5b7f95", "#2f9e9e", "#a08a2c", "#7a4419", "#c2188b",
    "#3f51b5", "#93c01f",
)  # fmt: skip
OTHER_LINES = ("o--", "s:", "^-.", "D--", "v:")  # of those who are no arms, and share a colour
SETTINGS = {
    "font.size": 9.5,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.labelcolor": "#57606a",
    "axes.edgecolor": PALE,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "xtick.color": "#57606a",
    "ytick.color": INK,
    "ytick.left": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingCurves:
    """Where the training curves are.

    runs: label -> metric files of its seeds (CSV of Lightning's CSVLogger, or JSON lines); labels as in ``Roles``.
    panels: title -> column of those files, e.g. {"Reward": "reward/mean"}.
    step: column of the horizontal axis, e.g. "step"; its name is the axis label.
    """

    runs: Mapping[str, Sequence[str | Path]]
    panels: Mapping[str, str]
    step: str


def read_curve(path: str | Path, *, step: str, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values (S,) of the rows of a CSV or JSON-lines file that have both; none if there is no such column."""
    with Path(path).open(encoding="utf-8", newline="") as file:
        if Path(path).suffix == ".csv":
            rows = list(csv.DictReader(file))
        else:
            rows = [json.loads(line) for line in file if line.strip()]
    pairs = [(row[step], row[column]) for row in rows if step in row and column in row]
    points = np.array([[float(x), float(y)] for x, y in pairs if x not in ("", None) and y not in ("", None)])
    points = points.reshape(-1, 2)
    return tuple(points[np.isfinite(points).all(1)].T)


def systems_figure(conditions: Sequence[Condition], roles: Roles) -> bytes:
    """Score of every system, one panel per condition."""
    labels = [label for label in roles.labels if any(label in c.whole.scores for c in conditions)]
    with matplotlib.rc_context(SETTINGS):
        figure, panels = _panels(conditions, num_rows=len(labels))
        for condition, axes in zip(conditions, panels, strict=True):
            whole = condition.whole
            for label in roles.bounds:
                axes.axvline(whole.scores[label].value, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
            for row, label in enumerate(labels):
                if label in whole.scores:
                    _dot(axes, row, whole.scores[label], _colour(label, roles), whole.seeds[label])
            _rows(axes, labels, roles)
            axes.set_title(f"{condition.name} ({whole.size})")
            axes.set_xlabel(condition.quantity or "score, %")
        _share_x(panels)
        return _png(figure)


def gap_figure(conditions: Sequence[Condition], roles: Roles) -> bytes:
    """Share of the modality gap that each arm has closed, one panel per condition."""
    arms = list(roles.arms)
    with matplotlib.rc_context(SETTINGS):
        figure, panels = _panels(conditions, num_rows=len(arms) + 0.6)
        for condition, axes in zip(conditions, panels, strict=True):
            for row, arm in enumerate(arms):
                closed = condition.whole.gap_closed[arm]
                if closed.is_defined:
                    _dot(axes, row, closed, _colour(arm, roles), ())
                else:
                    axes.text(2, row, "no gap to close", va="center", color=GREY, backgroundcolor="white")
            axes.axvline(0, color=GREY, linewidth=1, zorder=0)
            axes.axvline(100, color=GREY, linewidth=1, zorder=0)
            for place, words in ((0, "start"), (100, "teacher")):
                axes.text(place, -0.72, words, ha="center", va="bottom", color="#57606a", fontsize=8.5)
            _rows(axes, arms, roles)
            axes.set_ylim(len(arms) - 0.5, -0.75)
            axes.set_title(condition.name, pad=16)
            axes.set_xlabel("modality gap closed, %")
        _share_x(panels)
        return _png(figure)


def robustness_figure(
    places: Sequence[float], scores: Mapping[str, Sequence[Interval]], roles: Roles, *, x_label: str, y_label: str
) -> bytes:
    """Score of every system over what was varied, e.g. the signal-to-noise ratio."""
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(7.4, 3.8), layout="constrained")
        axes = figure.subplots()
        others = dict(zip((label for label in scores if label not in roles.arms), OTHER_LINES, strict=False))
        for label, row in scores.items():
            colour, is_arm = _colour(label, roles), label in roles.arms
            axes.fill_between(
                places, [i.low for i in row], [i.high for i in row], color=colour, alpha=0.12, linewidth=0
            )
            axes.plot(
                places, [i.value for i in row], others.get(label, "o-"), color=colour, markersize=4.5,
                linewidth=1.9 if is_arm else 1.1, label=label,
            )  # fmt: skip
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(axis="y", color=PALE, linewidth=0.6)
        axes.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
        return _png(figure)


def families_figure(condition: Condition, roles: Roles) -> bytes:
    """From start to first arm, family by family, the widest remaining gap on top; a bar marks the teacher.

    Without a start, from the first arm to the teacher.
    """
    first, parts = roles.arms[0], condition.families
    order = sorted(parts, key=lambda f: parts[f].scores[first].value - parts[f].scores[roles.teacher].value)
    with matplotlib.rc_context(SETTINGS):
        rows = [(family, parts[family]) for family in order]
        other = roles.start or roles.teacher
        bars = [(part.scores[other].value, part.scores[first].value) for _, part in rows]
        figure, _ = _three_systems(condition, rows, bars, roles)
        return _png(figure)


def voices_figure(condition: Condition, shown: Mapping[str, str], roles: Roles, *, num_between: int) -> bytes:
    """Start, first arm with its interval over items, and teacher, voice by voice.

    Args:
        shown: voice -> its name here, from top to bottom.
        num_between: voices left out in the middle.
    """
    first = roles.arms[0]
    parts = [(name, condition.voices[voice]) for voice, name in shown.items()]
    with matplotlib.rc_context(SETTINGS):
        bars = [(part.scores[first].low, part.scores[first].high) for _, part in parts]
        figure, axes = _three_systems(condition, parts, bars, roles)
        if num_between:
            middle = len(parts) / 2 - 0.5
            axes.axhline(middle, color=GREY, linewidth=0.9, linestyle=(0, (1, 3)))
            axes.annotate(
                f"{num_between} between", (1.01, middle), xycoords=("axes fraction", "data"), ha="left", va="center",
                color=GREY, fontsize=8.5, annotation_clip=False,
            )  # fmt: skip
        return _png(figure)


def _three_systems(
    condition: Condition, parts: Sequence[tuple[str, Slice]], bars: Sequence[tuple[float, float]], roles: Roles
) -> tuple[Figure, Axes]:
    """One row a part: a ring for the start, if any, a dot on a pale bar for the first arm, a mark for the teacher."""
    first = roles.arms[0]
    colour = _colour(first, roles)
    figure = Figure(figsize=(7.4, 0.9 + 0.27 * len(parts)), layout="constrained")
    axes = figure.subplots()
    for row, ((_, part), bar) in enumerate(zip(parts, bars, strict=True)):
        axes.plot(bar, [row, row], color=colour, linewidth=2, alpha=0.35, solid_capstyle="butt", zorder=1)
        if roles.start:
            before = part.scores[roles.start].value
            axes.plot(before, row, "o", color="white", markeredgecolor=GREY, markersize=6, zorder=2)
        axes.plot(part.scores[first].value, row, "o", color=colour, markersize=6.5, zorder=3)
        axes.plot(part.scores[roles.teacher].value, row, "|", color=INK, markersize=12, markeredgewidth=2, zorder=2)
    legend = [("o", GREY, roles.start), ("o", colour, first), ("|", INK, roles.teacher)]
    for marker, edge, label in (entry for entry in legend if entry[2]):
        fill = "white" if label == roles.start else edge
        axes.plot([], [], marker, color=fill, markeredgecolor=edge, markersize=7, markeredgewidth=1.5, label=label)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, borderaxespad=0, handletextpad=0.3)
    _rows(axes, [f"{name} ({part.num_items})" for name, part in parts], roles)
    axes.set_xlabel(f"score on {condition.name}, %")
    return figure, axes


def curves_figure(curves: TrainingCurves, roles: Roles) -> bytes:
    """One small panel per metric; pale lines are single seeds, strong ones their smoothed mean."""
    columns = 2 if len(curves.panels) > 1 else 1
    rows = -(-len(curves.panels) // columns)
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(4.6 * columns, 2.35 * rows + 0.5), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for (title, column), axes in zip(curves.panels.items(), grid, strict=False):
            drawn = [_curve(axes, curves, label, column, _colour(label, roles)) for label in curves.runs]
            if not any(drawn):
                raise ValueError(
                    f"no run has both columns {curves.step!r} and {column!r} of panel {title!r}, files: "
                    f"{[str(path) for paths in curves.runs.values() for path in paths]}: change report.curves.panels"
                )
            axes.set_title(title)
            axes.tick_params(axis="y", left=False, colors="#57606a")
            axes.grid(axis="y", color=PALE, linewidth=0.6)
            axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
            axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
            axes.margins(x=0.01)
        for axes in grid[len(curves.panels) :]:
            axes.set_visible(False)
        for axes in grid[max(0, len(curves.panels) - columns) : len(curves.panels)]:
            axes.set_xlabel(curves.step)
        handles = [Line2D([], [], color=_colour(x, roles), linewidth=2.2, label=x) for x in curves.runs]
        _legend_above(figure, handles)
        return _png(figure)


def _legend_above(figure: Figure, handles: Sequence[Line2D]) -> None:
    """A legend in as few rows as the figure has room for."""
    for num_rows in range(1, len(handles) + 1):
        legend = figure.legend(
            handles=handles, loc="outside upper left", ncols=-(-len(handles) // num_rows), frameon=False,
            labelcolor="linecolor",
        )  # fmt: skip
        if legend.get_window_extent().width <= figure.bbox.width or num_rows == len(handles):
            return
        legend.remove()


def _curve(axes: Axes, curves: TrainingCurves, label: str, column: str, colour: str) -> bool:
    seeds = [read_curve(path, step=curves.step, column=column) for path in curves.runs[label]]
    seeds = [(steps, values) for steps, values in seeds if len(steps)]
    if not seeds:
        return False
    for steps, values in seeds:
        axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.25)
    longest = max(seeds, key=lambda seed: len(seed[0]))[0]
    shared = longest[longest <= min(steps[-1] for steps, _ in seeds)]
    mean = np.mean([np.interp(shared, steps, values) for steps, values in seeds], axis=0)
    axes.plot(shared, _smooth(mean), color=colour, linewidth=1.9)
    return True


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average over a twentieth of the curve; the window shrinks at the ends."""
    half = len(values) // 40
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _panels(conditions: Sequence[Condition], *, num_rows: float) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(2.2 + 3.4 * len(conditions), 1.0 + 0.36 * num_rows), layout="constrained")
    return figure, figure.subplots(1, len(conditions), squeeze=False, sharey=True)[0]


def _share_x(panels: Sequence[Axes]) -> None:
    """The same scale in all panels, with room for the numbers on the right."""
    low, high = min(axes.get_xlim()[0] for axes in panels), max(axes.get_xlim()[1] for axes in panels)
    for axes in panels:
        axes.set_xlim(low, high + 0.06 * (high - low))


def _dot(axes: Axes, row: int, interval: Interval, colour: str, seeds: Sequence[float]) -> None:
    axes.plot([interval.low, interval.high], [row, row], color=colour, linewidth=2.2, solid_capstyle="butt", alpha=0.55)
    axes.plot(interval.value, row, "o", color=colour, markersize=6.5)
    if len(seeds) > 1:
        axes.plot(seeds, [row + 0.27] * len(seeds), "o", color="white", markeredgecolor=colour, markersize=3.2)
    axes.annotate(
        f"{interval.value:.1f}",
        (interval.high, row),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        color=colour,
        fontweight="bold",
        path_effects=[withStroke(linewidth=2.5, foreground="white")],
    )


def _rows(axes: Axes, labels: Sequence[str], roles: Roles) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.6)
    for tick, label in zip(axes.get_yticklabels(), labels, strict=False):  # inner panels have none
        tick.set_fontweight("bold" if label == roles.arms[0] else "normal")
    axes.grid(axis="x", color=PALE, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.margins(x=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))


def _colour(label: str, roles: Roles) -> str:
    if label in roles.arms:
        return ARM_COLOURS[list(roles.arms).index(label) % len(ARM_COLOURS)]
    return INK if label == roles.teacher else GREY


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor="white")
    return buffer.getvalue()
