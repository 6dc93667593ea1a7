# SPDX-License-Identifier: Apache-2.0
"""The data card: what is in a synthetic data set, where it comes from, and what was dropped on the way.

Everything is counted from what is kept on the disk (batches of text, reports of shards), so a resumed run's card is
that of an uninterrupted one. What cannot be found there, the versions that worked on it, is kept in ``counts.json``.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from nemo_rba.synthesis import origin as origins
from nemo_rba.synthesis.files import write_jsonl, write_text
from nemo_rba.synthesis.quality import BORDERLINE
from nemo_rba.synthesis.speech import FAILED, HISTOGRAMS
from nemo_rba.synthesis.text import STEPS, TextResult

REPORTED = {"tasks": "task", "languages": "language", "speakers": "speaker"}  # what shards count clips by
PARTS = {"tasks": "task", "languages": "language of the voice", "accents": "voice's code", "speakers": "speaker"}
NUM_EXAMPLES = 5  # of each split
TOO_LONG = f"{FAILED}longer than"  # how reasons begin
SAME_ANSWER = "response: the same as another answer"
TO_SPEAK, SPOKEN, SHORT_ENOUGH, WRITTEN = "to speak", "spoken", "short enough", "checked and written"


def account(
    output: Path, text: TextResult, reports: Mapping[str, list[dict]], origin: Mapping, *, checked: bool
) -> dict:
    """Write ``counts.json``, ``dropped.jsonl`` and, if clips are checked, ``quality.jsonl``; returns the card.

    The settings of sampler and synthesizers are read from ``config.json``, where the run has left them.

    Args:
        reports: by split, of the shards that are done, see ``SpeechStage.report``.
        origin: code, teacher, seed and voices.
    """
    dropped = [{"id": i.id, "text": i.text, "response": i.response, "reason": r} for i, r in text.dropped]
    dropped += [row for shards in reports.values() for report in shards for row in report["dropped"]]
    write_jsonl(output / "dropped.jsonl", dropped)
    reasons = Counter(row["reason"] for row in dropped)
    settings = _read(output / "config.json")
    voices = {code for shards in reports.values() for shard in shards for code in shard["languages"]}
    card = {
        "origin": dict(origin) | {
            "made_with": _made_with(output),
            "sampler": settings.get("sampler"),
            "synthesizers": origins.synthesizers(settings),
        },
        "sampled": text.num_sampled,
        "batches": text.num_batches,
        "stages": {
            "text": {step: text.steps[step] for step in STEPS},
            "speech": {name: _steps(shards) for name, shards in reports.items()},
        },
        "dropped": dict(reasons.most_common()),
        "duplicates": _duplicates(reasons, text.num_sampled),
        "instructions": {name: len(items) for name, items in text.splits.items()},
        "text_languages": origins.text_languages(settings, text.splits, voices),
        "splits": {name: _sum_reports(shards) for name, shards in reports.items()},
    }  # fmt: skip
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
    _figure(card).savefig(output / "card.png", metadata={"Software": None})
    write_text(output / "card.md", render_card(card))


def render_card(card: Mapping) -> str:
    """``card.json`` as Markdown."""
    origin, splits = card["origin"], card["splits"]
    lines = ["# Synthetic spoken instructions", "", *_origin_lines(origin), ""]
    lines += ["| split | clips | hours | speakers heard | tasks | voices |", "|---|---|---|---|---|---|"]
    for name, split in splits.items():
        counts = f"{len(split['speakers'])} | {len(split['tasks'])} | {origin['voices'][name]}"
        lines.append(f"| {name} | {split['clips']} | {split['hours']:.3f} | {counts} |")
    lines += ["", "![How far texts came, how long clips are, and how many words are spoken and answered.](card.png)"]
    lines += _stage_lines(card)
    languages = card["text_languages"]
    lines += _table(f"language of the text ({languages['as']})", languages["splits"])
    for key, title in PARTS.items():
        lines += _table(title, {name: split[key] for name, split in splits.items()})
    lines += ["", "| dropped for | count |", "|---|---|"] + [f"| {r} | {n} |" for r, n in card["dropped"].items()]
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


def _origin_lines(origin: Mapping) -> list[str]:
    """Who made it, with what."""
    lines = [f"Teacher: {origin['teacher']}. All speech and text is synthetic.",
             f"Made by {origin['code']}, seed {origin['seed']}."]  # fmt: skip
    for versions in origin["made_with"]:
        lines.append("- with " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    lines.append(f"- instructions by {origins.in_words(origin['sampler'])}")
    told = {name: origins.in_words(node) for name, node in origin["synthesizers"].items()}
    for voice in dict.fromkeys(told.values()):
        lines.append(f"- {', '.join(name for name in told if told[name] == voice)} spoken by {voice}")
    return [*lines[:2], "", *lines[2:]]


def _stage_lines(card: Mapping) -> list[str]:
    """How far texts and clips came, and how many texts were there already."""
    stages = card["stages"]
    lines = ["", f"{card['sampled']} instructions were sampled in {card['batches']} batches.", ""]
    lines += ["| " + " | ".join(stages["text"]) + " |", "|---" * len(stages["text"]) + "|"]
    lines += ["| " + " | ".join(map(str, stages["text"].values())) + " |"]
    names = [TO_SPEAK, SPOKEN, SHORT_ENOUGH, WRITTEN]
    lines += ["", f"| split | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {s} | {' | '.join(str(found[n]) for n in names)} |" for s, found in stages["speech"].items()]
    repeated = card["duplicates"]
    told = ", ".join(f"{count} {name}" for name, count in repeated["by filter"].items()) or "none"
    return [*lines, "", f"Duplicates dropped: {told}; {repeated['share of sampled']:.1%} of what was sampled."]


def _table(title: str, totals: Mapping[str, Mapping[str, int]]) -> list[str]:
    """A row an entry, a column a split."""
    names = sorted({entry for counts in totals.values() for entry in counts})
    lines = ["", f"| {title} | {' | '.join(totals)} |", "|---" * (len(totals) + 1) + "|"]
    return lines + [f"| {e} | {' | '.join(str(counts.get(e, 0)) for counts in totals.values())} |" for e in names]


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _made_with(output: Path) -> list[dict]:
    """The versions of every run that worked on it, in order; the ones before this stand in ``counts.json``."""
    before = _read(output / "counts.json").get("origin", {}).get("made_with", [])
    now = origins.versions()
    return before if now in before else [*before, now]


def _steps(shards: list[dict]) -> dict[str, int]:
    """How many clips of a split came how far. What is too long before or after augmentation is counted as one."""
    reasons = Counter(row["reason"] for shard in shards for row in shard["dropped"])
    long = sum(count for reason, count in reasons.items() if reason.startswith(TOO_LONG))
    unspoken = sum(count for reason, count in reasons.items() if reason.startswith(FAILED)) - long
    items = sum(shard["items"] for shard in shards)
    return {TO_SPEAK: items, SPOKEN: items - unspoken, SHORT_ENOUGH: items - unspoken - long,
            WRITTEN: sum(shard["clips"] for shard in shards)}  # fmt: skip


def _duplicates(reasons: Mapping[str, int], num_sampled: int) -> dict:
    """Texts that were there already, by the filter that found them, exact or near; answers given twice beside them."""
    found = Counter()
    for reason, count in reasons.items():
        name = reason.partition(":")[0]
        if name.endswith("duplicate"):
            found[name] += count
    answers = sum(count for reason, count in reasons.items() if reason.startswith(SAME_ANSWER))
    return {"by filter": dict(found), "share of sampled": found.total() / max(1, num_sampled),
            "answers given twice": answers}  # fmt: skip


def _sum_reports(shards: list[dict]) -> dict:
    total = {key: sum((Counter(shard[key]) for shard in shards), Counter()) for key in REPORTED}
    total |= {"accents": total["languages"], "languages": Counter()}
    for code, count in total["accents"].items():
        total["languages"][origins.language_of(code)] += count
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


def _figure(card: Mapping) -> Figure:
    """How far texts came above, one panel a quantity of clips below."""
    with matplotlib.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9, 4.4), dpi=150, layout="constrained")
        above, below = figure.subfigures(2, 1, height_ratios=[1, 1.2])
        steps = card["stages"]["text"] | {"clips of all splits": sum(s["clips"] for s in card["splits"].values())}
        axes = above.subplots()
        bars = axes.barh(list(steps), list(steps.values()), height=0.6, color=["0.75"] * (len(steps) - 1) + ["0.45"])
        axes.bar_label(bars, [f"{count:,}" for count in steps.values()], padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.08)
        axes.set(xlabel="texts, at last clips")
        _histograms(below, card["splits"])
    return figure


def _histograms(figure, splits: Mapping[str, dict]) -> None:
    """One panel a quantity, one step line a split, as shares of its clips."""
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
