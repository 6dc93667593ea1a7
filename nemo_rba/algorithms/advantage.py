# SPDX-License-Identifier: Apache-2.0
"""How much better than its siblings: rewards (N,) of the answers to the same prompt -> advantages (N,).

| estimator           | A_i                                                 | source                  |
|---------------------|-----------------------------------------------------|-------------------------|
| LeaveOneOut         | r_i - mean_{j != i} r_j                             | RLOO, 2402.14740        |
| GroupNormalized     | (r_i - mean r) / (std r + eps)                      | GRPO, 2402.03300        |
| GroupCentred        | r_i - mean r                                        | Dr.GRPO, 2503.20783     |
| BatchWhitened       | (r_i - mean) / (std of the global batch + eps)      | REINFORCE++, 2501.03262 |
| PerRewardNormalized | sum_p weight_p (r_ip - mean r_p) / (std r_p + eps)  | GDPO, 2601.05242        |
| GreedyBaseline      | r_i - r(greedy answer)                              | SCST, 1612.00563        |
| AmongOwn            | another's, of the student's own answers alone       | ours                    |
| NoAdvantage         | 0                                                   | no reward: distillation |

A group whose rewards are all equal gives exactly 0 wherever the group is the baseline: rounding of the mean must not
turn into a gradient, all the less after a division by a tiny standard deviation; ``silent_share`` counts such groups.
Arithmetic is float64 inside, float32 outside.

All are called with (rewards, prompt_index). One with ``needs_parts`` also takes ``parts``, the unweighted rewards of
the mixture, one with ``needs_greedy`` takes ``greedy``, the rewards of the greedy answers, and one with ``needs_own``
takes ``own``, which answers are the student's; ``estimate`` gives each what it asks for.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from nemo_rba.distributed.parallel import data_parallel_sum
from nemo_rba.functional import group_is_constant, group_mean, group_share, group_size, group_std

ROUNDING = 1e-12  # of a float64 mean; rewards that differ at all, as float32, differ by more


def estimate(
    estimator: Callable[..., Tensor], rewards: Tensor, prompt_index: Tensor, *, parts: Mapping[str, Tensor],
    greedy: Callable[[], Tensor], own: Tensor,
) -> Tensor:  # fmt: skip
    """Advantages (N,) of any estimator, given what it asks for.

    Args:
        estimator: see ``protocols.AdvantageEstimator``; may have ``needs_parts``, ``needs_greedy`` or ``needs_own``.
        rewards: (N,).
        prompt_index: (N,).
        parts: each reward of the mixture, unweighted: name -> (N,).
        greedy: gives the reward of the greedy answer to each prompt row (B,); called only where asked for.
        own: which answers are the student's (N,), bool.
    """
    extra = {}
    if getattr(estimator, "needs_parts", False):
        extra["parts"] = parts
    if getattr(estimator, "needs_greedy", False):
        extra["greedy"] = greedy()
    if getattr(estimator, "needs_own", False):
        extra["own"] = own
    return estimator(rewards, prompt_index, **extra)


def silent_share(advantages: Tensor, prompt_index: Tensor) -> float:
    """Share of the prompts whose answers all have an advantage of exactly 0: nothing is learned from them.

    Unlike the share of groups with a constant reward, this is what the estimator made of them.
    """
    return float(group_share(advantages == 0, prompt_index))


class LeaveOneOut:
    """RLOO: the baseline of an answer is the mean reward of the other answers to its prompt. Unbiased."""

    min_group_size = 2
    needs_parts = needs_greedy = False

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
    needs_parts = needs_greedy = False

    def __init__(self, *, epsilon: float, divide_by_std: bool):
        _check_epsilon(epsilon)
        self.epsilon = epsilon
        self.divide_by_std = divide_by_std

    def __call__(self, rewards: Tensor, prompt_index: Tensor) -> Tensor:
        _sizes_above_one(prompt_index, self)
        rewards = rewards.double()
        advantages = rewards - group_mean(rewards, prompt_index)
        if self.divide_by_std:
            advantages = advantages / (group_std(rewards, prompt_index) + self.epsilon)
        return _silence_constant(advantages, rewards, prompt_index)


class GroupCentred:
    """Dr.GRPO: reward minus the group's mean, in the reward's own units; also the A_n of ``MinimumRiskLoss``.

    (G - 1) / G of ``LeaveOneOut``: the same direction.
    """

    min_group_size = 2
    needs_parts = needs_greedy = False

    def __call__(self, rewards: Tensor, prompt_index: Tensor) -> Tensor:
        _sizes_above_one(prompt_index, self)
        rewards = rewards.double()
        return _silence_constant(rewards - group_mean(rewards, prompt_index), rewards, prompt_index)


class BatchWhitened:
    """REINFORCE++ (2501.03262): standard score over the *global* batch, the answers of all data-parallel ranks.

        A_i = (r_i - b) / (std(r - b) + epsilon)     b = mean of the batch, or of the group ("with baseline")

    The standard deviation is over answers and without Bessel's correction. Collective: every rank calls it. A group of
    equal rewards gives 0 with ``group_baseline``; without, it is compared with the rest of the batch, and only a whole
    batch of equal rewards gives 0. verl and OpenRLHF take mean and standard deviation over tokens, so
    that a long answer counts for more. The paper's KL in the reward is ``objective.kl_estimator=k1_in_reward``.

    Args:
        epsilon: added to the standard deviation.
        group_baseline: whether the group's mean is the baseline. False also works with one answer per prompt.
    """

    needs_parts = needs_greedy = False

    def __init__(self, *, epsilon: float, group_baseline: bool):
        _check_epsilon(epsilon)
        self.epsilon, self.group_baseline = epsilon, group_baseline
        self.min_group_size = 2 if group_baseline else 1

    def __call__(self, rewards: Tensor, prompt_index: Tensor) -> Tensor:
        rewards = rewards.double()
        if self.group_baseline:
            _sizes_above_one(prompt_index, self)
            centred = rewards - group_mean(rewards, prompt_index)
            centred = torch.where(group_is_constant(rewards, prompt_index), 0.0, centred)
        else:
            mean = _global_mean(rewards)
            centred = rewards - mean
            centred = torch.where(centred.abs() <= ROUNDING * abs(mean), 0.0, centred)
        return (centred / (_global_rms(centred) + self.epsilon)).float()


class PerRewardNormalized:
    """GDPO (2601.05242): each reward is normalised in its group by itself, then they are added.

        A_i = sum_p weight_p (r_ip - mean r_p) / (std r_p + epsilon)

    A weight then says how much a reward matters, not in what units it is; and answers that differ in their rewards but
    not in the sum are told apart. A part that is constant in a group gives 0 there. With ``batch_normalize`` every rank
    calls it.

    Args:
        weights: name -> weight, the names those of the mixture's parts; 0 leaves a part out.
        epsilon: added to the standard deviation, of the group (Bessel's correction) and of the batch.
        batch_normalize: whether the sum is divided by its standard deviation over the global batch, as in the paper,
            so that its size does not grow with the number of rewards. Its mean is 0 already.

    Raises:
        ValueError: no parts, or other names than those of the weights.
    """

    min_group_size = 2
    needs_parts, needs_greedy = True, False

    def __init__(self, *, weights: Mapping[str, float], epsilon: float, batch_normalize: bool):
        _check_epsilon(epsilon)
        if not any(weights.values()):
            raise ValueError(f"weights must not all be 0, got {dict(weights)}: change advantage.weights")
        self.weights, self.epsilon, self.batch_normalize = dict(weights), epsilon, batch_normalize

    def __call__(self, rewards: Tensor, prompt_index: Tensor, parts: Mapping[str, Tensor] | None = None) -> Tensor:
        _sizes_above_one(prompt_index, self)
        if parts is None or set(parts) != set(self.weights):
            raise ValueError(
                f"PerRewardNormalized has weights for {sorted(self.weights)}, but got the rewards "
                f"{sorted(parts or {})}: change advantage.weights or reward.parts"
            )
        total = torch.zeros(len(rewards), dtype=torch.float64, device=rewards.device)
        for name, weight in self.weights.items():
            values = parts[name].double()
            scores = (values - group_mean(values, prompt_index)) / (group_std(values, prompt_index) + self.epsilon)
            total += weight * torch.where(group_is_constant(values, prompt_index), 0.0, scores)
        if self.batch_normalize:
            total = total / (_global_rms(total) + self.epsilon)
        return total.float()


class GreedyBaseline:
    """Self-critical training (SCST, 1612.00563): the baseline is the policy's own greedy answer to the same prompt.

    Costs one more answer per prompt, and rewards only what beats the policy as it will be used. Works with one sampled
    answer per prompt. An answer with the greedy answer's reward gives exactly 0.

    Raises:
        ValueError: no greedy rewards, or not one for each prompt row.
    """

    min_group_size = 1
    needs_parts, needs_greedy = False, True

    def __call__(self, rewards: Tensor, prompt_index: Tensor, greedy: Tensor | None = None) -> Tensor:
        if greedy is None or greedy.dim() != 1 or int(prompt_index.max()) >= len(greedy):
            raise ValueError(
                f"GreedyBaseline needs the reward of the greedy answer to each prompt row (B,), at least "
                f"{int(prompt_index.max()) + 1}, got {None if greedy is None else tuple(greedy.shape)}"
            )
        return (rewards.double() - greedy.double()[prompt_index]).float()


class AmongOwn:
    """The student's answers are compared with each other; the teacher's, in the same group, get 0.

    For mixed groups whose loss has the teacher's judgement as well (``JudgedPolicyLoss``): the judgement then teaches
    what is right, and the reward which of the student's own ways is best. Where the teacher's answers are in the
    baseline and all own ones are wrong, the reward only says no to every one of them.

    Args:
        estimator: who compares; any of the others.
    """

    needs_own = True

    def __init__(self, *, estimator: Callable[..., Tensor]):
        self.estimator = estimator
        self.min_group_size = getattr(estimator, "min_group_size", 1)
        self.needs_parts = getattr(estimator, "needs_parts", False)
        self.needs_greedy = getattr(estimator, "needs_greedy", False)

    def __call__(
        self, rewards: Tensor, prompt_index: Tensor, own: Tensor, parts: Mapping[str, Tensor] | None = None, **greedy
    ) -> Tensor:
        """own (N,) bool; ``parts`` and ``greedy`` where the estimator asks for them."""
        extra = greedy if parts is None else greedy | {"parts": {name: part[own] for name, part in parts.items()}}
        advantages = torch.zeros_like(rewards, dtype=torch.float32)
        advantages[own] = self.estimator(rewards[own], prompt_index[own], **extra)
        return advantages


class NoAdvantage:
    """0 for every answer: for distillation losses, which ignore it, and for dense objectives without a reward.

    Not 1: a constant in front of grad log pi is zero in expectation, but pure noise in every step.
    """

    min_group_size = 1
    needs_parts = needs_greedy = False

    def __call__(self, rewards: Tensor, prompt_index: Tensor) -> Tensor:
        return torch.zeros_like(rewards, dtype=torch.float32)


def _check_epsilon(epsilon: float) -> None:
    if not epsilon > 0:
        raise ValueError(f"epsilon must be above 0, got {epsilon}: change advantage.epsilon (1e-4 is usual)")


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


def _global_mean(values: Tensor) -> float:
    """Mean over the answers of all data-parallel ranks."""
    total, count = data_parallel_sum(torch.stack((values.sum(), values.new_tensor(len(values))))).tolist()
    return total / count


def _global_rms(centred: Tensor) -> float:
    """Standard deviation over the answers of all data-parallel ranks, of values whose mean is 0."""
    return _global_mean(centred.square()) ** 0.5
