# SPDX-License-Identifier: Apache-2.0
"""Numbers that change while training: the KL coefficient and the learning rate.

All have one face: ``value`` is the number in force, ``update(kl)`` is called once after every optimiser step with the
KL measured there and returns the next value, ``state_dict`` / ``load_state_dict`` make a resumed run the uninterrupted
one. Which KL: ``kl/reference`` for ``AdaptiveKL``, ``kl/old`` for ``KLAdaptiveLR``; ``WarmupDecay`` ignores it. None
says that this step had nothing to measure, and changes neither coefficient nor learning rate: before the first step on
a batch of rollouts, ``kl/old`` is 0 by construction.
"""

import math

MAX_PROPORTIONAL_ERROR = 0.2  # 1909.08593, section 2.2


class AdaptiveKL:
    """KL coefficient that steers KL(pi || pi_ref) to a target (Ziegler et al. 1909.08593).

        coefficient *= 1 + clip(KL / target - 1, -0.2, 0.2) / horizon_steps

    Args:
        coefficient: the one to begin with, above 0.
        target: wanted KL in nats per token.
        horizon_steps: steps in which the coefficient may change by 20 %; the paper's horizon / batch size.
    """

    def __init__(self, *, coefficient: float, target: float, horizon_steps: float):
        _require(coefficient > 0, "coefficient", coefficient, "above 0: a product never leaves 0")
        _require(target > 0, "target", target, "above 0 nats per token")
        _require(horizon_steps >= 1, "horizon_steps", horizon_steps, "1 or more")
        self.value = coefficient
        self.target = target
        self.horizon_steps = horizon_steps

    def update(self, kl: float | None) -> float:
        if kl is None:
            return self.value
        error = min(max(_finite(kl) / self.target - 1, -MAX_PROPORTIONAL_ERROR), MAX_PROPORTIONAL_ERROR)
        self.value *= 1 + error / self.horizon_steps
        return self.value

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value = state["value"]


class KLAdaptiveLR:
    """Learning rate that keeps one step's KL(pi_old || pi) near a target (the adaptive schedule of rsl_rl).

    KL above twice the target: divide by ``factor``. KL below half of it: multiply. Bounded on both sides.

    Args:
        learning_rate: the one to begin with.
        target: wanted KL of one step, in nats per token.
        factor: 1.5 in rsl_rl.
        minimum, maximum: bounds of the learning rate.
    """

    follows_kl = True

    def __init__(self, *, learning_rate: float, target: float, factor: float, minimum: float, maximum: float):
        _require(target > 0, "target", target, "above 0 nats per token")
        _require(factor > 1, "factor", factor, "above 1")
        _require(0 < minimum <= maximum, "minimum", minimum, f"above 0 and at most maximum ({maximum})")
        bounds = f"between minimum ({minimum}) and maximum ({maximum})"
        _require(minimum <= learning_rate <= maximum, "learning_rate", learning_rate, bounds)
        self.value = learning_rate
        self.target = target
        self.factor = factor
        self.minimum, self.maximum = minimum, maximum

    def update(self, kl: float | None) -> float:
        if kl is None:
            return self.value
        if _finite(kl) > 2 * self.target:
            self.value = max(self.value / self.factor, self.minimum)
        elif kl < self.target / 2:
            self.value = min(self.value * self.factor, self.maximum)
        return self.value

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value = state["value"]


class WarmupDecay:
    """Learning rate with a linear warm-up, then a decay to a floor, where it stays.

    Step s (from 0) of the warm-up has peak * (s + 1) / warmup_steps, so that no step is wasted at 0.

    Args:
        peak: highest learning rate, reached by the last step of the warm-up.
        floor: learning rate from ``total_steps`` on; ``floor == peak`` gives a constant.
        warmup_steps: 0 starts at the peak.
        total_steps: steps of warm-up and decay together.
        shape: of the decay, "linear" or "cosine".
    """

    def __init__(self, *, peak: float, floor: float, warmup_steps: int, total_steps: int, shape: str):
        _require(peak > 0, "peak", peak, "above 0")
        _require(0 <= floor <= peak, "floor", floor, f"between 0 and peak ({peak})")
        _require(warmup_steps >= 0, "warmup_steps", warmup_steps, "0 or more")
        _require(total_steps > warmup_steps, "total_steps", total_steps, f"above warmup_steps ({warmup_steps})")
        _require(shape in ("linear", "cosine"), "shape", shape, "'linear' or 'cosine'")
        self.peak, self.floor = peak, floor
        self.warmup_steps, self.total_steps = warmup_steps, total_steps
        self.shape = shape
        self.step = 0

    @property
    def value(self) -> float:
        if self.step < self.warmup_steps:
            return self.peak * (self.step + 1) / self.warmup_steps
        progress = min((self.step - self.warmup_steps) / (self.total_steps - self.warmup_steps), 1.0)
        remaining = 1 - progress if self.shape == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return self.floor + (self.peak - self.floor) * remaining

    def update(self, kl: float | None) -> float:
        self.step += 1
        return self.value

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


def _finite(kl: float) -> float:
    if not math.isfinite(kl):
        raise ValueError(f"a controller got a KL of {kl}, expected a finite number: the step before has diverged")
    return kl


def _require(condition: bool, key: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{key} must be {expected}, got {value!r}: change it in the controller's config section")
