# SPDX-License-Identifier: Apache-2.0
"""How much better than its siblings: rewards (N,) of the answers to the same prompt -> advantages (N,).

| estimator       | A_i                            | source                     |
|-----------------|--------------------------------|----------------------------|
| LeaveOneOut     | r_i - mean_{j != i} r_j        | RLOO, 2402.14740           |
| GroupNormalized | (r_i - mean r) / (std r + eps) | GRPO, 2402.03300           |
|                 | r_i - mean r                   | Dr.GRPO, 2503.20783        |
| NoAdvantage     | 0                              | no reward: distillation    |

A group whose rewards are all equal gives exactly 0: rounding of the mean must not turn into a gradient, all the less
after a division by a tiny standard deviation. Arithmetic is float64 inside, float32 outside.
"""

import torch
from torch import Tensor

from nemo_rba.functional import group_is_constant, group_mean, group_size, group_std


class LeaveOneOut:
    """RLOO: the baseline of an answer is the mean reward of the other answers to its prompt. Unbiased."""

    min_group_size = 2

    def __call__(self, rewards: Tensor, prompt_index: Tensor) -> Tensor:
        size = _sizes_above_one(prompt_index, self)
        rewards = rewards.double()
        centred = rewards - group_mean(rewards, prompt_index)
        return _silence_constant(centred * size / (size - 1), rewards, prompt_index)  # = r_i - mean of the others


class GroupNormalized:
    """GRPO: standard score inside the group. The standard deviation has Bessel's correction, as in TRL and verl.

    Args:
        epsilon: added to the standard deviation; also bounds how far a nearly constant group is blown up.
        divide_by_std: False gives Dr.GRPO, which does not favour prompts that are very easy or very hard.
    """

    min_group_size = 2

    def __init__(self, *, epsilon: float, divide_by_std: bool):
        if not epsilon > 0:
            raise ValueError(f"epsilon must be above 0, got {epsilon}: change advantage.epsilon (1e-4 is usual)")
        self.epsilon = epsilon
        self.divide_by_std = divide_by_std

    def __call__(self, rewards: Tensor, prompt_index: Tensor) -> Tensor:
        _sizes_above_one(prompt_index, self)
        rewards = rewards.double()
        advantages = rewards - group_mean(rewards, prompt_index)
        if self.divide_by_std:
            advantages = advantages / (group_std(rewards, prompt_index) + self.epsilon)
        return _silence_constant(advantages, rewards, prompt_index)


class NoAdvantage:
    """0 for every answer: for distillation losses, which ignore it, and for dense objectives without a reward.

    Not 1: a constant in front of grad log pi is zero in expectation, but pure noise in every step.
    """

    min_group_size = 1

    def __call__(self, rewards: Tensor, prompt_index: Tensor) -> Tensor:
        return torch.zeros_like(rewards, dtype=torch.float32)


def _sizes_above_one(prompt_index: Tensor, estimator: object) -> Tensor:
    size = group_size(prompt_index)
    if (size < 2).any():
        raise ValueError(
            f"{type(estimator).__name__} compares answers to the same prompt, but prompt "
            f"{int(prompt_index[size < 2][0])} has 1 answer, expected 2 or more: "
            "raise rollouts.group_size, or set advantage to NoAdvantage"
        )
    return size


def _silence_constant(advantages: Tensor, rewards: Tensor, prompt_index: Tensor) -> Tensor:
    return torch.where(group_is_constant(rewards, prompt_index), 0.0, advantages).float()
