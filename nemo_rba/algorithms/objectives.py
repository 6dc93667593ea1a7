# SPDX-License-Identifier: Apache-2.0
"""Losses that see log-probabilities, never a model: (logprobs, batch) -> (loss, metrics).

| loss               | what it needs                       | source                             | file             |
|--------------------|-------------------------------------|------------------------------------|------------------|
| ClippedPolicyLoss  | own answers, advantages, or teacher | PPO, GRPO, DAPO, on-policy distil. | here             |
| JudgedPolicyLoss   | the same, the teacher's likeliest   | the same, and GKD 2306.13649       | here             |
| DistillationLoss   | the teacher's answers               | 1606.07947                         | here             |
| ForwardKLLoss      | the teacher's likeliest tokens      | token-level distillation           | here             |
| ReverseKLLoss      | the same                            | GKD 2306.13649, beta = 1           | here             |
| GeneralizedJSDLoss | the same                            | GKD 2306.13649                     | here             |
| ReinforceLoss      | own answers, advantages             | Williams 1992, SCST, RLOO          | policy_losses.py |
| DualClipLoss       | the same                            | 1912.09729                         | policy_losses.py |
| GSPOLoss           | the same                            | 2507.18071                         | policy_losses.py |
| CISPOLoss          | the same                            | 2506.13585                         | policy_losses.py |
| MinimumRiskLoss    | groups of own answers, advantages   | MRT 1512.02433, MWER 1712.01818    | group_losses.py  |
| DPOLoss            | the same, and the start model       | 2305.18290, online                 | group_losses.py  |

Deltas from the textbook:

- Every sum, of losses and of metrics, is divided by a count over the *global* batch (``num_loss_tokens`` or
  ``num_loss_rollouts``). Adding microbatches or data-parallel ranks therefore gives the batch's value exactly.
- Padding is set to 0 before any arithmetic, so whatever stands there (inf, nan) gets a gradient of exactly 0.
- One policy loss covers REINFORCE, RLOO, GRPO, DAPO's clipping and on-policy distillation: what differs between them
  is the advantage (``advantage.py``), the two clip widths, the KL term and the weight of the teacher's judgement.
- Entropy is the mean of -log pi over the sampled tokens: no logits come this far. Losses for own answers that see the
  teacher's candidates have that of these and of all other tokens as one.

Shapes: logprobs (N, T), or (N, T, K) for the losses with ``teacher_topk`` = K > 0, (N, T, K + 1) if ``needs_sampled``.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from nemo_rba.algorithms.loss_terms import (
    MAX_LOG_RATIO,
    MIN_TAIL,
    PolicyGradientLoss,
    candidate_entropy,
    candidates,
    check_clip,
    given,
    real,
    require,
    tail,
    token_mean,
)
from nemo_rba.types import RolloutBatch


class ClippedPolicyLoss(PolicyGradientLoss):
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
        kl_estimator: in the loss "k2" or "k3", in the reward "k1_in_reward", "k2_in_reward" or "k3_in_reward", see
            ``PolicyGradientLoss``.
        dense_weight: weight of the teacher's judgement; 0 spares the teacher's forward pass.
        dense_clip: bound on the teacher's log-ratio, in nats.
        aggregation: "token_mean" weighs every token alike, "sequence_mean" every answer; a number L divides each
            answer's sum by L (Dr.GRPO), see ``loss_terms.aggregate``.
    """

    def __init__(
        self,
        *,
        clip_low: float,
        clip_high: float,
        kl_coefficient: float,
        kl_estimator: str,
        dense_weight: float,
        dense_clip: float,
        aggregation: str | int,
    ):
        check_clip(clip_low, clip_high)
        super().__init__(
            kl_coefficient=kl_coefficient, kl_estimator=kl_estimator, dense_weight=dense_weight, dense_clip=dense_clip,
            aggregation=aggregation,
        )  # fmt: skip
        self.clip_low, self.clip_high = clip_low, clip_high

    def surrogate(
        self, logprobs: Tensor, old: Tensor, advantages: Tensor, batch: RolloutBatch
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """See ``PolicyGradientLoss``."""
        ratio = (logprobs - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        return clipped_surrogate(ratio, advantages, self.clip_low, self.clip_high)


class JudgedPolicyLoss(ClippedPolicyLoss):
    """RBA whose teacher judges by its whole distribution before each token, not by the one token that was sampled.

        loss = ClippedPolicyLoss without dense part + judgement_weight * judgement

    In ``ClippedPolicyLoss`` the teacher's opinion of a sampled token is an estimate, by one sample, of the reverse KL's
    gradient. Here ``judgement``, e.g. GKD's divergence on own answers, has no such noise; the reward stays a policy
    gradient.

    Args:
        judgement: a loss over the teacher's candidates, such as ``GeneralizedJSDLoss``.
        judgement_weight: of it, above 0.
        others: as for ``ClippedPolicyLoss``.
    """

    needs_sampled = True  # one more candidate, the last one: the token that was sampled

    def __init__(
        self, *, clip_low: float, clip_high: float, kl_coefficient: float, kl_estimator: str, aggregation: str | int,
        judgement, judgement_weight: float,
    ):  # fmt: skip
        super().__init__(
            clip_low=clip_low, clip_high=clip_high, kl_coefficient=kl_coefficient, kl_estimator=kl_estimator,
            dense_weight=0.0, dense_clip=1.0, aggregation=aggregation,
        )  # fmt: skip
        require(judgement_weight > 0, "judgement_weight", judgement_weight, "above 0")
        require(judgement.teacher_topk > 0, "judgement.teacher_topk", judgement.teacher_topk, "1 or more")
        self.judgement, self.judgement_weight = judgement, judgement_weight
        self.teacher_topk = judgement.teacher_topk

    def __call__(self, logprobs: Tensor, batch: RolloutBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """logprobs (N, T, K + 1): the teacher's candidates, then the sampled token."""
        teacher = given(batch.teacher_topk_logprobs, "teacher_topk_logprobs", self)
        loss, metrics = super().__call__(logprobs[..., -1], batch)
        judged, more = self.judgement(logprobs[..., :-1], replace(batch, teacher_topk_logprobs=teacher[..., :-1]))
        return loss + self.judgement_weight * judged, metrics | more


def clipped_surrogate(ratio: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """-min(rho A, clip(rho, 1 - low, 1 + high) A) of every token, and where its gradient has stopped: (N, T) each."""
    clipped = ratio.clamp(1 - low, 1 + high)
    # the minimum takes the clipped branch where the ratio has already moved as far as the advantage wanted
    stopped = torch.where(advantages > 0, ratio > 1 + high, ratio < 1 - low) & (advantages != 0)
    return -torch.minimum(ratio * advantages, clipped * advantages), stopped


class DistillationLoss:
    """Sequence-level distillation (1606.07947): mean negative log-likelihood, per token, of the teacher's answers.

    The baseline of every claim: with ``TeacherRollouts`` this is supervised fine-tuning on the teacher's words. On the
    student's own samples its gradient is 0 in expectation, so the loop refuses them.
    """

    needs_advantages = needs_old = needs_reference = needs_teacher = False
    teacher_topk = 0

    def __call__(self, logprobs: Tensor, batch: RolloutBatch) -> tuple[Tensor, dict[str, Tensor]]:
        loss = token_mean(-real(logprobs, batch), batch)
        return loss, {"loss/distillation": loss.detach()}


class ForwardKLLoss:
    """Token-level distillation: KL(teacher || student), mean over tokens, mass-covering.

    Over the teacher's ``teacher_topk`` likeliest tokens, and all others as one bucket: a lower bound of the full KL,
    and exact when K is the size of the vocabulary, the most a teacher gives.
    """

    needs_advantages = needs_old = needs_reference = needs_teacher = False

    def __init__(self, *, teacher_topk: int):
        require(teacher_topk >= 1, "teacher_topk", teacher_topk, "1 or more")
        self.teacher_topk = teacher_topk

    def __call__(self, logprobs: Tensor, batch: RolloutBatch) -> tuple[Tensor, dict[str, Tensor]]:
        student, teacher = candidates(logprobs, batch, self)
        student_tail, teacher_tail = tail(student), tail(teacher)
        head = (teacher.exp() * (teacher - student)).sum(-1)
        rest = teacher_tail * (teacher_tail.log() - student_tail.log())
        loss = token_mean(head + torch.where(teacher_tail > MIN_TAIL, rest, 0.0), batch)
        return loss, {"loss/forward_kl": loss.detach()}


class ReverseKLLoss:
    """Dense on-policy distillation: KL(student || teacher), mean over tokens, mode-seeking (GKD 2306.13649, beta = 1).

    Candidates and tail as in ``ForwardKLLoss``; the teacher's tail is taken as at least ``MIN_TAIL``, so that mass
    outside of its candidates costs much, but not infinitely much.
    """

    needs_advantages = needs_old = needs_reference = needs_teacher = False

    def __init__(self, *, teacher_topk: int):
        require(teacher_topk >= 1, "teacher_topk", teacher_topk, "1 or more")
        self.teacher_topk = teacher_topk

    def __call__(self, logprobs: Tensor, batch: RolloutBatch) -> tuple[Tensor, dict[str, Tensor]]:
        student, teacher = candidates(logprobs, batch, self)
        student_tail, teacher_tail = tail(student), tail(teacher)
        head = (student.exp() * (student - teacher)).sum(-1)
        rest = student_tail * (student_tail.log() - teacher_tail.log())
        loss = token_mean(head + torch.where(student_tail > MIN_TAIL, rest, 0.0), batch)
        return loss, {"loss/reverse_kl": loss.detach(), "entropy": candidate_entropy(student, batch)}


class GeneralizedJSDLoss:
    """Generalised Jensen-Shannon divergence of teacher P and student Q, mean over tokens (GKD 2306.13649).

        M    = beta P + (1 - beta) Q
        loss = beta KL(P || M) + (1 - beta) KL(Q || M)

    Between the forward KL (loss / beta as beta goes to 0) and the reverse KL (loss / (1 - beta) as it goes to 1), and
    bounded, unlike both. Candidates and tail as in ``ForwardKLLoss``. GKD's fraction of own answers is
    ``GKDRollouts.share``.

    Args:
        beta: weight of the teacher in the mixture, between 0 and 1, without them (0.5 is the symmetric one).
        teacher_topk: K, how many of the teacher's likeliest tokens.

    Raises:
        ValueError: a setting is out of range; logprobs are not (N, T, K).
    """

    needs_advantages = needs_old = needs_reference = needs_teacher = False

    def __init__(self, *, beta: float, teacher_topk: int):
        require(0 < beta < 1, "beta", beta, "between 0 (use ForwardKLLoss) and 1 (use ReverseKLLoss), without them")
        require(teacher_topk >= 1, "teacher_topk", teacher_topk, "1 or more")
        self.beta, self.teacher_topk = beta, teacher_topk

    def __call__(self, logprobs: Tensor, batch: RolloutBatch) -> tuple[Tensor, dict[str, Tensor]]:
        student, teacher = candidates(logprobs, batch, self)
        student_tail, teacher_tail = tail(student), tail(teacher)
        mixture = torch.logaddexp(teacher + math.log(self.beta), student + math.log1p(-self.beta))
        mixture_tail = (self.beta * teacher_tail + (1 - self.beta) * student_tail).log()
        values = 0.0
        for weight, part, rest in ((self.beta, teacher, teacher_tail), (1 - self.beta, student, student_tail)):
            head = (part.exp() * (part - mixture)).sum(-1)
            values = values + weight * (head + torch.where(rest > MIN_TAIL, rest * (rest.log() - mixture_tail), 0.0))
        loss = token_mean(values, batch)
        return loss, {"loss/jsd": loss.detach(), "entropy": candidate_entropy(student, batch)}
