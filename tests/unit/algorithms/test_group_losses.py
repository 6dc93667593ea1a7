# SPDX-License-Identifier: Apache-2.0
import math
from dataclasses import replace

import pytest
import torch
from loss_cases import make_batch

from nemo_rba.algorithms.group_losses import DPOLoss, MinimumRiskLoss

NO_KL = {"kl_coefficient": 0.0, "kl_estimator": "k3"}


def answers(probabilities, advantages, groups, **fields):
    """Answers of two tokens and padding: the first is certain, the second has the probability given."""
    logprobs = torch.zeros(len(probabilities), 3)
    logprobs[:, 1], logprobs[:, 2] = torch.tensor(probabilities).log(), 7.0
    mask = torch.tensor([[True, True, False]] * len(probabilities))
    batch = make_batch(mask, advantages=torch.tensor(advantages), prompt_index=torch.tensor(groups), **fields)
    return logprobs.requires_grad_(), batch


@pytest.mark.parametrize(
    ("sharpness", "loss", "gradients"),
    [
        # shares 3/4 and 1/4; d/dlog pi(y_n) = -alpha P^_n (A_n - sum P^ A), sum P^ A = 0.5
        (1.0, -0.5, [-0.375, 0.375]),
        # square roots: shares 0.6339746 and 0.3660254, sum P^ A = 0.2679492
        (0.5, -0.2679492, [-0.2320508, 0.2320508]),
    ],
)
def test_minimum_risk_by_hand(sharpness, loss, gradients):
    logprobs, batch = answers([0.3, 0.1], [1.0, -1.0], [0, 0])
    value, metrics = MinimumRiskLoss(sharpness=sharpness, **NO_KL)(logprobs, batch)
    value.backward()
    assert value.item() == pytest.approx(loss)
    assert logprobs.grad[:, 1].tolist() == pytest.approx(gradients)
    assert logprobs.grad[:, 0].tolist() == pytest.approx(gradients), "every token of an answer counts alike"
    assert logprobs.grad[:, 2].tolist() == [0.0, 0.0]
    assert metrics["risk/largest_share"].item() == pytest.approx(0.75 if sharpness == 1 else 0.6339746)


def test_minimum_risk_is_a_mean_over_prompts_and_knows_no_baseline():
    logprobs, batch = answers([0.3, 0.1, 0.2, 0.2], [1.0, -1.0, 4.0, -4.0], [0, 0, 5, 5])
    objective = MinimumRiskLoss(sharpness=1.0, **NO_KL)
    loss, metrics = objective(logprobs, batch)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert loss.item() == pytest.approx(-0.25), "(-0.5 + 0) / 2 prompts"
    assert gradient[:, 1].tolist() == pytest.approx([-0.1875, 0.1875, -1.0, 1.0])
    assert metrics["risk/largest_share"].item() == pytest.approx(0.625)
    moved = replace(batch, advantages=batch.advantages + torch.tensor([3.0, 3.0, -2.0, -2.0]))
    torch.testing.assert_close(torch.autograd.grad(objective(logprobs, moved)[0], logprobs)[0], gradient)


def test_minimum_risk_survives_long_answers_and_adds_the_kl():
    logprobs, batch = answers([1.0, 1.0], [1.0, -1.0], [0, 0], ref_logprobs=torch.full((2, 3), math.log(0.5)))
    with torch.no_grad():
        logprobs[:, :2] -= 500.0
    assert MinimumRiskLoss(sharpness=1.0, **NO_KL)(logprobs, batch)[0].item() == pytest.approx(0.0)
    logprobs, batch = answers([1.0, 1.0], [1.0, -1.0], [0, 0], ref_logprobs=torch.full((2, 3), math.log(0.5)))
    objective = MinimumRiskLoss(sharpness=1.0, kl_coefficient=0.1, kl_estimator="k3")
    assert objective.needs_reference
    loss, metrics = objective(logprobs, batch)
    assert loss.item() == pytest.approx(0.01931472), "all four tokens: 0.1 (0.5 - 1 + log 2)"
    assert metrics["loss/risk"].item() == pytest.approx(0.0)


REFERENCE = torch.tensor([[0.0, math.log(0.25), -9.0], [0.0, math.log(0.2), -9.0], [0.0, math.log(0.9), -9.0]])


@pytest.mark.parametrize(
    ("label_smoothing", "loss", "gradient"),
    [
        # log-ratios log 2 and log 1/2: margin = 0.5 log 4 = log 2, sigma = 2/3
        (0.0, 0.4054651, 1 / 6),  # log 1.5; 0.5 * (1 - 2/3)
        (0.1, 0.4747798, 0.1166667),  # 0.9 log 1.5 + 0.1 log 3; 0.5 * (0.9 / 3 - 0.1 * 2 / 3)
    ],
)
def test_dpo_by_hand(label_smoothing, loss, gradient):
    # the best is row 0, the worst row 1; row 2 lies between and has no part in it
    logprobs, batch = answers([0.5, 0.1, 0.9], [2.0, -1.0, 0.5], [0, 0, 0], ref_logprobs=REFERENCE)
    value, metrics = DPOLoss(beta=0.5, label_smoothing=label_smoothing)(logprobs, batch)
    value.backward()
    assert value.item() == pytest.approx(loss)
    assert logprobs.grad[:, 1].tolist() == pytest.approx([-gradient, gradient, 0.0])
    assert logprobs.grad[:, 2].tolist() == [0.0, 0.0, 0.0]
    assert metrics["dpo/margin"].item() == pytest.approx(0.6931472)
    assert (metrics["dpo/accuracy"].item(), metrics["dpo/ties"].item()) == (1.0, 0.0)


def test_dpo_counts_ties_and_learns_nothing_from_them():
    reference = REFERENCE[[0, 1, 0, 1]]
    logprobs, batch = answers([0.5, 0.1, 0.6, 0.3], [2.0, -1.0, 0.0, 0.0], [0, 0, 3, 3], ref_logprobs=reference)
    loss, metrics = DPOLoss(beta=0.5, label_smoothing=0.0)(logprobs, batch)
    loss.backward()
    assert loss.item() == pytest.approx(0.2027326), "log 1.5 over 2 prompts"
    assert (logprobs.grad[2:] == 0).all()
    assert logprobs.grad[:2, 1].tolist() == pytest.approx([-1 / 12, 1 / 12])
    assert (metrics["dpo/accuracy"].item(), metrics["dpo/ties"].item()) == (0.5, 0.5)
    assert metrics["dpo/margin"].item() == pytest.approx(0.3465736), "log 2 over 2 prompts"


def test_dpo_takes_the_first_among_equals():
    logprobs, batch = answers([0.5] * 4, [0.0, 1.0, 0.0, 1.0], [0] * 4, ref_logprobs=REFERENCE[[0, 1, 0, 1]])
    DPOLoss(beta=1.0, label_smoothing=0.0)(logprobs, batch)[0].backward()
    assert (logprobs.grad[:, 1] != 0).tolist() == [True, True, False, False]


@pytest.mark.parametrize("objective", [MinimumRiskLoss(sharpness=1.0, **NO_KL), DPOLoss(beta=0.1, label_smoothing=0.0)])
def test_what_cannot_be_compared_is_refused(objective):
    logprobs, batch = answers([0.5, 0.1, 0.9], [2.0, -1.0, 0.5], [0, 0, 7], ref_logprobs=REFERENCE)
    with pytest.raises(ValueError, match=r"prompt 7 has 1 answer.*rollouts\.group_size"):
        objective(logprobs, batch)
    with pytest.raises(ValueError, match=r"advantages of shape \(3, 3\)"):
        objective(logprobs, replace(batch, advantages=torch.zeros(3, 3)))


def test_bad_settings_name_the_key():
    with pytest.raises(ValueError, match=r"objective\.sharpness"):
        MinimumRiskLoss(sharpness=0.0, **NO_KL)
    with pytest.raises(ValueError, match=r"objective\.beta"):
        DPOLoss(beta=0.0, label_smoothing=0.0)
    with pytest.raises(ValueError, match=r"objective\.label_smoothing"):
        DPOLoss(beta=0.1, label_smoothing=0.5)
    logprobs, batch = answers([0.5, 0.1], [2.0, -1.0], [0, 0])
    with pytest.raises(ValueError, match=r"batch\.ref_logprobs"):
        DPOLoss(beta=0.1, label_smoothing=0.0)(logprobs, batch)
