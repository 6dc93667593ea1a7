# SPDX-License-Identifier: Apache-2.0
import math
from dataclasses import replace

import pytest
import torch
from loss_cases import make_batch, one_token, random_case

from nemo_rba.algorithms.policy_losses import CISPOLoss, DualClipLoss, GSPOLoss, ReinforceLoss

COMMON = {
    "kl_coefficient": 0.0,
    "kl_estimator": "k3",
    "dense_weight": 0.0,
    "dense_clip": 5.0,
    "aggregation": "token_mean",
}
NO_KL = {"kl_coefficient": 0.0, "kl_estimator": "k3"}


def dual_clip(**changes):
    return DualClipLoss(**(COMMON | {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0} | changes))


def cispo(**changes):
    return CISPOLoss(**(COMMON | {"ratio_max": 5.0} | changes))


def gspo(**changes):
    return GSPOLoss(**(NO_KL | {"clip_low": 0.2, "clip_high": 0.28} | changes))


def at_ratio(ratio, advantage):
    """One token with log pi = -1."""
    return one_token(-1.0, advantages=torch.tensor([advantage]), old_logprobs=torch.tensor([[-1.0 - math.log(ratio)]]))


def test_reinforce_by_hand():
    mask = torch.tensor([[True, True], [True, False]])
    batch = make_batch(mask, advantages=torch.tensor([2.0, -1.0]), old_logprobs=torch.full((2, 2), -9.0))
    logprobs = torch.tensor([[-1.0, -0.5], [-4.0, -7.0]], requires_grad=True)
    loss, metrics = ReinforceLoss(**COMMON)(logprobs, batch)  # -(2 * -1 + 2 * -.5 - 1 * -4) / 3
    loss.backward()
    assert loss.item() == pytest.approx(-1 / 3)
    assert logprobs.grad.flatten().tolist() == pytest.approx([-2 / 3, -2 / 3, 1 / 3, 0.0])
    assert "clip_fraction" not in metrics
    assert metrics["entropy"].item() == pytest.approx(5.5 / 3)
    textbook = ReinforceLoss(**(COMMON | {"aggregation": 1}))(logprobs, batch)[0]
    assert textbook.item() == pytest.approx(-0.5), "sums over tokens, mean over the 2 answers"


def test_reinforce_knows_no_ratio():
    logprobs, batch = at_ratio(50.0, 2.0)
    loss, metrics = ReinforceLoss(**COMMON)(logprobs, batch)
    loss.backward()
    assert (loss.item(), logprobs.grad.item()) == (2.0, -2.0)
    assert metrics["health/logprob_error"].item() == pytest.approx(3.9120230), "log 50"


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (2.0, -2.0, 4.0, 4.0, 0.0),  # PPO as it is
        (5.0, -2.0, 6.0, 0.0, 1.0),  # PPO says 10
        (0.5, -2.0, 1.6, 0.0, 1.0),  # PPO's own clip
        (5.0, 2.0, -2.56, 0.0, 1.0),  # a good answer has no second clip
        (0.1, 2.0, -0.2, -0.2, 0.0),
    ],
)
def test_dual_clip_by_hand(ratio, advantage, loss, gradient, clipped):
    logprobs, batch = at_ratio(ratio, advantage)
    value, metrics = dual_clip()(logprobs, batch)
    value.backward()
    assert value.item() == pytest.approx(loss)
    assert logprobs.grad.item() == pytest.approx(gradient)
    assert metrics["clip_fraction"].item() == clipped


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.5, 2.0, 3.0, -3.0, 0.0),  # -1.5 * 2 * (-1)
        (8.0, 2.0, 10.0, -10.0, 1.0),  # the weight is bounded, the gradient stays
        (8.0, -2.0, -10.0, 10.0, 1.0),
        (0.01, 2.0, 0.02, -0.02, 0.0),  # no lower bound
    ],
)
def test_cispo_by_hand(ratio, advantage, loss, gradient, clipped):
    logprobs, batch = at_ratio(ratio, advantage)
    value, metrics = cispo()(logprobs, batch)
    value.backward()
    assert value.item() == pytest.approx(loss, rel=1e-5)
    assert logprobs.grad.item() == pytest.approx(gradient, rel=1e-5)
    assert metrics["clip_fraction"].item() == clipped


@pytest.mark.parametrize(
    ("advantage", "loss", "gradients", "clipped"),
    [
        # ratios 4, 1 and padding: s = sqrt(4 * 1) = 2; each token has half of its answer's gradient
        (-1.0, 2.0, [1.0, 1.0, 0.0], 0.0),
        (1.0, -1.28, [0.0, 0.0, 0.0], 1.0),
    ],
)
def test_gspo_by_hand(advantage, loss, gradients, clipped):
    old = torch.tensor([[-3.0 - math.log(4), -1.0, 5.0]])
    batch = make_batch(torch.tensor([[True, True, False]]), advantages=torch.tensor([advantage]), old_logprobs=old)
    logprobs = torch.tensor([[-3.0, -1.0, -2.0]], requires_grad=True)
    value, metrics = gspo()(logprobs, batch)
    value.backward()
    assert value.item() == pytest.approx(loss)
    assert logprobs.grad[0].tolist() == pytest.approx(gradients)
    assert metrics["clip_fraction"].item() == clipped


def test_gspo_is_the_loss_of_the_paper():
    """The token form has the value and the gradient of -min(s A, clip(s) A) with s of whole answers."""
    tokens, _, batch = random_case()
    ours, paper = tokens.clone().requires_grad_(), tokens.clone().requires_grad_()
    loss, _ = gspo(clip_low=0.1, clip_high=0.1)(ours, batch)
    length = batch.response_mask.sum(1)
    s = (((paper - batch.old_logprobs) * batch.response_mask).sum(1) / length).exp()
    expected = -torch.minimum(s * batch.advantages, s.clamp(0.9, 1.1) * batch.advantages).mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, paper.grad)


@pytest.mark.parametrize("objective", [ReinforceLoss(**COMMON), dual_clip(), cispo(), gspo()])
def test_all_are_reinforce_at_ratio_one(objective):
    tokens, _, batch = random_case()
    logprobs = tokens.clone().requires_grad_()
    loss, metrics = objective(logprobs, replace(batch, old_logprobs=tokens))
    loss.backward()
    if isinstance(objective, GSPOLoss):
        per_token = batch.response_mask / batch.response_mask.sum(1, keepdim=True) / len(batch)
    else:
        per_token = batch.response_mask / batch.num_loss_tokens
    torch.testing.assert_close(logprobs.grad, -batch.advantages[:, None] * per_token)
    assert metrics["kl/old"] == 0
    assert metrics.get("clip_fraction", 0) == 0


@pytest.mark.parametrize("objective", [dual_clip(), cispo(), gspo()])
@pytest.mark.parametrize("old", [-200.0, 200.0])
def test_a_wild_ratio_stays_finite(objective, old):
    logprobs, batch = one_token(-1.0, advantages=torch.tensor([-1.0]), old_logprobs=torch.tensor([[old]]))
    loss, _ = objective(logprobs, batch)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logprobs.grad).all()


@pytest.mark.parametrize("make", [lambda **kw: ReinforceLoss(**(COMMON | kw)), dual_clip, cispo, gspo])
def test_kl_term_by_hand(make):
    logprobs, batch = one_token(
        math.log(0.5),
        advantages=torch.zeros(1),
        old_logprobs=torch.tensor([[math.log(0.5)]]),
        ref_logprobs=torch.tensor([[math.log(0.25)]]),
    )
    objective = make(kl_coefficient=0.1)
    assert objective.needs_reference
    assert not make().needs_reference
    loss, metrics = objective(logprobs, batch)
    assert loss.item() == pytest.approx(0.01931472), "0.1 (0.5 - 1 + log 2)"
    assert metrics["kl/reference"].item() == pytest.approx(0.1931472)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize("make", [lambda **kw: ReinforceLoss(**(COMMON | kw)), dual_clip, cispo, gspo])
def test_the_teachers_answers_are_no_samples_of_the_students_kl(make, estimator):
    """Two answers, the second the teacher's: what the start model thinks of it costs nothing, however much it is."""
    mask = torch.ones(2, 1, dtype=torch.bool)
    objective = make(kl_coefficient=0.1, kl_estimator=estimator)
    found = []
    for of_teachers in (-1.0, 40.0):
        logprobs = torch.tensor([[math.log(0.5)], [-30.0]], requires_grad=True)
        batch = make_batch(
            mask, advantages=torch.zeros(2), old_logprobs=logprobs.detach(), is_own=torch.tensor([True, False]),
            ref_logprobs=torch.tensor([[math.log(0.25)], [of_teachers]]),
        )  # fmt: skip
        loss, metrics = objective(logprobs, batch)
        loss.backward()
        assert logprobs.grad[0].abs() > 0
        assert logprobs.grad[1] == 0
        found.append((loss.item(), metrics["kl/reference"].item()))
    assert found[0] == found[1]
    value = {"k2": math.log(2) ** 2 / 2, "k3": 0.5 - 1 + math.log(2)}[estimator]
    assert found[0][0] == pytest.approx(0.1 * value / 2), "of two tokens"


def test_the_teachers_judgement_is_added_to_the_advantage():
    logprobs, batch = one_token(
        -4.0, advantages=torch.tensor([1.0]), old_logprobs=torch.tensor([[-4.0]]),
        teacher_logprobs=torch.tensor([[-1.0]]),
    )  # fmt: skip
    dense = COMMON | {"dense_weight": 0.5, "dense_clip": 2.0}
    assert ReinforceLoss(**dense)(logprobs, batch)[0].item() == pytest.approx(8.0), "(1 + 0.5 * 2) * 4"
    assert dual_clip(**dense)(logprobs, batch)[0].item() == pytest.approx(-2.0)
    assert cispo(**dense)(logprobs, batch)[0].item() == pytest.approx(8.0)


@pytest.mark.parametrize(
    ("make", "key", "value"),
    [
        (dual_clip, "dual_clip", 1.2),
        (dual_clip, "clip_low", 0.0),
        (cispo, "ratio_max", 0.5),
        (gspo, "clip_high", -1.0),
        (gspo, "kl_estimator", "k1"),
        (cispo, "aggregation", "sum"),
    ],
)
def test_bad_settings_name_the_key(make, key, value):
    with pytest.raises(ValueError, match=rf"{key} must be .* change objective\.{key}"):
        make(**{key: value})
