# SPDX-License-Identifier: Apache-2.0
"""The KL to the start model as a price on the reward, in the place of a term of the loss.

    R_i' = R_i - kl_coefficient * sum_t k(pi_old, pi_ref)          over the tokens of answer i, before its advantage

PPO for language models (1909.08593), RLOO (2402.14740) and REINFORCE++ (2501.03262) have it there; GRPO has it in the
loss. The price is one number an answer, as verl's ``use_kl_in_reward`` and TRL's RLOO give it to an advantage of whole
answers. REINFORCE++ charges a token only for itself and what follows; what went before is no doing of that token, and
so adds noise to its advantage but nothing to what is learned in expectation.

By k1 the gradient is that of the KL. By k2 and k3, which agree with it in size, it is not; they are for comparison.
"""

import torch
from torch import Tensor

from nemo_rba.algorithms.advantage import NoAdvantage
from nemo_rba.algorithms.loss_terms import KL_REWARDS, given, real, start_kl
from nemo_rba.protocols import AdvantageEstimator, Objective, RolloutSource
from nemo_rba.types import RolloutBatch


def is_priced(objective: Objective) -> bool:
    """Whether ``objective`` takes its KL from the reward."""
    return objective.needs_reference and getattr(objective, "kl_estimator", "") in KL_REWARDS


def kl_price(whole: RolloutBatch, objective: Objective) -> Tensor:
    """What each answer has to pay (N,), float32, in the reward's units: ``kl_coefficient`` times its KL, in nats.

    Args:
        whole: answers with ``old_logprobs`` and ``ref_logprobs``.
        objective: one that ``is_priced``.
    """
    old = real(given(whole.old_logprobs, "old_logprobs", objective), whole)
    reference = real(given(whole.ref_logprobs, "ref_logprobs", objective), whole)
    estimate = start_kl(old, reference, objective.kl_estimator.removesuffix("_in_reward"))
    return objective.kl_coefficient * torch.where(whole.response_mask, estimate, 0.0).sum(1)


def check_priced(source: RolloutSource, advantage: AdvantageEstimator, objective: Objective) -> None:
    """Refuse at setup a price that nobody would pay, or that is no KL.

    Raises:
        ValueError: the advantage does not look at the sum of rewards, or answers are not the student's.
    """
    key = f"objective.kl_estimator is {objective.kl_estimator}"
    if isinstance(advantage, NoAdvantage) or getattr(advantage, "needs_parts", False):
        raise ValueError(
            f"{key}, a price on the sum of rewards, and {type(advantage).__name__} does not look at that; choose k2 or "
            "k3, in the loss, or another advantage"
        )
    if not source.on_policy:
        raise ValueError(
            f"{key}, and the answers that {type(source).__name__} has of somebody else tell nothing of the student's "
            "KL; choose k2 or k3, in the loss, or rollouts=policy"
        )
