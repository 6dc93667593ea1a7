# SPDX-License-Identifier: Apache-2.0
"""Self-synthesis measured: what it costs beside its synthesizer alone, by ranks, by the size of the data set.

    python examples/rba_bench_synthesis.py                              # tables in runs/bench_synthesis
    python examples/rba_bench_synthesis.py --items 1000 10000 50000     # memory of larger data sets

CPU only, espeak-ng. Stages are CPU seconds of one process, medians of all repeats, taken in turns.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from bench import synthesis
from nemo.utils import logging


def tables(*, clips: int, repeats: int, ranks: Sequence[int], items: Sequence[int], texts: int) -> str:
    """All tables as Markdown."""
    sections = {
        f"Speech beside the synthesizer alone: {clips} clips of 11 to 13 words": synthesis.stage_rows(
            synthesis.stages(clips=clips, num_words=10, repeats=repeats)
        ),
        f"Whole pipeline by ranks: {clips} clips": synthesis.ranks(clips=clips, num_words=10, numbers=ranks),
        "Memory of the whole pipeline": synthesis.memory(items),
        "De-duplication": synthesis.deduplication(texts),
    }
    body = "\n".join(f"## {title}\n\n{_table(rows)}" for title, rows in sections.items())
    return f"# Self-synthesis\n\n{repeats} repeats.\n\n{body}"


def _table(rows: Sequence[dict[str, str]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=600)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--items", type=int, nargs="+", default=[1000, 10000])
    parser.add_argument("--texts", type=int, default=100_000)
    parser.add_argument("--output", type=Path, default=Path("runs/bench_synthesis"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.setLevel(logging.ERROR)
    text = tables(clips=args.clips, repeats=args.repeats, ranks=args.ranks, items=args.items, texts=args.texts)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "bench.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
