# SPDX-License-Identifier: Apache-2.0
"""What the losses share: masking, means over the global batch, the KL to the start model, policy-gradient bookkeeping.

Shapes: values and logprobs (N, T), or (N, T, K) at the teacher's candidates. Every mean is a sum over this microbatch
divided by a count over the *global* batch, so that microbatches and data-parallel ranks add up exactly. Padding is set
to 0 before any arithmetic, so whatever stands there (inf, nan) gets a gradient of exactly 0.
"""

import math

import torch
from torch import Tensor

from nemo_rba.functional import group_size, kl_estimate, masked_mean
from nemo_rba.types import RolloutBatch

AGGREGATIONS = ("token_mean", "sequence_mean")
KL_LOSSES = ("k2", "k3")  # not k1: its gradient is 0 in expectation, so it would steer nothing
KL_REWARDS = ("k1_in_reward", "k2_in_reward", "k3_in_reward")  # see ``kl_reward``
MAX_LOG_RATIO = 20.0  # nats; beyond it rho is far outside of any clip, and exp would go to infinity
MIN_TAIL = 1e-5  # probability below which the bucket of all other tokens is rounding noise of K >= V

Metrics = dict[str, Tensor]


class PolicyGradientLoss:
    """Everything of a policy-gradient loss but its surrogate, which a subclass gives.

        A_t  = w (advantage + dense_weight * clamp(log pi_T - log pi_old - baseline, +-dense_clip))    no gradient
        loss = aggregate(surrogate(log pi, log pi_old, A)) + kl_coefficient * KL(pi || pi_ref)

    w is 1, or the weight of ``importance``, whose KL term is not corrected. A KL in the reward is part of the
    advantage, and no term of the loss.

    Args:
        kl_coefficient: weight of the KL to the start model; 0 spares its forward pass. May be changed between steps
            by a controller, but not from 0.
        kl_estimator: of the KL in the loss "k2" or "k3", see ``functional.kl_estimate``; of the KL in the reward
            "k1_in_reward", "k2_in_reward" or "k3_in_reward", see ``kl_reward``.
        dense_weight: weight of the teacher's judgement; 0 spares the teacher's forward pass.
        dense_clip: bound on the teacher's log-ratio, in nats.
        aggregation: see ``aggregate``.
    """

    needs_advantages = needs_old = True
    teacher_topk = 0

    def __init__(
        self, *, kl_coefficient: float, kl_estimator: str, dense_weight: float, dense_clip: float,
        aggregation: str | int,
    ):  # fmt: skip
        check_kl(kl_coefficient, kl_estimator)
        require(dense_weight >= 0, "dense_weight", dense_weight, "0 or more")
        require(dense_clip > 0, "dense_clip", dense_clip, "above 0 nats")
        check_aggregation(aggregation)
        self.kl_coefficient, self.kl_estimator = kl_coefficient, kl_estimator
        self.dense_weight, self.dense_clip = dense_weight, dense_clip
        self.aggregation = aggregation
        self.needs_reference = kl_coefficient > 0
        self.needs_teacher = dense_weight > 0

    def surrogate(
        self, logprobs: Tensor, old: Tensor, advantages: Tensor, batch: RolloutBatch
    ) -> tuple[Tensor, Tensor | None]:
        """Loss of every token (N, T), and where a clip was active (N, T) bool; None for a loss without any.

        All arguments are (N, T) and 0 where padded.
        """
        raise NotImplementedError

    def __call__(self, logprobs: Tensor, batch: RolloutBatch) -> tuple[Tensor, Metrics]:
        logprobs = real(logprobs, batch)
        old = real(given(batch.old_logprobs, "old_logprobs", self), batch)
        advantages, metrics = self._advantages(old, batch)
        losses, clipped = self.surrogate(logprobs, old, advantages, batch)
        policy_loss = aggregate(losses, batch, self.aggregation)
        loss = policy_loss
        if self.needs_reference:
            kl_loss, kl_metrics = kl_to_start(logprobs, batch, self, aggregation=self.aggregation)
            loss = loss + kl_loss
            metrics |= kl_metrics
        metrics["loss/policy"] = policy_loss.detach()
        moved = (logprobs.detach() - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        metrics["kl/old"] = token_mean(kl_estimate(old, old + moved, "k3"), batch)
        metrics |= logprob_error(logprobs, batch)
        if clipped is not None:
            metrics["clip_fraction"] = token_mean(clipped.float(), batch)
        metrics["entropy"] = token_mean(-logprobs.detach(), batch)
        return loss, metrics

    def _advantages(self, old: Tensor, batch: RolloutBatch) -> tuple[Tensor, Metrics]:
        advantages = batch.advantages if batch.advantages.dim() == 2 else batch.advantages[:, None]
        advantages, metrics = real(advantages.expand_as(old), batch), {}
        if self.needs_teacher:
            logratio = real(given(batch.teacher_logprobs, "teacher_logprobs", self), batch) - old
            dense = (logratio - batch.teacher_baseline).clamp(-self.dense_clip, self.dense_clip)
            advantages = advantages + self.dense_weight * dense
            metrics["teacher/logratio"] = token_mean(logratio, batch)
        if batch.importance_weights is not None:
            weights = real(batch.importance_weights, batch)
            advantages = advantages * weights
            metrics["sampler/weight"] = token_mean(weights, batch)
            metrics["sampler/dropped"] = token_mean((weights == 0).float(), batch)
        return advantages, metrics


def kl_to_start(
    logprobs: Tensor, batch: RolloutBatch, objective, *, aggregation: str | int
) -> tuple[Tensor, Metrics]:  # fmt: skip
    """``objective.kl_coefficient`` * KL(pi || pi_ref), by ``objective.kl_estimator``; ``logprobs`` 0 where padded.

    The KL is a mean over what the student says, so the teacher's answers in a mixed group count as 0: k3 of a word that
    the student would never say is pi_ref / pi, without bound, and would be the whole step. 0 where the reward has paid
    for it, see ``kl_reward``.
    """
    reference = real(given(batch.ref_logprobs, "ref_logprobs", objective), batch)
    if batch.is_own is not None:
        logprobs = torch.where(batch.is_own[:, None], logprobs, reference)
    metrics = {"kl/reference": token_mean(start_kl(logprobs.detach(), reference, "k3"), batch)}
    if objective.kl_estimator in KL_REWARDS:
        return logprobs.new_zeros(()), metrics
    estimate = start_kl(logprobs, reference, objective.kl_estimator)
    loss = objective.kl_coefficient * aggregate(estimate, batch, aggregation)
    return loss, {"loss/kl": loss.detach()} | metrics


def start_kl(logprobs: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """``functional.kl_estimate`` to the start model, of any shape, finite where both are.

    k3 grows with pi_ref / pi itself: beyond e^20 a token counts as that much, and has no gradient, as in verl and
    NeMo-RL, or it would be the whole step. They bound the ratio from below as well, where nothing grows.
    """
    log_ratio = reference - logprobs
    if estimator == "k3":
        log_ratio = log_ratio.clamp(max=MAX_LOG_RATIO)
    return kl_estimate(torch.zeros_like(log_ratio), log_ratio, estimator)


def aggregate(values: Tensor, batch: RolloutBatch, aggregation: str | int) -> Tensor:
    """This microbatch's share of a mean of ``values`` (N, T), 0 where padded, over the global batch.

    "token_mean" weighs every token alike (DAPO 2503.14476), "sequence_mean" every answer (GRPO 2402.03300). A number L
    divides each answer's sum by the same L, then averages the answers: Dr.GRPO 2503.20783, where L is the most tokens
    an answer may have; with L = 1, the sum over tokens of REINFORCE.
    """
    if aggregation == "token_mean":
        return token_mean(values, batch)
    if aggregation == "sequence_mean":
        return masked_mean(values, batch.response_mask, dim=1).sum() / batch.num_loss_rollouts
    return real(values, batch).sum() / (aggregation * batch.num_loss_rollouts)


def real(values: Tensor, batch: RolloutBatch) -> Tensor:
    """``values`` (N, T) with 0 where padded."""
    return torch.where(batch.response_mask, values, 0.0)


def token_mean(values: Tensor, batch: RolloutBatch) -> Tensor:
    """This microbatch's share of the mean over all tokens of the global batch."""
    return real(values, batch).sum() / batch.num_loss_tokens


def answer_mean(values: Tensor, batch: RolloutBatch) -> Tensor:
    """This microbatch's share of the mean of ``values`` (N,) over all answers of the global batch."""
    return values.sum() / batch.num_loss_rollouts


def answers_in_groups(batch: RolloutBatch, objective: object) -> tuple[Tensor, Tensor]:
    """Advantages (N,) and group sizes (N,) for a loss that compares the answers to a prompt.

    A term of a group, times the group's size, under ``answer_mean`` is a mean over prompts.

    Raises:
        ValueError: advantages are per token, or a prompt has a single answer.
    """
    name, size = type(objective).__name__, group_size(batch.prompt_index)
    if batch.advantages.dim() != 1:
        raise ValueError(
            f"{name} compares whole answers, but got advantages of shape {tuple(batch.advantages.shape)}, expected "
            "(N,): change advantage"
        )
    if (size < 2).any():
        raise ValueError(
            f"{name} compares the answers to a prompt, but prompt {int(batch.prompt_index[size < 2][0])} has 1 answer, "
            "expected 2 or more: raise rollouts.group_size"
        )
    return batch.advantages, size


def logprob_error(logprobs: Tensor, batch: RolloutBatch) -> Metrics:
    """How far off the sampler was, where the batch tells what it said: the mean of |log pi - log pi_sampler|."""
    sampler = batch.old_logprobs if batch.sampler_logprobs is None else batch.sampler_logprobs
    return {} if sampler is None else {"health/logprob_error": token_mean((logprobs.detach() - sampler).abs(), batch)}


def candidates(logprobs: Tensor, batch: RolloutBatch, objective: object) -> tuple[Tensor, Tensor]:
    """Student's and teacher's log-probabilities (N, T, K) at the teacher's candidates, safe where padded."""
    teacher = given(batch.teacher_topk_logprobs, "teacher_topk_logprobs", objective)
    if logprobs.shape != teacher.shape:
        raise ValueError(
            f"{type(objective).__name__} got the student's log-probabilities as {tuple(logprobs.shape)}, expected "
            f"{tuple(teacher.shape)} = (N, T, K), one for each of the teacher's candidates in batch.teacher_topk_ids"
        )
    padding = -math.log(2 * teacher.shape[-1])  # head and tail of one half each: every log below is finite
    mask = batch.response_mask.unsqueeze(-1)
    return torch.where(mask, logprobs, padding), torch.where(mask, teacher, padding)


def tail(logprobs: Tensor) -> Tensor:
    """Probability of everything outside of the K candidates, at least ``MIN_TAIL``: (N, T, K) -> (N, T)."""
    return (-logprobs.logsumexp(-1).expm1()).clamp(min=MIN_TAIL)


def candidate_entropy(student: Tensor, batch: RolloutBatch) -> Tensor:
    """This microbatch's share of the mean entropy, in nats, of ``student`` (N, T, K), all other tokens as one.

    A lower bound, exact where K covers the vocabulary; policy gradients, which see no other token, have the mean of
    -log pi over the sampled ones.
    """
    student, rest = student.detach(), tail(student.detach())
    outside = torch.where(rest > MIN_TAIL, rest * rest.log(), 0.0)
    return token_mean(-(student.exp() * student).sum(-1) - outside, batch)


def given(values: Tensor | None, name: str, objective: object) -> Tensor:
    """``values``, which the loop put in the batch.

    Raises:
        ValueError: it did not.
    """
    if values is None:
        raise ValueError(f"{type(objective).__name__} needs batch.{name}, got None: see its needs_* fields")
    return values


def check_kl(coefficient: float, estimator: str) -> None:
    """Refuse settings of the KL term that cannot work, with a ``ValueError``."""
    require(coefficient >= 0, "kl_coefficient", coefficient, "0 or more")
    expected = f"one of {KL_LOSSES} (k1 steers nothing in the loss), or of {KL_REWARDS}"
    require(estimator in KL_LOSSES + KL_REWARDS, "kl_estimator", estimator, expected)


def check_aggregation(aggregation: str | int) -> None:
    """Refuse what ``aggregate`` does not know, with a ``ValueError``."""
    is_length = isinstance(aggregation, int) and not isinstance(aggregation, bool) and aggregation >= 1
    expected = f"one of {AGGREGATIONS}, or a number of tokens of 1 or more"
    require(is_length or aggregation in AGGREGATIONS, "aggregation", aggregation, expected)


def check_clip(low: float, high: float) -> None:
    """Refuse clip widths that cannot work, with a ``ValueError``."""
    require(0 < low <= 1, "clip_low", low, "above 0 and at most 1")
    require(high > 0, "clip_high", high, "above 0")


def require(condition: bool, key: str, value: object, expected: str) -> None:
    """Refuse a setting, naming the key to change, with a ``ValueError``."""
    if not condition:
        raise ValueError(f"{key} must be {expected}, got {value!r}: change objective.{key}")
