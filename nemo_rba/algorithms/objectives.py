# SPDX-License-Identifier: Apache-2.0
"""Losses that see log-probabilities, never a model: (logprobs, batch) -> (loss, metrics).

Deltas from the textbook:

- Every sum, of losses and of metrics, is divided by a count over the *global* batch (``num_loss_tokens`` or
  ``num_loss_rollouts``). Adding microbatches or data-parallel ranks therefore gives the batch's value exactly.
- Padding is set to 0 before any arithmetic, so whatever stands there (inf, nan) gets a gradient of exactly 0.
- One policy loss covers REINFORCE, RLOO, GRPO, DAPO's clipping and on-policy distillation: what differs between them
  is the advantage (``advantage.py``), the two clip widths, the KL term and the weight of the teacher's judgement.
- Entropy is estimated as the mean of -log pi over the sampled tokens: no logits come this far.

Shapes: logprobs (N, T), or (N, T, K) for the losses with ``teacher_topk`` = K > 0.
"""

import math

import torch
from torch import Tensor

from nemo_rba.functional import kl_estimate, masked_mean
from nemo_rba.types import RolloutBatch

AGGREGATIONS = ("token_mean", "sequence_mean")
KL_LOSSES = ("k2", "k3")  # not k1: its gradient is 0 in expectation, so it would steer nothing
MAX_LOG_RATIO = 20.0  # nats; beyond it rho is far outside of any clip, and exp would go to infinity
MIN_TAIL = 1e-5  # probability below which the bucket of all other tokens is rounding noise of K >= V


class ClippedPolicyLoss:
    """The loss of RBA: clipped policy gradient with a reward, the teacher's per-token judgement, or both.

        A_t  = advantage + dense_weight * clamp(log pi_T - log pi_old - baseline, +-dense_clip)    no gradient
        loss = -min(rho_t A_t, clip(rho_t, 1 - clip_low, 1 + clip_high) A_t) + kl_coefficient * KL(pi || pi_ref)

    with rho = pi / pi_old. PPO 1707.06347; separate clip widths DAPO 2503.14476; KL in the loss GRPO 2402.03300. The
    dense part is on-policy distillation (X-OPD 2603.24596, thinkingmachines.ai/blog/on-policy-distillation): in
    expectation over own samples, the gradient of one-step reverse KL(pi || pi_T). The teacher reads the transcript, the
    student hears the speech. The baseline, the batch's mean log-ratio, changes nothing in expectation; without it
    nearly every token of an imperfect student is pushed down.

    Args:
        clip_low: rho may fall to 1 - clip_low before its gradient stops (0.2).
        clip_high: rho may rise to 1 + clip_high (0.28 in DAPO).
        kl_coefficient: weight of the KL to the start model; 0 spares its forward pass. May be changed between steps
            by a controller, but not from 0.
        kl_estimator: "k2" or "k3", see ``functional.kl_estimate``.
        dense_weight: weight of the teacher's judgement; 0 spares the teacher's forward pass.
        dense_clip: bound on the teacher's log-ratio, in nats.
        aggregation: "token_mean" weighs every token alike, "sequence_mean" every answer.
    """

    needs_advantages = needs_old = True
    teacher_topk = 0

    def __init__(
        self,
        *,
        clip_low: float,
        clip_high: float,
        kl_coefficient: float,
        kl_estimator: str,
        dense_weight: float,
        dense_clip: float,
        aggregation: str,
    ):
        _require(0 < clip_low <= 1, "clip_low", clip_low, "above 0 and at most 1")
        _require(clip_high > 0, "clip_high", clip_high, "above 0")
        _require(kl_coefficient >= 0, "kl_coefficient", kl_coefficient, "0 or more")
        _require(kl_estimator in KL_LOSSES, "kl_estimator", kl_estimator, f"one of {KL_LOSSES} (k1 steers nothing)")
        _require(dense_weight >= 0, "dense_weight", dense_weight, "0 or more")
        _require(dense_clip > 0, "dense_clip", dense_clip, "above 0 nats")
        _require(aggregation in AGGREGATIONS, "aggregation", aggregation, f"one of {AGGREGATIONS}")
        self.clip_low, self.clip_high = clip_low, clip_high
        self.kl_coefficient, self.kl_estimator = kl_coefficient, kl_estimator
        self.dense_weight, self.dense_clip = dense_weight, dense_clip
        self.aggregation = aggregation
        self.needs_reference = kl_coefficient > 0
        self.needs_teacher = dense_weight > 0

    def __call__(self, logprobs: Tensor, batch: RolloutBatch) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs = _real(logprobs, batch)
        old = _real(_given(batch.old_logprobs, "old_logprobs", self), batch)
        advantages, metrics = self._advantages(old, batch)

        ratio = (logprobs - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        policy_loss = self._mean(-torch.minimum(ratio * advantages, clipped * advantages), batch)
        loss = policy_loss
        # the minimum takes the clipped branch where the ratio has already moved as far as the advantage wanted
        stopped = torch.where(advantages > 0, ratio > 1 + self.clip_high, ratio < 1 - self.clip_low) & (advantages != 0)

        if self.needs_reference:
            reference = _real(_given(batch.ref_logprobs, "ref_logprobs", self), batch)
            kl_loss = self.kl_coefficient * self._mean(kl_estimate(logprobs, reference, self.kl_estimator), batch)
            loss = loss + kl_loss
            metrics["loss/kl"] = kl_loss.detach()
            metrics["kl/reference"] = _token_mean(kl_estimate(logprobs.detach(), reference, "k3"), batch)

        metrics["loss/policy"] = policy_loss.detach()
        metrics["kl/old"] = _token_mean(kl_estimate(old, logprobs.detach(), "k1"), batch)
        metrics["health/logprob_error"] = _token_mean((logprobs.detach() - old).abs(), batch)
        metrics["clip_fraction"] = _token_mean(stopped.float(), batch)
        metrics["entropy"] = _token_mean(-logprobs.detach(), batch)
        return loss, metrics

    def _advantages(self, old: Tensor, batch: RolloutBatch) -> tuple[Tensor, dict[str, Tensor]]:
        advantages = batch.advantages if batch.advantages.dim() == 2 else batch.advantages[:, None]
        advantages = _real(advantages.expand_as(old), batch)
        if not self.needs_teacher:
            return advantages, {}
        logratio = _real(_given(batch.teacher_logprobs, "teacher_logprobs", self), batch) - old
        dense = self.dense_weight * (logratio - batch.teacher_baseline).clamp(-self.dense_clip, self.dense_clip)
        return advantages + dense, {"teacher/logratio": _token_mean(logratio, batch)}

    def _mean(self, values: Tensor, batch: RolloutBatch) -> Tensor:
        if self.aggregation == "token_mean":
            return _token_mean(values, batch)
        return masked_mean(values, batch.response_mask, dim=1).sum() / batch.num_loss_rollouts


class DistillationLoss:
    """Sequence-level distillation (1606.07947): mean negative log-likelihood, per token, of the teacher's answers.

    The baseline of every claim: with ``TeacherRollouts`` this is supervised fine-tuning on the teacher's words.
    """

    needs_advantages = needs_old = needs_reference = needs_teacher = False
    teacher_topk = 0

    def __call__(self, logprobs: Tensor, batch: RolloutBatch) -> tuple[Tensor, dict[str, Tensor]]:
        loss = _token_mean(-_real(logprobs, batch), batch)
        return loss, {"loss/distillation": loss.detach()}


class ForwardKLLoss:
    """Token-level distillation: KL(teacher || student), mean over tokens, mass-covering.

    Over the teacher's ``teacher_topk`` likeliest tokens, and all others as one bucket: a lower bound of the full KL,
    and exact when K covers the vocabulary (the teacher clips K to V).
    """

    needs_advantages = needs_old = needs_reference = needs_teacher = False

    def __init__(self, *, teacher_topk: int):
        _require(teacher_topk >= 1, "teacher_topk", teacher_topk, "1 or more")
        self.teacher_topk = teacher_topk

    def __call__(self, logprobs: Tensor, batch: RolloutBatch) -> tuple[Tensor, dict[str, Tensor]]:
        student, teacher = _candidates(logprobs, batch, self)
        student_tail, teacher_tail = _tail(student), _tail(teacher)
        head = (teacher.exp() * (teacher - student)).sum(-1)
        tail = teacher_tail * (teacher_tail.log() - student_tail.log())
        loss = _token_mean(head + torch.where(teacher_tail > MIN_TAIL, tail, 0.0), batch)
        return loss, {"loss/forward_kl": loss.detach()}


class ReverseKLLoss:
    """Dense on-policy distillation: KL(student || teacher), mean over tokens, mode-seeking (GKD 2306.13649, beta = 1).

    Candidates and tail as in ``ForwardKLLoss``; the teacher's tail is taken as at least ``MIN_TAIL``, so that mass
    outside of its candidates costs much, but not infinitely much.
    """

    needs_advantages = needs_old = needs_reference = needs_teacher = False

    def __init__(self, *, teacher_topk: int):
        _require(teacher_topk >= 1, "teacher_topk", teacher_topk, "1 or more")
        self.teacher_topk = teacher_topk

    def __call__(self, logprobs: Tensor, batch: RolloutBatch) -> tuple[Tensor, dict[str, Tensor]]:
        student, teacher = _candidates(logprobs, batch, self)
        student_tail, teacher_tail = _tail(student), _tail(teacher)
        head = (student.exp() * (student - teacher)).sum(-1)
        tail = student_tail * (student_tail.log() - teacher_tail.log())
        loss = _token_mean(head + torch.where(student_tail > MIN_TAIL, tail, 0.0), batch)
        return loss, {"loss/reverse_kl": loss.detach()}


def _candidates(logprobs: Tensor, batch: RolloutBatch, objective: object) -> tuple[Tensor, Tensor]:
    """Student's and teacher's log-probabilities (N, T, K) at the teacher's candidates, safe where padded."""
    teacher = _given(batch.teacher_topk_logprobs, "teacher_topk_logprobs", objective)
    if logprobs.shape != teacher.shape:
        raise ValueError(
            f"{type(objective).__name__} got the student's log-probabilities as {tuple(logprobs.shape)}, expected "
            f"{tuple(teacher.shape)} = (N, T, K), one for each of the teacher's candidates in batch.teacher_topk_ids"
        )
    padding = -math.log(2 * teacher.shape[-1])  # head and tail of one half each: every log below is finite
    mask = batch.response_mask.unsqueeze(-1)
    return torch.where(mask, logprobs, padding), torch.where(mask, teacher, padding)


def _tail(logprobs: Tensor) -> Tensor:
    """Probability of everything outside of the K candidates, at least ``MIN_TAIL``: (N, T, K) -> (N, T)."""
    return (-logprobs.logsumexp(-1).expm1()).clamp(min=MIN_TAIL)


def _real(values: Tensor, batch: RolloutBatch) -> Tensor:
    return torch.where(batch.response_mask, values, 0.0)


def _token_mean(values: Tensor, batch: RolloutBatch) -> Tensor:
    """This microbatch's share of the mean over all tokens of the global batch."""
    return _real(values, batch).sum() / batch.num_loss_tokens


def _given(values: Tensor | None, name: str, objective: object) -> Tensor:
    if values is None:
        raise ValueError(f"{type(objective).__name__} needs batch.{name}, got None: see its needs_* fields")
    return values


def _require(condition: bool, key: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{key} must be {expected}, got {value!r}: change objective.{key}")
