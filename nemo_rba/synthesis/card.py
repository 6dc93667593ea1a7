# SPDX-License-Identifier: Apache-2.0
"""The data card: what is in a synthetic data set, where it comes from, and what was dropped on the way."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from nemo_rba.synthesis.files import write_jsonl, write_text
from nemo_rba.synthesis.quality import BORDERLINE
from nemo_rba.synthesis.speech import HISTOGRAMS
from nemo_rba.synthesis.text import TextResult

PARTS = {"tasks": "task", "languages": "language", "speakers": "speaker"}  # what clips are counted by
NUM_EXAMPLES = 5  # of each split


def account(
    output: Path, text: TextResult, reports: Mapping[str, list[dict]], origin: Mapping, *, checked: bool
) -> dict:
    """Write ``counts.json``, ``dropped.jsonl`` and, if clips are checked, ``quality.jsonl``; returns the card.

    Args:
        reports: by split, of the shards that are done, see ``SpeechStage.report``.
        origin: code, teacher, seed and voices.
    """
    dropped = [{"id": i.id, "text": i.text, "response": i.response, "reason": r} for i, r in text.dropped]
    dropped += [row for shards in reports.values() for report in shards for row in report["dropped"]]
    write_jsonl(output / "dropped.jsonl", dropped)
    card = {
        "origin": origin,
        "sampled": text.num_sampled,
        "batches": text.num_batches,
        "dropped": dict(Counter(row["reason"] for row in dropped).most_common()),
        "instructions": {name: len(items) for name, items in text.splits.items()},
        "splits": {name: _sum_reports(shards) for name, shards in reports.items()},
    }
    if checked:
        rows = [row for shards in reports.values() for report in shards for row in report["quality"]]
        write_jsonl(output / "quality.jsonl", rows)
        card["quality"] = {name: _sum_quality(shards) for name, shards in reports.items()}
    write_text(output / "counts.json", json.dumps(card, indent=2, ensure_ascii=False) + "\n")
    examples = {
        name: [(i.text, i.response, i.task) for i in items[:NUM_EXAMPLES]] for name, items in text.splits.items()
    }
    return card | {"examples": examples}


def write_card(output: Path, card: Mapping) -> None:
    """``card.json``, ``card.md`` and its picture ``card.png``."""
    write_text(output / "card.json", json.dumps(card, indent=2, ensure_ascii=False) + "\n")
    _histograms(card["splits"]).savefig(output / "card.png", metadata={"Software": None})
    write_text(output / "card.md", render_card(card))


def render_card(card: Mapping) -> str:
    """``card.json`` as Markdown."""
    origin = card["origin"]
    lines = [
        "# Synthetic spoken instructions",
        "",
        f"Teacher: {origin['teacher']}. All speech and text is synthetic.",
        f"Made by {origin['code']}, seed {origin['seed']}.",
        "",
    ]
    lines += ["| split | clips | hours | speakers heard | tasks | voices |", "|---|---|---|---|---|---|"]
    for name, split in card["splits"].items():
        counts = f"{len(split['speakers'])} | {len(split['tasks'])} | {origin['voices'][name]}"
        lines.append(f"| {name} | {split['clips']} | {split['hours']:.3f} | {counts} |")
    lines += ["", "![How long clips are, and how many words are spoken and answered.](card.png)"]
    for key, title in PARTS.items():
        totals = {name: split[key] for name, split in card["splits"].items()}
        names = sorted({entry for counts in totals.values() for entry in counts})
        lines += ["", f"| {title} | {' | '.join(totals)} |", "|---" * (len(totals) + 1) + "|"]
        lines += [f"| {e} | {' | '.join(str(counts.get(e, 0)) for counts in totals.values())} |" for e in names]
    lines += ["", f"{card['sampled']} instructions were sampled in {card['batches']} batches.", ""]
    lines += ["| dropped for | count |", "|---|---|"] + [f"| {r} | {n} |" for r, n in card["dropped"].items()]
    if "quality" in card:
        lines += ["", "| split | spoken | kept | dropped | borderline |", "|---|---|---|---|---|"]
        for name, found in card["quality"].items():
            borderline = ", ".join(f"{reason} ({count})" for reason, count in found["borderline"].items())
            lines.append(f"| {name} | {found['spoken']} | {found['kept']} | {found['dropped']} | {borderline} |")
    lines += ["", "| split | instruction | response | task |", "|---|---|---|---|"]
    for name, rows in card["examples"].items():
        lines += [
            f"| {name} | {' | '.join(' '.join(cell.split()).replace('|', '/') for cell in row)} |" for row in rows
        ]
    return "\n".join(lines) + "\n"


def _sum_reports(shards: list[dict]) -> dict:
    total = {key: sum((Counter(shard[key]) for shard in shards), Counter()) for key in PARTS}
    seconds = sum(shard["seconds"] for shard in shards)
    histograms = {name: sum((Counter(shard["histograms"][name]) for shard in shards), Counter()) for name in HISTOGRAMS}
    ordered = {key: dict(sorted(counts.items())) for key, counts in total.items()}
    return {"clips": sum(shard["clips"] for shard in shards), "hours": seconds / 3600, **ordered,
            "histograms": {name: dict(sorted(counts.items(), key=lambda bar: float(bar[0])))
                           for name, counts in histograms.items()}}  # fmt: skip


def _sum_quality(shards: list[dict]) -> dict:
    borderline = Counter(row["reason"] for s in shards for row in s["quality"] if row["verdict"] == BORDERLINE)
    return {
        "spoken": sum(shard["items"] for shard in shards),
        "kept": sum(shard["clips"] for shard in shards),
        "dropped": sum(len(shard["dropped"]) for shard in shards),
        "borderline": dict(borderline.most_common()),
    }


def _histograms(splits: Mapping[str, dict]) -> Figure:
    """One panel a quantity, one step line a split, as shares of its clips."""
    with matplotlib.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9, 2.4), dpi=150, layout="constrained")
        for axes, (name, width) in zip(figure.subplots(1, len(HISTOGRAMS)), HISTOGRAMS.items(), strict=True):
            for split, found in splits.items():
                counts = {float(value): count for value, count in found["histograms"][name].items()}
                if counts:
                    first, last = min(counts), max(counts)
                    edges = [first + width * n for n in range(round((last - first) / width) + 2)]
                    shares = [100 * counts.get(edge, 0) / found["clips"] for edge in edges[:-1]]
                    axes.stairs(shares, edges, label=split, linewidth=1.2)
            axes.set(xlabel=name, ylabel="percent of clips", ylim=(0, None))
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    return figure
