# SPDX-License-Identifier: Apache-2.0
"""A benchmark as a manifest, whole or not at all, and what became of its items."""

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nemo_rba.benchmarks.benchmark import Benchmark
from nemo_rba.manifest import ManifestWriter, check_manifest

SUMMARY = "benchmark.json"


def write_benchmark(benchmark: Benchmark, folder: Path, *, shard_size: int, audio_format: str) -> None:
    """Write the Shar folder of a benchmark, and beside its shards ``benchmark.json``, which ``render`` shows.

    Shards are written aside and moved into ``folder`` when they are complete; what an interrupted call left is removed.

    Args:
        shard_size: items per shard.
        audio_format: flac or wav, both 16-bit.

    Raises:
        ValueError: no item can be used, or what was written does not read back.
    """
    draft = folder / ".draft"
    for path in (draft, *folder.glob("cuts.*"), *folder.glob("recording.*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    tasks: Counter[str] = Counter()
    seconds = 0.0
    with ManifestWriter(
        folder=draft, shard_size=shard_size, audio_format=audio_format, teacher=benchmark.name, first_shard=0
    ) as writer:
        for utterance in tqdm(benchmark, desc=benchmark.name, unit=" items"):
            writer.write(utterance)
            tasks[utterance.instruction.task] += 1
            seconds += len(utterance.audio) / utterance.sampling_rate
    if not tasks:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in benchmark.counts.most_common())
        raise ValueError(f"{benchmark.name}: no item can be used: {reasons or 'the set is empty'}")
    problems = check_manifest(draft, needs_response=False).problems
    if problems:
        raise ValueError(f"{benchmark.name}: what was written does not read back: {'; '.join(problems[:5])}")
    for path in sorted(draft.iterdir(), reverse=True):  # recordings before cuts
        path.replace(folder / path.name)
    draft.rmdir()
    summary = {
        "name": benchmark.name,
        "measure": dict(benchmark.measure),
        "items": tasks.total(),
        "seconds": round(seconds, 2),
        "tasks": dict(sorted(tasks.items())),
        "skipped": dict(benchmark.counts.most_common()),
    }
    (folder / SUMMARY).write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_summary(folder: Path) -> dict[str, Any]:
    """What ``write_benchmark`` kept of its work."""
    return json.loads((folder / SUMMARY).read_text(encoding="utf-8"))


def render(summary: Mapping[str, Any]) -> str:
    """A short table: items, hours, what was skipped and why, items of each task."""
    skipped = summary["skipped"]
    rows = [
        ("items", str(summary["items"])),
        ("hours", f"{summary['seconds'] / 3600:.2f}"),
        ("skipped", str(sum(skipped.values()))),
        *((f"skipped: {reason}", str(count)) for reason, count in skipped.items()),
        *((f"task {task}", str(count)) for task, count in summary["tasks"].items()),
    ]
    width = max(len(label) for label, _ in rows)
    measure = summary.get("measure")  # folders of an earlier version name none
    head = f"{summary['name']}, evaluation={measure['evaluation']}" if measure else summary["name"]
    return "\n".join([head, *(f"  {label:<{width}}  {value:>8}" for label, value in rows)])
