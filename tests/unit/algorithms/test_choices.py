# SPDX-License-Identifier: Apache-2.0
"""What would silently learn nothing, or noise, is refused at setup; what makes sense is not."""

import pytest
from one_word import clipped

from nemo_rba.algorithms.advantage import (
    BatchWhitened,
    GreedyBaseline,
    GroupCentred,
    GroupNormalized,
    LeaveOneOut,
    NoAdvantage,
    PerRewardNormalized,
)
from nemo_rba.algorithms.alignment import check_choices
from nemo_rba.algorithms.gkd import FreshGKDRollouts, GKDRollouts
from nemo_rba.algorithms.group_losses import DPOLoss, MinimumRiskLoss
from nemo_rba.algorithms.importance import TruncatedImportance
from nemo_rba.algorithms.objectives import DistillationLoss, ForwardKLLoss, GeneralizedJSDLoss, ReverseKLLoss
from nemo_rba.algorithms.policy_losses import CISPOLoss, GSPOLoss, ReinforceLoss
from nemo_rba.algorithms.representation import RepresentationLoss
from nemo_rba.algorithms.rollout import (
    FreshTeacherRollouts,
    MixedRollouts,
    PolicyRollouts,
    ResampledRollouts,
    TeacherRollouts,
)

SETTINGS = {"group_size": 4, "max_new_tokens": 2, "temperature": 1.0, "top_p": 1.0}
OWN, RESAMPLED = PolicyRollouts(**SETTINGS), ResampledRollouts(**SETTINGS, max_resamples=2)
MIXED, FRESH = MixedRollouts(**SETTINGS), FreshTeacherRollouts(teacher=None, **SETTINGS)
HALF = FreshGKDRollouts(teacher=None, share=0.5, **SETTINGS)
ALL_OWN = GKDRollouts(share=1.0, **SETTINGS | {"group_size": 1})

NO_KL = {"kl_coefficient": 0.0, "kl_estimator": "k3"}
PLAIN = NO_KL | {"dense_weight": 0.0, "dense_clip": 5.0, "aggregation": "token_mean"}
POLICY_GRADIENTS = [
    clipped(), ReinforceLoss(**PLAIN), CISPOLoss(ratio_max=5.0, **PLAIN),
    GSPOLoss(clip_low=3e-4, clip_high=4e-4, **NO_KL),
]  # fmt: skip
GROUP_LOSSES = [MinimumRiskLoss(sharpness=1.0, **NO_KL), DPOLoss(beta=0.1, label_smoothing=0.0)]
TOKEN_LOSSES = [
    ForwardKLLoss(teacher_topk=4),
    ReverseKLLoss(teacher_topk=4),
    GeneralizedJSDLoss(beta=0.5, teacher_topk=4),
]
ADVANTAGES = [
    LeaveOneOut(), GroupNormalized(epsilon=1e-4, divide_by_std=True), GroupCentred(),
    BatchWhitened(epsilon=1e-4, group_baseline=True), BatchWhitened(epsilon=1e-4, group_baseline=False),
    PerRewardNormalized(weights={"a": 1.0}, epsilon=1e-4, batch_normalize=True),
]  # fmt: skip


def name(choice) -> str:
    return type(choice).__name__


@pytest.mark.parametrize("advantage", [*ADVANTAGES, GreedyBaseline()], ids=name)
@pytest.mark.parametrize("objective", POLICY_GRADIENTS + GROUP_LOSSES, ids=name)
def test_every_advantage_goes_with_every_loss_on_own_answers(objective, advantage):
    for source in (OWN, RESAMPLED):
        check_choices(source, advantage, objective)
    if not isinstance(advantage, GreedyBaseline):
        check_choices(MIXED, advantage, objective)
    if objective in POLICY_GRADIENTS:
        check_choices(OWN, advantage, objective, TruncatedImportance(maximum=2.0))


@pytest.mark.parametrize("source", [OWN, RESAMPLED, MIXED, FRESH, HALF, ALL_OWN, TeacherRollouts()], ids=name)
@pytest.mark.parametrize("objective", TOKEN_LOSSES, ids=name)
def test_the_teachers_distribution_is_learned_on_anybodys_answers(objective, source):
    check_choices(source, NoAdvantage(), objective)


@pytest.mark.parametrize("objective", POLICY_GRADIENTS + GROUP_LOSSES, ids=name)
def test_no_advantage_and_no_teacher_leave_nothing_to_learn_from(objective):
    with pytest.raises(
        ValueError, match=f"NoAdvantage takes no reward, and {name(objective)} learns from nothing else"
    ):
        check_choices(OWN, NoAdvantage(), objective)
    check_choices(OWN, NoAdvantage(), objective, None, RepresentationLoss(weight=0.1, layers=[]))
    check_choices(OWN, NoAdvantage(), clipped(dense=1.0))


@pytest.mark.parametrize("source", [OWN, RESAMPLED, MIXED, ALL_OWN], ids=name)
def test_supervised_learning_from_own_answers_is_noise(source):
    with pytest.raises(ValueError, match=f"{name(source)} has the student's own: nothing but noise.*rollouts=teacher"):
        check_choices(source, NoAdvantage(), DistillationLoss())
    for taught in (TeacherRollouts(), FRESH, HALF):
        check_choices(taught, NoAdvantage(), DistillationLoss())


def test_a_policy_gradient_needs_answers_of_the_policy():
    for objective, source, advantage in (
        (clipped(dense=1.0), TeacherRollouts(), NoAdvantage()), (POLICY_GRADIENTS[1], FRESH, LeaveOneOut())
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"is a policy gradient, and {name(source)} has none of its answers"):
            check_choices(source, advantage, objective)
    check_choices(FRESH, LeaveOneOut(), DPOLoss(beta=0.1, label_smoothing=0.0))


def test_what_a_lone_answer_is_told_would_work():
    alone = PolicyRollouts(**SETTINGS | {"group_size": 1})
    with pytest.raises(ValueError, match=r"raise it, or set advantage=greedy_baseline$"):
        check_choices(alone, LeaveOneOut(), clipped())
    with pytest.raises(ValueError, match=r"raise it, or set advantage=greedy_baseline, or none$"):
        check_choices(alone, LeaveOneOut(), clipped(dense=1.0))
    with pytest.raises(ValueError, match=r"raise it, or choose another objective$"):
        check_choices(alone, GreedyBaseline(), GROUP_LOSSES[1])
    check_choices(alone, GreedyBaseline(), clipped())
    check_choices(alone, NoAdvantage(), clipped(dense=1.0))
