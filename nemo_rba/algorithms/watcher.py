# SPDX-License-Identifier: Apache-2.0
"""Says when a run has gone wrong. It reads metrics and stops nothing itself."""

import math
from collections.abc import Mapping

ENTROPY, LENGTH, REWARD = "entropy", "rollout/length", "reward/mean"  # names of ``RBAAlignment.align``'s metrics


class StopOnCollapse:
    """Watches metrics for the usual ends of a reinforcement learning run.

    | sign                        | when                                                                              |
    |-----------------------------|-----------------------------------------------------------------------------------|
    | divergence                  | any metric is nan or infinite, at once                                            |
    | entropy collapse            | ``entropy`` below ``min_entropy`` for ``patience`` steps in a row                 |
    | answers too short, too long | ``rollout/length`` out of bounds for ``patience`` steps in a row                  |
    | reward hacking, suspected   | for ``validation_patience`` validations in a row, the mean ``reward/mean`` since  |
    |                             | the one before has risen, and ``dev_score`` has fallen                            |

    ``update`` takes a step's metrics, or a validation's, or both in one; a sign whose metric is not among them keeps
    its count. It goes on giving a reason as long as the sign lasts.

    Args:
        min_entropy: nats per token; None does not watch it.
        min_length, max_length: of the mean answer, in tokens; None does not watch it.
        patience: steps in a row before entropy or length is a reason.
        dev_score: name of the validation metric that should rise, e.g. "val/reward"; better one that the reward does
            not contain.
        validation_patience: validations in a row before hacking is suspected; None does not watch it.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self, *, min_entropy: float | None, min_length: float | None, max_length: float | None, patience: int,
        dev_score: str, validation_patience: int | None,
    ):  # fmt: skip
        _require(patience >= 1, "patience", patience, "1 or more")
        _require(validation_patience is None or validation_patience >= 1, "validation_patience", validation_patience,
                 "1 or more, or null")  # fmt: skip
        ordered = min_length is None or max_length is None or min_length < max_length
        _require(ordered, "min_length", min_length, f"below max_length ({max_length})")
        self.patience, self.validation_patience, self.dev_score = patience, validation_patience, dev_score
        self._bounds = [  # metric, bound, sign of what is too much, what it means
            (ENTROPY, min_entropy, -1, "the policy has collapsed to few answers"),
            (LENGTH, min_length, -1, "answers get too short"),
            (LENGTH, max_length, 1, "answers get too long"),
        ]
        self._runs = [0, 0, 0]  # steps in a row beyond each bound
        self._hacking = 0  # validations in a row
        self._rewards = [0.0, 0]  # sum and count of the training reward since the last validation
        self._last: list[float] | None = None  # training reward before the last validation, and its dev score

    def update(self, metrics: Mapping[str, float]) -> str | None:
        """Take one dictionary of metrics; the reason to stop, in words, or None."""
        for name, value in metrics.items():
            if not math.isfinite(value):
                return f"{name} is {value}: the run has diverged"
        reasons = [self._bound(row, metrics) for row in range(len(self._bounds))]
        if REWARD in metrics:
            self._rewards = [self._rewards[0] + float(metrics[REWARD]), self._rewards[1] + 1]
        if self.dev_score in metrics:
            self._validate(float(metrics[self.dev_score]))
        reasons.append(self._suspicion())
        return next((reason for reason in reasons if reason), None)

    def _bound(self, row: int, metrics: Mapping[str, float]) -> str | None:
        name, bound, sign, meaning = self._bounds[row]
        if bound is None:
            return None
        if name in metrics:
            self._runs[row] = self._runs[row] + 1 if sign * (metrics[name] - bound) > 0 else 0
        if self._runs[row] < self.patience:
            return None
        side = "above" if sign > 0 else "below"
        return f"{name} has been {side} {bound} for {self._runs[row]} steps: {meaning}"

    def _validate(self, dev_score: float) -> None:
        total, count = self._rewards
        if not count:  # nothing was trained since the last one: the check of the start model
            return
        reward = total / count
        if self._last is not None:
            worse = reward > self._last[0] and dev_score < self._last[1]
            self._hacking = self._hacking + 1 if worse else 0
        self._last, self._rewards = [reward, dev_score], [0.0, 0]

    def _suspicion(self) -> str | None:
        if self.validation_patience is None or self._hacking < self.validation_patience:
            return None
        return (
            f"{REWARD} has risen and {self.dev_score} fallen for {self._hacking} validations: "
            "the policy may be exploiting the reward"
        )

    def state_dict(self) -> dict:
        return {"runs": list(self._runs), "hacking": self._hacking, "rewards": list(self._rewards), "last": self._last}

    def load_state_dict(self, state: dict) -> None:
        self._runs, self._rewards = list(state["runs"]), list(state["rewards"])
        self._hacking, self._last = state["hacking"], state["last"]


def _require(condition: bool, key: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{key} must be {expected}, got {value!r}: change watcher.{key}")
