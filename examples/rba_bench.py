# SPDX-License-Identifier: Apache-2.0
"""What the shared prompt saves, measured beside what it replaces: same weights, same clips, same run.

    python examples/rba_bench.py                       # five tables and a picture in runs/bench
    python examples/rba_bench.py --sizes small         # without the 19 M model
    python examples/rba_bench.py --only speed updates  # some of the tables

CPU only. Times are CPU seconds on one torch thread, medians with the range of all repeats.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from bench import generation, memory, page, training
from bench.systems import Load, Size, load_ours, write_salm
from nemo.utils import logging

SIZES = {"small": Size(hidden=128, layers=4), "large": Size(hidden=512, layers=6)}
TABLES = ("speed", "sweeps", "updates", "shares", "memory")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is measured."""

    sizes: Sequence[Size]
    load: Load  # of the first table; its seconds are the audio of the sweep over G
    update_prompts: int
    seconds: Sequence[float]
    groups: Sequence[int]
    lengths: Sequence[float]
    sweep_prompts: int
    repeats: int
    step_prompts: int  # of the RL step
    tables: Sequence[str] = TABLES


@dataclass(slots=True)
class Findings:
    """What was found, table by table."""

    speeds: list[generation.Comparison] = field(default_factory=list)
    by_group: list[list[generation.Comparison]] = field(default_factory=list)
    by_audio: list[list[generation.Comparison]] = field(default_factory=list)
    updates: list[training.Update] = field(default_factory=list)
    shares: dict[str, list[float]] = field(default_factory=dict)
    peaks: list[memory.Peak] = field(default_factory=list)


def measure(plan: Plan, say: Callable[[str], None]) -> Findings:
    """Run every table of the plan."""
    found = Findings()
    for number, size in enumerate(plan.sizes):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            salm = write_salm(size, folder)
            model = load_ours(folder)
            say(f"LLM of {generation.num_parameters(model)}")
            _answers(plan, model, salm, found, say)
            del salm, model
            _training(plan, folder, found, say, last=number == len(plan.sizes) - 1)
    if "shares" in plan.tables:
        say("one RL step")
        found.shares = training.step_shares(prompts=plan.step_prompts, repeats=plan.repeats)
    return found


def _answers(plan: Plan, model, salm, found: Findings, say: Callable[[str], None]) -> None:
    """Tables 1 and 2 of one size."""
    load, repeats = plan.load, plan.repeats
    if "speed" in plan.tables:
        for seconds in plan.seconds:
            say(f"group sampling, {seconds:g} s")
            at = Load(load.prompts, load.group, load.tokens, seconds)
            found.speeds.append(generation.compare(model, salm, at, repeats=repeats, check_greedy=True))
    if "sweeps" in plan.tables:
        say("sweeps")
        few = Load(plan.sweep_prompts, load.group, load.tokens, load.seconds)
        found.by_group.append(generation.by_group(model, salm, few, plan.groups, repeats))
        found.by_audio.append(generation.by_audio(model, salm, few, plan.lengths, repeats))


def _training(plan: Plan, folder: Path, found: Findings, say: Callable[[str], None], *, last: bool) -> None:
    """Table 3 of one size, and table 5 of the last one."""
    loads = [Load(plan.update_prompts, plan.load.group, plan.load.tokens, seconds) for seconds in plan.seconds]
    if "updates" in plan.tables:
        say("updates")
        found.updates += [training.compare_updates(folder, load, repeats=plan.repeats) for load in loads]
    if "memory" in plan.tables and last:
        say("memory")
        found.peaks = [memory.measure_alone(system, folder, load) for load in loads for system in memory.SYSTEMS]


def write(found: Findings, plan: Plan, folder: Path) -> str:
    """``bench.md`` and, when there is something to draw, ``bench.png``; returns the Markdown."""
    load = plan.load
    asked = f"G = {load.group} answers x {load.tokens} tokens"
    what, few = f"{load.prompts} prompts x {asked}", f"{plan.update_prompts} prompts x {asked}"
    sections = {
        f"Group sampling beside NeMo `SALM.generate`: {what}": generation.speed_rows(found.speeds),
        f"Cost against G, {load.seconds:g} s of audio, {plan.sweep_prompts} prompts at once": _sweeps(
            found.by_group, "group", "G"
        ),
        f"Cost against audio, G = {load.group}, {plan.sweep_prompts} prompts at once": _sweeps(
            found.by_audio, "seconds", "audio, s"
        ),
        f"Update with the prompt once a group, beside the plain one: {few}": training.update_rows(found.updates),
        f"One RL step of the tiny recipe, {plan.step_prompts} prompts": (
            training.share_rows(found.shares) if found.shares else []
        ),
        f"Peak memory, largest LLM, {few}": memory.peak_rows(found.peaks),
    }
    text = f"# Benchmark\n\nCPU time on one thread, {plan.repeats} repeats: median [lowest, highest].\n\n"
    text += "\n".join(f"## {title}\n\n{page.table(rows)}" for title, rows in sections.items() if rows)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.md").write_text(text)
    if found.speeds and found.by_group and found.shares:
        page.picture(found.speeds, found.by_group, found.by_audio, found.shares).savefig(folder / "bench.png", dpi=110)
    return text


def _sweeps(found: Sequence[Sequence[generation.Comparison]], attribute: str, label: str) -> list[dict[str, str]]:
    return [row for sweep in found for row in generation.sweep_rows(sweep, attribute, label)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--only", nargs="+", choices=TABLES, default=TABLES, metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("runs/bench"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.setLevel(logging.ERROR)
    plan = Plan(
        sizes=[SIZES[name] for name in args.sizes], load=Load(prompts=8, group=8, tokens=32, seconds=10.0),
        seconds=(3.0, 20.0), groups=(1, 2, 4, 8, 16), lengths=(1.0, 3.0, 10.0, 20.0), sweep_prompts=4, update_prompts=4,
        repeats=args.repeats, step_prompts=16, tables=args.only,
    )  # fmt: skip
    found = measure(plan, lambda message: print(f"... {message}", flush=True))
    print(write(found, plan, args.output))
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
