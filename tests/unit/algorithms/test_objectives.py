# SPDX-License-Identifier: Apache-2.0
import math
from dataclasses import replace

import pytest
import torch
from loss_cases import make_batch, one_token, random_case, rows

from nemo_rba.algorithms.group_losses import DPOLoss, MinimumRiskLoss
from nemo_rba.algorithms.objectives import (
    ClippedPolicyLoss,
    DistillationLoss,
    ForwardKLLoss,
    GeneralizedJSDLoss,
    JudgedPolicyLoss,
    ReverseKLLoss,
)
from nemo_rba.algorithms.policy_losses import CISPOLoss, DualClipLoss, GSPOLoss, ReinforceLoss

SETTINGS = {
    "clip_low": 0.2,
    "clip_high": 0.28,
    "kl_coefficient": 0.0,
    "kl_estimator": "k3",
    "dense_weight": 0.0,
    "dense_clip": 5.0,
    "aggregation": "token_mean",
}
COMMON = {name: value for name, value in SETTINGS.items() if not name.startswith("clip")}


def policy_loss(**changes) -> ClippedPolicyLoss:
    return ClippedPolicyLoss(**(SETTINGS | changes))


ALL = [
    policy_loss(kl_coefficient=0.1, dense_weight=0.5),
    policy_loss(kl_coefficient=0.1, kl_estimator="k2", aggregation="sequence_mean"),
    DistillationLoss(),
    ForwardKLLoss(teacher_topk=5),
    ReverseKLLoss(teacher_topk=5),
    policy_loss(kl_coefficient=0.1, aggregation=6),
    GeneralizedJSDLoss(beta=0.3, teacher_topk=5),
    ReinforceLoss(**(COMMON | {"kl_coefficient": 0.1})),
    DualClipLoss(clip_low=0.2, clip_high=0.28, dual_clip=1.3, **(COMMON | {"dense_weight": 0.5})),
    GSPOLoss(clip_low=0.2, clip_high=0.2, kl_coefficient=0.1, kl_estimator="k2"),
    CISPOLoss(ratio_max=1.1, **(COMMON | {"aggregation": "sequence_mean"})),
    MinimumRiskLoss(sharpness=0.5, kl_coefficient=0.1, kl_estimator="k3"),
    DPOLoss(beta=0.5, label_smoothing=0.1),
]


@pytest.mark.parametrize("objective", ALL, ids=lambda objective: type(objective).__name__)
def test_microbatches_add_up_exactly(objective):
    tokens, candidates, batch = random_case()
    logprobs = candidates if objective.teacher_topk else tokens
    whole = logprobs.clone().requires_grad_()
    loss, metrics = objective(whole, batch)
    loss.backward()
    split = logprobs.clone().requires_grad_()
    step = 2 if isinstance(objective, MinimumRiskLoss | DPOLoss) else 1  # whole groups, as policy.py gives them
    parts = [objective(split[i : i + step], rows(batch, i, i + step)) for i in range(0, len(batch), step)]
    sum(part for part, _ in parts).backward()
    torch.testing.assert_close(sum(part for part, _ in parts), loss)
    torch.testing.assert_close(split.grad, whole.grad)
    for name, value in metrics.items():
        assert not value.requires_grad
        torch.testing.assert_close(sum(part[name] for _, part in parts), value)


@pytest.mark.parametrize("objective", ALL, ids=lambda objective: type(objective).__name__)
def test_padding_has_no_gradient_whatever_stands_there(objective):
    tokens, candidates, batch = random_case()
    logprobs = (candidates if objective.teacher_topk else tokens).clone()
    logprobs[~batch.response_mask] = torch.nan
    logprobs.requires_grad_()
    garbage = {
        name: torch.where(batch.response_mask, getattr(batch, name), -torch.inf)
        for name in ("old_logprobs", "ref_logprobs", "teacher_logprobs")
    }
    loss, metrics = objective(logprobs, replace(batch, **garbage))
    loss.backward()
    assert all(torch.isfinite(value) for value in [loss, *metrics.values()])
    assert (logprobs.grad[~batch.response_mask] == 0).all()
    assert (logprobs.grad[batch.response_mask] != 0).any()


def test_gradient_at_ratio_one_is_reinforce():
    tokens, _, batch = random_case()
    logprobs = tokens.clone().requires_grad_()
    loss, metrics = policy_loss()(logprobs, replace(batch, old_logprobs=tokens))
    loss.backward()
    reinforce = -batch.advantages[:, None] * batch.response_mask / batch.num_loss_tokens
    torch.testing.assert_close(logprobs.grad, reinforce)
    assert metrics["clip_fraction"] == 0
    assert metrics["kl/old"] == 0


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.5, 2.0, -1.28 * 2, 0.0, 1.0),  # already raised as far as it may
        (1.5, -2.0, 1.5 * 2, 3.0, 0.0),  # raised, but should fall: no limit on the way back
        (0.5, -2.0, 0.8 * 2, 0.0, 1.0),  # already lowered as far as it may
        (0.5, 2.0, -0.5 * 2, -1.0, 0.0),
        (1.1, 2.0, -1.1 * 2, -2.2, 0.0),  # inside
    ],
)
def test_clipping_on_both_sides(ratio, advantage, loss, gradient, clipped):
    logprobs, batch = one_token(
        -1.0, advantages=torch.tensor([advantage]), old_logprobs=torch.tensor([[-1.0 - math.log(ratio)]])
    )
    value, metrics = policy_loss()(logprobs, batch)
    value.backward()
    assert value.item() == pytest.approx(loss)
    assert logprobs.grad.item() == pytest.approx(gradient)
    assert metrics["clip_fraction"].item() == clipped


def test_a_wild_ratio_stays_finite():
    logprobs, batch = one_token(0.0, advantages=torch.zeros(1), old_logprobs=torch.tensor([[-200.0]]))
    loss, _ = policy_loss()(logprobs, batch)
    assert loss.item() == 0.0


def test_kl_term_by_hand():
    logprobs, batch = one_token(
        math.log(0.5),
        advantages=torch.zeros(1),
        old_logprobs=torch.tensor([[math.log(0.5)]]),
        ref_logprobs=torch.tensor([[math.log(0.25)]]),
    )
    loss, metrics = policy_loss(kl_coefficient=0.1)(logprobs, batch)
    k3 = 0.5 - 1 + math.log(2)
    assert loss.item() == pytest.approx(0.1 * k3)
    assert metrics["loss/kl"].item() == pytest.approx(0.1 * k3)
    assert metrics["kl/reference"].item() == pytest.approx(k3)
    assert metrics["entropy"].item() == pytest.approx(math.log(2))


def test_dense_judgement_is_clamped_weighted_and_added():
    logprobs, batch = one_token(
        -4.0,
        advantages=torch.tensor([1.0]),
        old_logprobs=torch.tensor([[-4.0]]),
        teacher_logprobs=torch.tensor([[-1.0]]),
    )
    loss, metrics = policy_loss(dense_weight=0.5, dense_clip=2.0)(logprobs, batch)
    assert loss.item() == pytest.approx(-(1.0 + 0.5 * 2.0))
    assert metrics["teacher/logratio"].item() == pytest.approx(3.0)


def test_per_token_advantages_and_aggregation():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    advantages = torch.tensor([[1.0, 2.0, 3.0], [5.0, 99.0, 99.0]])
    batch = make_batch(mask, advantages=advantages, old_logprobs=torch.zeros(2, 3))
    assert policy_loss()(torch.zeros(2, 3), batch)[0].item() == pytest.approx(-11 / 4)
    assert policy_loss(aggregation="sequence_mean")(torch.zeros(2, 3), batch)[0].item() == pytest.approx(-(2 + 5) / 2)
    assert policy_loss(aggregation=10)(torch.zeros(2, 3), batch)[0].item() == pytest.approx(-0.55), "(6 + 5) / 10 / 2"


def test_expected_dense_gradient_is_that_of_exact_reverse_kl():
    torch.manual_seed(1)
    logits = torch.randn(7, requires_grad=True)
    teacher = torch.randn(7).log_softmax(-1)
    student = logits.log_softmax(-1)
    exact = torch.autograd.grad((student.exp() * (student - teacher)).sum(), logits, retain_graph=True)[0]

    expected = torch.zeros(7)
    loss_fn = policy_loss(dense_weight=1.0, dense_clip=100.0)
    for token in range(7):  # the expectation over own samples, by enumeration
        batch = make_batch(
            torch.ones(1, 1, dtype=torch.bool),
            advantages=torch.zeros(1),
            old_logprobs=student[token].detach().view(1, 1),
            teacher_logprobs=teacher[token].view(1, 1),
        )
        loss, _ = loss_fn(student[token].view(1, 1), batch)
        gradient = torch.autograd.grad(loss, logits, retain_graph=True)[0]
        expected += student[token].exp().detach() * gradient
    torch.testing.assert_close(expected, exact)


def test_distillation_is_cross_entropy():
    torch.manual_seed(2)
    logits, ids = torch.randn(3, 4, 9), torch.randint(9, (3, 4))
    mask = torch.tensor([[True] * 4, [True] * 2 + [False] * 2, [True] * 3 + [False]])
    logprobs = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    loss, metrics = DistillationLoss()(logprobs, make_batch(mask))
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits[mask], ids[mask]))
    assert metrics["loss/distillation"] == loss


@pytest.mark.parametrize("reverse", [False, True])
def test_kl_over_the_whole_vocabulary_is_exact(reverse):
    torch.manual_seed(3)
    logits = torch.randn(2, 3, 13, requires_grad=True)
    teacher = torch.randn(2, 3, 13).log_softmax(-1)
    mask = torch.ones(2, 3, dtype=torch.bool)
    batch = make_batch(mask, teacher_topk_logprobs=teacher)
    student = logits.log_softmax(-1)
    objective = ReverseKLLoss(teacher_topk=13) if reverse else ForwardKLLoss(teacher_topk=13)
    loss, _ = objective(student, batch)
    first, second = (teacher, student) if reverse else (student, teacher)
    exact = torch.nn.functional.kl_div(first, second, reduction="sum", log_target=True) / 6
    torch.testing.assert_close(loss, exact)
    gradient, expected = (torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (loss, exact))
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("objective", [ForwardKLLoss(teacher_topk=2), ReverseKLLoss(teacher_topk=2)])
def test_kl_with_a_tail_by_hand(objective):
    student, teacher = torch.tensor([0.5, 0.2, 0.3]), torch.tensor([0.7, 0.2, 0.1])  # the last one is the tail
    batch = make_batch(torch.ones(1, 1, dtype=torch.bool), teacher_topk_logprobs=teacher[:2].log().view(1, 1, 2))
    loss, _ = objective(student[:2].log().view(1, 1, 2), batch)
    p, q = (teacher, student) if isinstance(objective, ForwardKLLoss) else (student, teacher)
    torch.testing.assert_close(loss, (p * (p / q).log()).sum())


@pytest.mark.parametrize(
    ("beta", "expected"),
    # teacher .7 .2 .1, student .5 .2 .3, the last one the tail; M is .6 .2 .2 for beta .5, and .52 .2 .28 for beta .1
    [(0.5, 0.5 * 0.0385908 + 0.5 * 0.0304788), (0.1, 0.1 * 0.1051142 + 0.9 * 0.0010875)],
)
def test_generalized_jsd_with_a_tail_by_hand(beta, expected):
    batch = make_batch(
        torch.ones(1, 1, dtype=torch.bool), teacher_topk_logprobs=torch.tensor([0.7, 0.2]).log().view(1, 1, 2)
    )
    loss, metrics = GeneralizedJSDLoss(beta=beta, teacher_topk=2)(torch.tensor([0.5, 0.2]).log().view(1, 1, 2), batch)
    assert loss.item() == pytest.approx(expected, abs=2e-7)
    assert metrics["loss/jsd"] == loss


def test_generalized_jsd_lies_between_the_two_kls_and_is_bounded():
    _, candidates, batch = random_case()
    for small, objective in ((1e-3, ForwardKLLoss(teacher_topk=5)), (1 - 1e-3, ReverseKLLoss(teacher_topk=5))):
        limit = GeneralizedJSDLoss(beta=small, teacher_topk=5)(candidates.double(), batch)[0] / 1e-3
        assert limit.item() == pytest.approx(objective(candidates.double(), batch)[0].item(), rel=0.02)
    disjoint = make_batch(torch.ones(1, 1, dtype=torch.bool), teacher_topk_logprobs=torch.tensor([[[0.0, -90.0]]]))
    loss, _ = GeneralizedJSDLoss(beta=0.5, teacher_topk=2)(torch.tensor([[[-90.0, 0.0]]]), disjoint)
    assert loss.item() == pytest.approx(0.6931472), "log 2: nothing in common"
    for beta in (0.0, 1.0):
        with pytest.raises(ValueError, match=r"objective\.beta"):
            GeneralizedJSDLoss(beta=beta, teacher_topk=2)


def test_reverse_kl_stays_finite_when_the_teacher_has_no_tail():
    batch = make_batch(torch.ones(1, 1, dtype=torch.bool), teacher_topk_logprobs=torch.tensor([[[0.0, -60.0]]]))
    logprobs = torch.tensor([[[0.1, 0.1]]]).log().requires_grad_()
    loss, _ = ReverseKLLoss(teacher_topk=2)(logprobs, batch)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logprobs.grad).all()


def test_needs_follow_the_settings():
    plain = policy_loss()
    assert (plain.needs_old, plain.needs_reference, plain.needs_teacher, plain.teacher_topk) == (True, False, False, 0)
    full = policy_loss(kl_coefficient=0.01, dense_weight=1.0)
    assert (full.needs_reference, full.needs_teacher) == (True, True)
    assert ForwardKLLoss(teacher_topk=64).teacher_topk == 64
    assert not DistillationLoss.needs_old


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("clip_low", 1.2),
        ("clip_high", 0.0),
        ("kl_coefficient", -1),
        ("kl_estimator", "k1"),
        ("dense_weight", -0.1),
        ("dense_clip", 0),
        ("aggregation", "mean"),
        ("aggregation", 0),
        ("aggregation", True),
    ],
)
def test_bad_settings_name_the_key(key, value):
    with pytest.raises(ValueError, match=rf"{key} must be .* change objective\.{key}"):
        policy_loss(**{key: value})


def test_missing_or_misshapen_inputs_are_named():
    logprobs, batch = one_token(-1.0)
    with pytest.raises(ValueError, match=r"batch\.old_logprobs"):
        policy_loss()(logprobs, batch)
    with pytest.raises(ValueError, match="expected \\(1, 1, 3\\)"):
        ForwardKLLoss(teacher_topk=3)(logprobs, replace(batch, teacher_topk_logprobs=torch.zeros(1, 1, 3)))


@pytest.mark.parametrize("make", [ReverseKLLoss, lambda **settings: GeneralizedJSDLoss(beta=0.5, **settings)])
def test_losses_for_own_answers_tell_the_entropy(make):
    student = torch.tensor([0.5, 0.2, 0.3])  # the last one is the tail
    batch = make_batch(torch.ones(1, 1, dtype=torch.bool), teacher_topk_logprobs=torch.tensor([[[-0.5, -1.2]]]))
    _, metrics = make(teacher_topk=2)(student[:2].log().view(1, 1, 2), batch)
    assert metrics["entropy"].item() == pytest.approx(1.0296530), "of .5, .2 and .3"
    whole = torch.randn(1, 1, 7).log_softmax(-1)
    _, metrics = make(teacher_topk=7)(whole, replace(batch, teacher_topk_logprobs=whole))
    torch.testing.assert_close(metrics["entropy"], -(whole.exp() * whole).sum())


def test_a_policy_judged_by_distributions_is_the_sum_of_its_parts():
    tokens, candidates, batch = random_case()
    judgement, settings = GeneralizedJSDLoss(beta=0.3, teacher_topk=5), {"kl_coefficient": 0.1, "aggregation": 6}
    without = {name: value for name, value in (SETTINGS | settings).items() if not name.startswith("dense")}
    judged = JudgedPolicyLoss(judgement=judgement, judgement_weight=0.7, **without)
    assert (judged.teacher_topk, judged.needs_teacher, judged.needs_advantages) == (5, False, True)
    teacher = torch.nn.functional.pad(batch.teacher_topk_logprobs, (0, 1), value=float("nan"))
    both = torch.cat((candidates, tokens[..., None]), -1).requires_grad_()
    loss, metrics = judged(both, replace(batch, teacher_topk_logprobs=teacher))
    loss.backward()
    alone = [logprobs.clone().requires_grad_() for logprobs in (tokens, candidates)]
    parts = [policy_loss(**settings)(alone[0], batch), judgement(alone[1], batch)]
    expected = parts[0][0] + 0.7 * parts[1][0]
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(both.grad, torch.cat((alone[1].grad, alone[0].grad[..., None]), -1))
    assert metrics == parts[0][1] | parts[1][1]
    with pytest.raises(ValueError, match="judgement_weight"):
        JudgedPolicyLoss(judgement=judgement, judgement_weight=0.0, **without)
    with pytest.raises(ValueError, match=r"judgement\.teacher_topk"):
        JudgedPolicyLoss(judgement=DistillationLoss(), judgement_weight=1.0, **without)
