# SPDX-License-Identifier: Apache-2.0
"""The benchmark's tables as Markdown, and its picture."""

import statistics
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from bench.generation import AIMS, Comparison, cost_per_prompt
from bench.training import SHARES

OURS, NEMO, PALE, INK = "#0969a8", "#d97706", "#d8dee4", "#1f2328"


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Markdown of rows with the same columns."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([row[column] for column in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def picture(
    speeds: Sequence[Comparison], by_group: Sequence[Sequence[Comparison]], by_audio: Sequence[Sequence[Comparison]],
    shares: Mapping[str, Sequence[float]],
) -> Figure:  # fmt: skip
    """Speed against NeMo, cost against G, cost against audio, and shares of a step."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(figure)
    ((speed, groups), (share, audio)) = figure.subplots(2, 2)
    _draw_speeds(speed, speeds)
    _draw_costs(groups, by_group, "group", "answers per prompt, G")
    _draw_costs(audio, by_audio, "seconds", "seconds of audio")
    _draw_shares(share, shares)
    for axes in (speed, groups, audio, share):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontweight="bold", fontsize=10.5)


def _draw_speeds(axes: Axes, speeds: Sequence[Comparison]) -> None:
    labels = [f"{one.llm}\n{one.load.seconds:g} s" for one in speeds]
    for place, one in enumerate(speeds):
        ratio, low, high = one.nemo.over(one.ours)
        axes.bar(place, ratio, width=0.6, color=OURS)
        axes.errorbar(place, ratio, [[ratio - low], [high - ratio]], color=INK, linewidth=1, capsize=3)
        axes.annotate(f"{ratio:.2f}", (place, 0.1), color="white", ha="center", fontweight="bold")
        if one.load.seconds in AIMS:
            axes.hlines(AIMS[one.load.seconds], place - 0.4, place + 0.4, color=NEMO, linestyle="--")
    axes.axhline(1, color=PALE, zorder=0)
    axes.set_xticks(range(len(speeds)), labels)
    axes.set_ylabel("times as fast as NeMo (dashed: aim)")
    _title(axes, f"Group sampling, G = {speeds[0].load.group}")


def _draw_costs(axes: Axes, sweeps: Sequence[Sequence[Comparison]], attribute: str, label: str) -> None:
    for sweep, style in zip(sweeps, ("-", "--", ":"), strict=False):
        places = [getattr(one.load, attribute) for one in sweep]
        for name, colour in (("ours", OURS), ("nemo", NEMO)):
            costs = [cost_per_prompt(getattr(one, name), one.load) for one in sweep]
            title = f"{'NeMo' if name == 'nemo' else 'ours'}, {sweep[0].llm}"
            axes.plot(places, costs, style, marker="o", markersize=4, color=colour, label=title)
    fixed = sweeps[0][0].load
    _title(axes, f"Cost, {fixed.seconds:g} s of audio" if attribute == "group" else f"Cost, G = {fixed.group}")
    axes.set_xlabel(label)
    axes.set_ylabel("CPU ms per prompt")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(places)
    axes.legend(frameon=False, fontsize=8)


def _draw_shares(axes: Axes, shares: Mapping[str, Sequence[float]]) -> None:
    medians = {SHARES.get(label, label): statistics.median(values) for label, values in shares.items()}
    total = sum(medians.values())
    names = list(medians)[::-1]
    axes.barh(names, [100 * medians[name] / total for name in names], color=OURS)
    for place, name in enumerate(names):
        value = 100 * medians[name] / total
        axes.annotate(f"{value:.1f} %", (value, place), (4, -3), textcoords="offset points", fontsize=8)
    axes.set_xlabel("% of CPU time")
    axes.margins(x=0.15)
    _title(axes, "One RL step of the tiny recipe")
