# SPDX-License-Identifier: Apache-2.0
"""What a study trains: runs, their configs, and which learning rate an arm is judged by."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra import compose
from omegaconf import DictConfig, open_dict
from recipe_parts import data_parallel_ranks, steps_a_batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One training run of an arm."""

    arm: str
    prompts: int
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Of its folder, its ``.nemo`` and its answers."""
        return f"n{self.prompts}_{self.arm}_lr{self.learning_rate:g}_seed{self.seed}"


def grid(study: DictConfig) -> list[Run]:
    """Every arm at every size with each of its learning rates, with the first seed.

    Raises:
        ValueError: a number of prompts without a budget, fewer than two arms, a rate twice, or grids of unequal size:
            a larger one is a better chance.
    """
    sizes = {arm: len(set(choice.learning_rates)) for arm, choice in study.arms.items()}
    if len(sizes) < 2 or len(set(sizes.values())) != 1 or any(
        sizes[arm] != len(choice.learning_rates) for arm, choice in study.arms.items()
    ):  # fmt: skip
        raise ValueError(
            f"arms have {sizes} different learning rates; expected two arms or more with the same number, and none "
            "twice: change arms.<name>.learning_rates"
        )
    if len(set(study.seeds)) != len(study.seeds) or not study.seeds:
        raise ValueError(f"seeds are {list(study.seeds)}; expected one or more, each once: change seeds")
    if unplanned := [prompts for prompts in study.prompts if prompts not in study.budgets]:
        raise ValueError(
            f"prompts has {unplanned} without a budget; expected some of {list(study.budgets)}: change prompts, or add "
            "a line to budgets in the study's YAML"
        )
    return [
        Run(arm=arm, prompts=int(prompts), learning_rate=float(rate), seed=study.seeds[0])
        for prompts in study.prompts
        for arm, choice in study.arms.items()
        for rate in sorted(choice.learning_rates)
    ]


def config(study: DictConfig, run: Run) -> DictConfig:
    """The recipe as this run wants it.

    Where every prompt is heard once, an arm that hears more clips has more prompts, as far as the pool goes: else it
    would not differ in its clips alone.
    """
    arm = study.arms[run.arm]
    longer = arm.get("longer", 1)
    clips, interval = (int(number * longer) for number in _budget(study, run.prompts))
    prompts = clips if study.budgets[run.prompts].clips == run.prompts else run.prompts
    cfg = compose(
        study.recipe,
        overrides=[
            *study.common, f"name={study.name}", f"arm={run.arm}", f"seed={run.seed}",
            f"learning_rate={run.learning_rate}", *arm.overrides,
        ],
    )  # fmt: skip
    with open_dict(cfg):
        cfg.data.train_prompts = min(prompts, cfg.data.num_train)
    cfg.baselines = {}  # the study has its own
    cfg.conditions = study.conditions
    batches, interval = batches_of(cfg, clips), batches_of(cfg, interval)
    cfg.trainer.max_steps = batches * steps_a_batch(cfg)
    cfg.trainer.val_check_interval = interval
    return cfg


def batches_of(cfg: DictConfig, clips: int) -> int:
    """Batches that hear so many clips, or a few less; of as many optimiser steps each as the arm takes."""
    return max(1, clips // (cfg.data.batch_size * max(1, data_parallel_ranks(cfg))))


def _budget(study: DictConfig, prompts: int) -> tuple[int, int]:
    """Clips heard, and clips between two dev scores."""
    budget = study.budgets[prompts]
    return budget.clips, budget.dev_interval


def dev_score(folder: Path, monitor: str) -> float:
    """Best dev score of a finished run, which is that of the checkpoint it kept.

    That of step 0 is the start model's, and no run may be credited with what it had before it learned anything.
    """
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return max(line[monitor] for line in lines if monitor in line and line["step"] > 0)


def choose(runs: Sequence[Run], scores: dict[Run, float]) -> dict[tuple[int, str], Run]:
    """(prompts, arm) -> the run with the best dev score; the smaller rate where two are alike."""
    best: dict[tuple[int, str], Run] = {}
    for run in runs:
        key = (run.prompts, run.arm)
        if key not in best or scores[run] > scores[best[key]]:
            best[key] = run
    return best


def is_bracketed(study: DictConfig, run: Run) -> bool:
    """Whether the chosen rate has a smaller and a larger one beside it that were worse."""
    rates = sorted(study.arms[run.arm].learning_rates)
    return rates[0] < run.learning_rate < rates[-1]
