# SPDX-License-Identifier: Apache-2.0
"""Correction for a sampler that is not the trainer: another engine, or another precision, gave the answers.

Weights (N, T) without a gradient, made of pi_train / pi_sampler of the sampled tokens, both before the first update.
The loss multiplies its advantages with them, which is to multiply each token's loss: min(rho w A, clip(rho) w A) = w
min(rho A, clip(rho) A) for w >= 0. ``RolloutBatch.old_logprobs`` must then be the trainer's, else the loss's own ratio
corrects a second time.

| correction          | weight                                            | source                       |
|---------------------|---------------------------------------------------|------------------------------|
| TruncatedImportance | min(pi_train / pi_sampler, maximum)               | TIS, fengyao.notion.site     |
| MaskedImportance    | the ratio where minimum <= ratio <= maximum, or 0 | IcePop, Ring-1T report       |
"""

from typing import Protocol

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0  # nats


class Importance(Protocol):
    """A correction: log-probabilities (N, T) under trainer and sampler, and the mask -> weights (N, T)."""

    def __call__(self, trainer: Tensor, sampler: Tensor, mask: Tensor) -> Tensor: ...


class TruncatedImportance:
    """Importance weights with an upper bound: less variance, at the price of a bias where the sampler was too shy.

    Args:
        maximum: largest weight (2).
    """

    def __init__(self, *, maximum: float):
        _require(maximum >= 1, "maximum", maximum, "1 or more")
        self.maximum = maximum

    def __call__(self, trainer: Tensor, sampler: Tensor, mask: Tensor) -> Tensor:
        """Log-probabilities (N, T) of both and the mask (N, T) -> weights (N, T), 0 where masked."""
        return _ratio(trainer, sampler, mask).clamp(max=self.maximum)


class MaskedImportance:
    """Importance weights that drop a token on which sampler and trainer disagree: no bounded guess, no gradient.

    Args:
        minimum, maximum: smallest and largest weight that still counts (0.5 and 5 in IcePop).
    """

    def __init__(self, *, minimum: float, maximum: float):
        _require(0 <= minimum <= 1, "minimum", minimum, "between 0 and 1")
        _require(maximum >= 1, "maximum", maximum, "1 or more")
        self.minimum, self.maximum = minimum, maximum

    def __call__(self, trainer: Tensor, sampler: Tensor, mask: Tensor) -> Tensor:
        """As ``TruncatedImportance``."""
        ratio = _ratio(trainer, sampler, mask)
        return torch.where((ratio < self.minimum) | (ratio > self.maximum), 0.0, ratio)


def _ratio(trainer: Tensor, sampler: Tensor, mask: Tensor) -> Tensor:
    """pi_train / pi_sampler (N, T), 0 where masked, whatever stands there."""
    if not trainer.shape == sampler.shape == mask.shape:
        raise ValueError(
            f"the trainer's log-probabilities are {tuple(trainer.shape)}, the sampler's {tuple(sampler.shape)} and the "
            f"mask {tuple(mask.shape)}, expected one shape (N, T)"
        )
    log_ratio = torch.where(mask, trainer - sampler, 0.0).detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.where(mask, log_ratio.exp(), 0.0)


def _require(condition: bool, key: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{key} must be {expected}, got {value!r}: change importance.{key}")
