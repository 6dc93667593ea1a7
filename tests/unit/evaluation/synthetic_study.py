# SPDX-License-Identifier: Apache-2.0
"""A made-up comparison: two conditions, three arms with seeds, a cascade, and training curves."""

import json
from pathlib import Path

import numpy as np

from nemo_rba.evaluation.plots import TrainingCurves
from nemo_rba.evaluation.results import Roles
from nemo_rba.evaluation.runner import Prediction

SYSTEMS = {
    "teacher": ("Teacher reads the text", 0.93),
    "cascade": ("Cascade: transcribe, then teacher", 0.80),
    "start": ("Start", 0.58),
    "rba-0": ("RBA", 0.76),
    "rba-1": ("RBA", 0.78),
    "rba-2": ("RBA", 0.75),
    "sft-0": ("SFT", 0.69),
    "sft-1": ("SFT", 0.70),
    "fkl-0": ("Forward KL", 0.72),
}
FAMILIES = {"sum": "one answer", "spell": "one answer", "before": "one answer", "animals": "open", "greet": "open"}
ROLES = Roles(
    systems={name: label for name, (label, _) in SYSTEMS.items()},
    teacher="Teacher reads the text",
    start="Start",
    arms=["RBA", "SFT", "Forward KL"],
)


def make_predictions(num_items: int, *, shift: dict[str, float] | None = None) -> list[Prediction]:
    """Items differ in difficulty, and all systems share it, so that pairing matters."""
    predictions = []
    for condition, penalty in (("held-out voices", 0.0), ("seen voices", -0.04)):
        rng = np.random.default_rng(len(condition))
        difficulty = rng.normal(size=num_items)
        for system, (_, rate) in SYSTEMS.items():
            skill = np.quantile(difficulty, rate - penalty * (system != "teacher")) + (shift or {}).get(system, 0)
            right = difficulty + 0.4 * rng.normal(size=num_items) < skill
            predictions += [_prediction(system, condition, item, bool(right[item])) for item in range(num_items)]
    return predictions


def _prediction(system: str, condition: str, item: int, right: bool) -> Prediction:
    family = list(FAMILIES)[item % len(FAMILIES)]
    return Prediction(
        system=system,
        task=condition,
        measure="score",
        id=f"{condition}-{item}",
        family=family,
        kind=FAMILIES[family],
        context="",
        text=f"please do the {family} task number {item}",
        heard=f"please do the {family} task number {item if right or system != 'cascade' else 'nine'}",
        reference="the right answer",
        response=f"the right answer to {item}" if right else "| something *else* <b>",
        truncated=False,
        value=100.0 if right else 0.0,
        weight=1.0,
    )


def write_curves(folder: Path) -> TrainingCurves:
    """Three seeds of RBA as CSV with holes, one of SFT as JSON lines without a KL."""
    rng = np.random.default_rng(0)
    for seed in range(3):
        rows = ["step,reward/mean,kl/reference,entropy,dev/score"]
        for step in range(0, 200, 2):
            reward, noise = 0.3 + 0.4 * (1 - np.exp(-step / 60)), rng.normal(scale=0.04)
            dev = f"{58 + 20 * (1 - np.exp(-step / 70)) + rng.normal():.2f}" if step % 20 == 0 else ""
            rows.append(
                f"{step},{reward + noise:.4f},{step * 2e-4 + abs(noise) / 10:.5f},{1.2 - reward + noise:.4f},{dev}"
            )
        (folder / f"rba-{seed}.csv").write_text("\n".join(rows) + "\n")
    records = [
        {"step": step, "reward/mean": 0.3 + 0.0012 * step + rng.normal(scale=0.03), "entropy": 0.9 - step * 1e-3}
        | ({"dev/score": 58 + 0.06 * step} if step % 20 == 0 else {})
        for step in range(0, 200, 2)
    ]
    (folder / "sft-0.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return TrainingCurves(
        runs={"RBA": [folder / f"rba-{seed}.csv" for seed in range(3)], "SFT": [folder / "sft-0.jsonl"]},
        panels={
            "Reward": "reward/mean",
            "KL to the start, nats per token": "kl/reference",
            "Entropy, nats per token": "entropy",
            "Dev score, %": "dev/score",
        },
        step="step",
    )
