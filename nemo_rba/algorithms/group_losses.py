# SPDX-License-Identifier: Apache-2.0
"""Losses over the G answers to a prompt: they weigh or pair whole answers, by ``batch.advantages`` (N,).

Any microbatch has whole groups (``policy.py`` splits by prompt), and all groups have the same size, so both losses are
a mean over the prompts of the global batch: a group's term counts G / ``num_loss_rollouts``. Shapes: logprobs (N, T).
"""

import torch
from torch import Tensor

from nemo_rba.algorithms.loss_terms import (
    KL_REWARDS,
    Metrics,
    answer_mean,
    answers_in_groups,
    check_kl,
    given,
    kl_to_start,
    logprob_error,
    real,
    require,
    start_kl,
    token_mean,
)
from nemo_rba.functional import group_argmax, group_max, group_softmax
from nemo_rba.types import RolloutBatch


class MinimumRiskLoss:
    """Minimum risk training (1512.02433), minimum word error rate training (1712.01818), over a group's own answers.

        P^(y_n) = pi(y_n)^sharpness / sum_m pi(y_m)^sharpness         over the answers to the prompt
        loss    = -sum_n P^(y_n) A_n + kl_coefficient * KL(pi || pi_ref),  A_n = R_n - mean R

    Use with ``GroupCentred``; another baseline of the group gives the same gradient. pi(y) is of the whole answer, not
    per token. An answer sampled twice counts twice (the papers count it once). There is no old policy in it: more than
    one step per batch is allowed by the formula, which only renormalises over answers that were sampled earlier.

    Args:
        sharpness: alpha; 5e-3 in MRT, 1 in MWER. High: the likeliest answer decides, small: all alike.
        kl_coefficient, kl_estimator: KL to the start model, in the loss a mean over tokens; 0 spares it. See
            ``PolicyGradientLoss``.

    Raises:
        ValueError: a setting is out of range; advantages are not (N,); a prompt has a single answer.
    """

    needs_advantages = True
    min_group_size = 2
    needs_teacher = False
    teacher_topk = 0

    def __init__(self, *, sharpness: float, kl_coefficient: float, kl_estimator: str):
        require(sharpness > 0, "sharpness", sharpness, "above 0")
        check_kl(kl_coefficient, kl_estimator)
        self.sharpness = sharpness
        self.kl_coefficient, self.kl_estimator = kl_coefficient, kl_estimator
        self.needs_reference = kl_coefficient > 0
        self.needs_old = self.needs_reference and kl_estimator in KL_REWARDS  # the reward pays by it

    def __call__(self, logprobs: Tensor, batch: RolloutBatch) -> tuple[Tensor, Metrics]:
        advantages, size = answers_in_groups(batch, self)
        logprobs = real(logprobs, batch)
        share = group_softmax(self.sharpness * logprobs.sum(1), batch.prompt_index)
        risk = answer_mean(-size * share * advantages, batch)
        loss, metrics = risk, {}
        if self.needs_reference:
            kl_loss, metrics = kl_to_start(logprobs, batch, self, aggregation="token_mean")
            loss = loss + kl_loss
        metrics["loss/risk"] = risk.detach()
        metrics["risk/largest_share"] = answer_mean(group_max(share.detach(), batch.prompt_index), batch)
        metrics["entropy"] = token_mean(-logprobs.detach(), batch)
        return loss, metrics | logprob_error(logprobs, batch)


class DPOLoss:
    """Online DPO (2305.18290): the best of a prompt's own answers, w, against the worst, l, by their advantages.

        margin = beta * ((log pi(y_w) - log pi_ref(y_w)) - (log pi(y_l) - log pi_ref(y_l)))
        loss   = -(1 - label_smoothing) log sigma(margin) - label_smoothing log sigma(-margin),  mean over prompts

    Pairs are formed here; among equals the first is taken. A group whose answers are all equal has no pair: its loss
    is 0, it stays in the denominator, and ``dpo/ties`` is the share of such prompts. ``dpo/accuracy`` (margin > 0) and
    ``dpo/margin`` are means over all prompts likewise. Any advantage that keeps the order inside a group will do.

    Args:
        beta: strength of the tie to the start model (0.1).
        label_smoothing: assumed share of wrong preferences, at least 0 and below 0.5 (cDPO; 0).

    Raises:
        ValueError: a setting is out of range; no ref_logprobs; advantages are not (N,); a prompt has a single answer.
    """

    needs_advantages = needs_reference = True
    min_group_size = 2
    needs_old = needs_teacher = False
    teacher_topk = 0

    def __init__(self, *, beta: float, label_smoothing: float):
        require(beta > 0, "beta", beta, "above 0")
        require(0 <= label_smoothing < 0.5, "label_smoothing", label_smoothing, "at least 0 and below 0.5")
        self.beta, self.label_smoothing = beta, label_smoothing

    def __call__(self, logprobs: Tensor, batch: RolloutBatch) -> tuple[Tensor, Metrics]:
        advantages, size = answers_in_groups(batch, self)
        logprobs = real(logprobs, batch)
        reference = real(given(batch.ref_logprobs, "ref_logprobs", self), batch)
        best, worst = group_argmax(advantages, batch.prompt_index), group_argmax(-advantages, batch.prompt_index)
        pair, weight = advantages[best] > advantages[worst], size[best]

        logratio = (logprobs - reference).sum(1)
        margin = torch.where(pair, self.beta * (logratio[best] - logratio[worst]), 0.0)
        log_sigmoid = torch.nn.functional.logsigmoid
        losses = -(1 - self.label_smoothing) * log_sigmoid(margin) - self.label_smoothing * log_sigmoid(-margin)
        loss = answer_mean(weight * torch.where(pair, losses, 0.0), batch)
        return loss, {
            "loss/dpo": loss.detach(),
            "dpo/margin": answer_mean(weight * margin.detach(), batch),
            "dpo/accuracy": answer_mean(weight * (margin.detach() > 0), batch),
            "dpo/ties": answer_mean(weight * ~pair, batch),
            "kl/reference": token_mean(start_kl(logprobs.detach(), reference, "k3"), batch),
            "entropy": token_mean(-logprobs.detach(), batch),
        } | logprob_error(logprobs, batch)
