# SPDX-License-Identifier: Apache-2.0
"""Policy gradients beside the clipped one of ``objectives.py``: they differ in what they do with the ratio.

With rho = pi / pi_old, A the advantage, sg no gradient:

| loss          | of every token                                                      | source             |
|---------------|---------------------------------------------------------------------|--------------------|
| ReinforceLoss | -A log pi                                                           | Williams 1992      |
| DualClipLoss  | the clipped loss; where A < 0, at most -dual_clip A                 | 1912.09729         |
| GSPOLoss      | the clipped loss with one ratio an answer, (pi / pi_old)^(1/length) | 2507.18071         |
| CISPOLoss     | -sg(min(rho, ratio_max)) A log pi                                   | 2506.13585         |

The KL to the start model, the teacher's judgement, ``aggregation`` and the metrics are those of ``PolicyGradientLoss``;
shapes: logprobs (N, T), advantages (N,) or (N, T). They differ from one another only when a batch gives more than one
optimiser step (``num_minibatches``): at rho = 1 all have the gradient of REINFORCE.
"""

import torch
from torch import Tensor

from nemo_rba.algorithms.loss_terms import MAX_LOG_RATIO, PolicyGradientLoss, check_clip, require
from nemo_rba.algorithms.objectives import clipped_surrogate
from nemo_rba.functional import masked_mean
from nemo_rba.types import RolloutBatch


class ReinforceLoss(PolicyGradientLoss):
    """REINFORCE: -A log pi, without ratio and clip. For one optimiser step a batch; the next would be off-policy.

    With ``LeaveOneOut`` this is RLOO (2402.14740), with ``GreedyBaseline`` SCST (1612.00563). ``aggregation: 1`` sums
    over an answer's tokens, as the textbook does. The sampler's log-probabilities only go into metrics and the
    teacher's judgement; a policy's own rollouts bring them along at no cost.

    Args:
        kl_coefficient, kl_estimator, dense_weight, dense_clip, aggregation: see ``PolicyGradientLoss``.

    Raises:
        ValueError: a setting is out of range; the batch lacks what ``needs_*`` asks for.
    """

    def surrogate(
        self, logprobs: Tensor, old: Tensor, advantages: Tensor, batch: RolloutBatch
    ) -> tuple[Tensor, None]:  # fmt: skip
        """See ``PolicyGradientLoss``."""
        return -advantages * logprobs, None


class DualClipLoss(PolicyGradientLoss):
    """PPO with a second clip (1912.09729): a bad answer's loss is bounded however much likelier it has become.

        L    = min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)
        loss = -L where A >= 0,  -max(L, dual_clip A) where A < 0

    Args:
        clip_low, clip_high: as in ``ClippedPolicyLoss``.
        dual_clip: largest ratio that still counts where A < 0, above 1 + clip_high (3).
        kl_coefficient, kl_estimator, dense_weight, dense_clip, aggregation: see ``PolicyGradientLoss``.

    Raises:
        ValueError: a setting is out of range; the batch lacks what ``needs_*`` asks for.
    """

    def __init__(
        self, *, clip_low: float, clip_high: float, dual_clip: float, kl_coefficient: float, kl_estimator: str,
        dense_weight: float, dense_clip: float, aggregation: str | int,
    ):  # fmt: skip
        check_clip(clip_low, clip_high)
        require(dual_clip > 1 + clip_high, "dual_clip", dual_clip, f"above 1 + clip_high ({1 + clip_high})")
        super().__init__(
            kl_coefficient=kl_coefficient, kl_estimator=kl_estimator, dense_weight=dense_weight, dense_clip=dense_clip,
            aggregation=aggregation,
        )  # fmt: skip
        self.clip_low, self.clip_high, self.dual_clip = clip_low, clip_high, dual_clip

    def surrogate(
        self, logprobs: Tensor, old: Tensor, advantages: Tensor, batch: RolloutBatch
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """See ``PolicyGradientLoss``."""
        ratio = (logprobs - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        losses, stopped = clipped_surrogate(ratio, advantages, self.clip_low, self.clip_high)
        bounded = (advantages < 0) & (ratio > self.dual_clip)
        return torch.where(bounded, -self.dual_clip * advantages, losses), stopped | bounded


class GSPOLoss(PolicyGradientLoss):
    """Group sequence policy optimisation (2507.18071): one ratio for a whole answer, of its mean log-ratio.

        s_i    = exp(mean_t(log pi - log pi_old))
        loss_i = -min(s_i A_i, clip(s_i, 1 - clip_low, 1 + clip_high) A_i),  mean over answers

    Written as the paper's GSPO-token, sg(s_i) pi_t / sg(pi_t) with the mean over each answer's tokens, which has the
    same value and gradient. An answer is clipped as a whole; its ratio moves far less than a token's, and so the clip
    widths are three orders smaller than PPO's.

    Args:
        clip_low, clip_high: 3e-4 and 4e-4 in the paper.
        kl_coefficient, kl_estimator: see ``PolicyGradientLoss``; the paper has no KL.

    Raises:
        ValueError: a setting is out of range; the batch lacks what ``needs_*`` asks for.
    """

    def __init__(self, *, clip_low: float, clip_high: float, kl_coefficient: float, kl_estimator: str):
        check_clip(clip_low, clip_high)
        super().__init__(
            kl_coefficient=kl_coefficient, kl_estimator=kl_estimator, dense_weight=0.0, dense_clip=1.0,
            aggregation="sequence_mean",
        )  # fmt: skip
        self.clip_low, self.clip_high = clip_low, clip_high

    def surrogate(
        self, logprobs: Tensor, old: Tensor, advantages: Tensor, batch: RolloutBatch
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """See ``PolicyGradientLoss``."""
        fixed = logprobs.detach()
        sequence = masked_mean(fixed - old, batch.response_mask, dim=1)[:, None]
        ratio = (sequence + logprobs - fixed).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        return clipped_surrogate(ratio, advantages, self.clip_low, self.clip_high)


class CISPOLoss(PolicyGradientLoss):
    """Clipped importance weights (2506.13585): the weight is bounded, the gradient of a token never stops.

        loss = -sg(min(rho, ratio_max)) A log pi

    A rare but decisive token, whose ratio leaves PPO's clip after one step, goes on learning. As in the paper, there is
    no lower bound. ``clip_fraction`` is the share of tokens with a bounded weight.

    Args:
        ratio_max: upper bound of the weight, 1 or more. The paper names none; 5 is that of ScaleRL (2510.13786).
        kl_coefficient, kl_estimator, dense_weight, dense_clip, aggregation: see ``PolicyGradientLoss``.

    Raises:
        ValueError: a setting is out of range; the batch lacks what ``needs_*`` asks for.
    """

    def __init__(
        self, *, ratio_max: float, kl_coefficient: float, kl_estimator: str, dense_weight: float, dense_clip: float,
        aggregation: str | int,
    ):  # fmt: skip
        require(ratio_max >= 1, "ratio_max", ratio_max, "1 or more")
        super().__init__(
            kl_coefficient=kl_coefficient, kl_estimator=kl_estimator, dense_weight=dense_weight, dense_clip=dense_clip,
            aggregation=aggregation,
        )  # fmt: skip
        self.ratio_max = ratio_max

    def surrogate(
        self, logprobs: Tensor, old: Tensor, advantages: Tensor, batch: RolloutBatch
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """See ``PolicyGradientLoss``."""
        ratio = (logprobs.detach() - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        return -ratio.clamp(max=self.ratio_max) * advantages * logprobs, ratio > self.ratio_max
