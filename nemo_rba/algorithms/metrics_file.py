# SPDX-License-Identifier: Apache-2.0
"""Every step's metrics as one JSON line, for plots that outlive any logging service."""

import json
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer


class MetricsFile(Callback):
    """Appends to ``path`` after every training batch and every validation.

    Lightning's sanity check, when it covers the whole dev set (``trainer.num_sanity_val_steps: -1``), is the line of
    step 0: what the start model can do.

    A resumed run first drops the lines that lie after its checkpoint, so the file reads like one run.
    """

    def __init__(self, *, path: str | Path):
        self._path = Path(path)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:  # a fresh start, perhaps after one that broke off before its first checkpoint
            self._path.unlink(missing_ok=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or not self._path.exists():
            return
        lines = [line for line in self._path.read_text().splitlines() if _step(line) <= trainer.global_step]
        self._path.write_text("".join(line + "\n" for line in lines))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args) -> None:
        self._write(trainer, lambda name: not name.startswith("val/"))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, lambda name: name.startswith("val/"))

    def _write(self, trainer: Trainer, wanted) -> None:
        if not trainer.is_global_zero:
            return
        metrics = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if wanted(name) and "timing" not in name  # exp_manager's stop-watch
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps({"step": trainer.global_step, **metrics}) + "\n")


def _step(line: str) -> float:
    """Step of a line; a line cut off by a crash belongs to no step."""
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return float("inf")
