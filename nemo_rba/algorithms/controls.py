# SPDX-License-Identifier: Apache-2.0
"""What steers a run while it trains, and ends it when it has gone wrong: one object that is saved and resumed whole."""

import math
from typing import Protocol

from nemo_rba.algorithms.controllers import AdaptiveKL
from nemo_rba.algorithms.watcher import StopOnCollapse
from nemo_rba.protocols import Metrics, Objective


class Controller(Protocol):
    """A number that changes after every optimiser step: see ``controllers``."""

    value: float

    def update(self, kl: float | None) -> float: ...

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


class RunStopped(RuntimeError):
    """The watcher had a reason; raised before a checkpoint of what went wrong could be written."""


class Controls:
    """Learning rate, KL coefficient and watcher of one run.

    Args:
        schedule: learning rate of each optimiser step.
        kl_controller: steers ``objective.kl_coefficient``; None leaves it as configured.
        watcher: reads every step's and every validation's metrics; None watches nothing.
    """

    def __init__(
        self, *, schedule: Controller, kl_controller: AdaptiveKL | None = None, watcher: StopOnCollapse | None = None
    ):
        self.schedule, self.kl_controller, self.watcher = schedule, kl_controller, watcher

    def check(self, objective: Objective, steps_per_batch: int) -> None:
        """Refuse at setup what would never have a KL to steer by.

        Raises:
            ValueError: the loss measures no KL to the start model, or none between the steps on a batch.
        """
        name = type(objective).__name__
        if self.kl_controller is not None and not objective.needs_reference:
            raise ValueError(
                f"kl_controller steers the KL to the start model, but {name} does not measure it; set "
                "objective.kl_coefficient above 0, choose another objective, or leave kl_controller out"
            )
        if getattr(self.schedule, "follows_kl", False) and (steps_per_batch < 2 or not objective.needs_old):
            raise ValueError(
                f"{type(self.schedule).__name__} follows the KL between the first and the later updates on a batch, "
                f"but num_minibatches * ppo_epochs is {steps_per_batch} with {name}; expected 2 or more and a loss on "
                "own answers, or schedule=warmup_linear"
            )

    def begin(self, objective: Objective) -> None:
        """Put the coefficient in force, at the start of a run and after a resume."""
        if self.kl_controller is not None:
            objective.kl_coefficient = self.kl_controller.value

    def after_step(self, metrics: Metrics, objective: Objective, *, first: bool) -> None:
        """Take one optimiser step's metrics, and add the coefficient it was made with.

        ``first``: of this batch of rollouts, where ``kl/old`` is 0 by nature. Raises ``RunStopped`` when a metric is
        nan or infinite, watcher or not: no controller can follow it.
        """
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise RunStopped(f"{name} is {value}: the run has diverged")
        self.schedule.update(None if first else metrics.get("kl/old"))
        if self.kl_controller is not None:
            metrics["kl/coefficient"] = objective.kl_coefficient
            objective.kl_coefficient = self.kl_controller.update(metrics["kl/reference"])

    def watch(self, metrics: Metrics) -> None:
        """Raises ``RunStopped`` when the watcher has a reason; all ranks have the same metrics, so all of them do."""
        reason = self.watcher.update(metrics) if self.watcher is not None else None
        if reason is not None:
            raise RunStopped(reason)

    def state_dict(self) -> dict:
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict) -> None:
        """What was not there when the checkpoint was written begins anew."""
        for name, part in self._parts().items():
            if name in state:
                part.load_state_dict(state[name])

    def _parts(self) -> dict[str, Controller | StopOnCollapse]:
        parts = {"schedule": self.schedule, "kl_controller": self.kl_controller, "watcher": self.watcher}
        return {name: part for name, part in parts.items() if part is not None}
