# SPDX-License-Identifier: Apache-2.0
"""The KL as a price on the reward: by hand, through the loop, and refused where nobody would pay it."""

import math

import pytest
import torch
from loss_cases import make_batch, one_token, random_case
from one_word import clipped, make, speech_batch

from nemo_rba.algorithms.advantage import BatchWhitened, LeaveOneOut, NoAdvantage, PerRewardNormalized
from nemo_rba.algorithms.alignment import check_choices
from nemo_rba.algorithms.controllers import AdaptiveKL
from nemo_rba.algorithms.group_losses import MinimumRiskLoss
from nemo_rba.algorithms.importance import TruncatedImportance
from nemo_rba.algorithms.kl_reward import is_priced, kl_price
from nemo_rba.algorithms.objectives import ClippedPolicyLoss
from nemo_rba.algorithms.policy_losses import CISPOLoss, DualClipLoss, GSPOLoss, ReinforceLoss
from nemo_rba.algorithms.rollout import MixedRollouts, PolicyRollouts

COMMON = {"dense_weight": 0.0, "dense_clip": 5.0, "aggregation": "token_mean"}


def priced(coefficient=0.5, estimator="k1_in_reward", dense=0.0):
    return ClippedPolicyLoss(
        clip_low=0.2, clip_high=0.2, kl_coefficient=coefficient, kl_estimator=estimator,
        **COMMON | {"dense_weight": dense},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("estimator", "first", "second"),
    [
        # log pi - log pi_ref: log 2 and -log 4, and padding; then log 2 alone
        ("k1_in_reward", math.log(2) - math.log(4), math.log(2)),
        ("k2_in_reward", (math.log(2) ** 2 + math.log(4) ** 2) / 2, math.log(2) ** 2 / 2),
        ("k3_in_reward", (0.5 - 1 + math.log(2)) + (4 - 1 - math.log(4)), 0.5 - 1 + math.log(2)),
    ],
)
def test_an_answer_pays_for_all_its_tokens(estimator, first, second):
    old = torch.tensor([[math.log(0.5), math.log(0.1), torch.nan], [math.log(0.5), torch.inf, 0.0]])
    reference = torch.tensor([[math.log(0.25), math.log(0.4), 1.0], [math.log(0.25), 0.0, torch.nan]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    price = kl_price(make_batch(mask, old_logprobs=old, ref_logprobs=reference), priced(0.1, estimator))
    torch.testing.assert_close(price, torch.tensor([0.1 * first, 0.1 * second]))


OTHERS = [
    priced(),
    ReinforceLoss(kl_coefficient=0.5, kl_estimator="k1_in_reward", **COMMON),
    DualClipLoss(clip_low=0.2, clip_high=0.2, dual_clip=3.0, kl_coefficient=0.5, kl_estimator="k2_in_reward", **COMMON),
    GSPOLoss(clip_low=0.2, clip_high=0.2, kl_coefficient=0.5, kl_estimator="k1_in_reward"),
    CISPOLoss(ratio_max=5.0, kl_coefficient=0.5, kl_estimator="k3_in_reward", **COMMON),
    MinimumRiskLoss(sharpness=1.0, kl_coefficient=0.5, kl_estimator="k1_in_reward"),
]


@pytest.mark.parametrize("objective", OTHERS, ids=lambda objective: type(objective).__name__)
def test_what_the_reward_has_paid_the_loss_does_not_ask_again(objective):
    tokens, _, batch = random_case()
    assert is_priced(objective)
    assert (objective.needs_reference, objective.needs_old) == (True, True)
    loss, metrics = objective(tokens, batch)
    torch.testing.assert_close(loss, metrics.get("loss/policy", metrics.get("loss/risk")))
    assert "loss/kl" not in metrics
    assert metrics["kl/reference"] > 0, "is still told, and steers an adaptive coefficient"


def test_without_a_coefficient_nobody_pays():
    assert not is_priced(priced(0.0))
    assert not is_priced(clipped(kl=0.1))


def run(objective, **changes):
    """The advantages of each batch of a run whose policy has moved towards "yes" before."""
    module, step = make(objective, **changes)
    with torch.no_grad():
        module.policy.logit += 0.5
    seen = [module.align(speech_batch(), step) for _ in range(3)]
    return module, seen


def test_the_price_is_part_of_the_advantage():
    """pi(yes) = 0.731, pi_ref = 0.5: k1 is log 1.462 = 0.380 for a yes and log 0.538 = -0.620 for a no."""
    module, (first, *_) = run(priced(0.5))
    batch = module.policy.seen[0]
    yes = batch.response_ids[:, 0] == 0
    rewards = yes.float() - 0.5 * torch.where(yes, 0.3798855, -0.6201145)
    torch.testing.assert_close(batch.advantages, LeaveOneOut()(rewards, batch.prompt_index))
    price = 0.5 * torch.where(yes, 0.3798855, -0.6201145).mean().item()
    assert first["kl/price"] == pytest.approx(price, abs=1e-5)
    assert first["reward/mean"] == pytest.approx(yes.float().mean().item()), "the reward is told before it has paid"


def test_the_price_decides_how_far_the_policy_goes():
    """The best policy is pi_ref exp(R / 2) / Z, logits of +-1/4; without a price there is no end to it."""
    free, dear = make(priced(1e-9)), make(priced(2.0))
    for module, step in (free, dear):
        for _ in range(40):
            module.align(speech_batch(16), step)
    assert float(free[0].policy.logit.detach()) > 1.5
    assert float(dear[0].policy.logit.detach()) == pytest.approx(0.25, abs=0.1)


def test_importance_minibatches_and_an_adaptive_coefficient_go_with_it():
    controller = AdaptiveKL(coefficient=0.5, target=1e-3, horizon_steps=1)
    module, seen = run(
        priced(0.1), importance=TruncatedImportance(maximum=2.0), num_minibatches=2, kl_controller=controller
    )
    assert seen[0]["kl/coefficient"] == pytest.approx((0.5 + 0.5 * 1.2) / 2)
    assert module.objective.kl_coefficient == controller.value > 0.5
    assert len(module.policy.seen) == 6


def test_a_price_that_nobody_would_pay_is_refused():
    own = PolicyRollouts(group_size=4, max_new_tokens=2, temperature=1.0, top_p=1.0)
    mixed = MixedRollouts(group_size=4, max_new_tokens=2, temperature=1.0, top_p=1.0)
    parts = PerRewardNormalized(weights={"yes": 1.0}, epsilon=1e-4, batch_normalize=True)
    with pytest.raises(ValueError, match=r"objective\.kl_estimator is k1_in_reward.*NoAdvantage does not look at that"):
        check_choices(own, NoAdvantage(), priced(dense=1.0))
    with pytest.raises(ValueError, match="PerRewardNormalized does not look at that"):
        check_choices(own, parts, priced())
    with pytest.raises(ValueError, match="answers that MixedRollouts has of somebody else"):
        check_choices(mixed, LeaveOneOut(), priced())
    check_choices(own, BatchWhitened(epsilon=1e-4, group_baseline=False), priced())
    check_choices(own, parts, priced(0.0))


def test_a_token_that_the_start_model_prefers_by_far_is_bounded():
    """e^90 is no float32: the step would have been nan."""
    logprobs, batch = one_token(
        -95.0, advantages=torch.zeros(1), old_logprobs=torch.tensor([[-95.0]]), ref_logprobs=torch.tensor([[-5.0]])
    )
    for estimator in ("k3", "k3_in_reward", "k2"):
        loss, metrics = priced(0.1, estimator)(logprobs, batch)
        assert torch.isfinite(loss)
        assert all(torch.isfinite(value) for value in metrics.values())
    priced(0.1, "k3")(logprobs, batch)[0].backward()
    assert logprobs.grad.item() == 0.0
    assert kl_price(batch, priced(1.0, "k3_in_reward")).item() == pytest.approx(math.expm1(20) - 20, rel=1e-5)
