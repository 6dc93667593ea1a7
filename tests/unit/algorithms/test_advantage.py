# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from nemo_rba.algorithms.advantage import GroupNormalized, LeaveOneOut, NoAdvantage

REWARDS = torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0])  # 2 groups x 3 rewards
INDEX = torch.tensor([0, 0, 0, 1, 1, 1])


def test_leave_one_out_by_hand():
    assert LeaveOneOut()(REWARDS, INDEX).tolist() == [-3.0, -1.5, 4.5, -1.5, -1.5, 3.0]


def test_group_normalized_by_hand():
    first, second = math.sqrt(7), math.sqrt(3)  # sample standard deviations
    expected = torch.tensor([-2 / first, -1 / first, 3 / first, -1 / second, -1 / second, 2 / second])
    advantages = GroupNormalized(epsilon=1e-9, divide_by_std=True)(REWARDS, INDEX)
    torch.testing.assert_close(advantages, expected)
    centred = GroupNormalized(epsilon=1e-9, divide_by_std=False)(REWARDS, INDEX)  # Dr.GRPO
    assert centred.tolist() == [-2.0, -1.0, 3.0, -1.0, -1.0, 2.0]


@pytest.mark.parametrize(
    "estimator",
    [LeaveOneOut(), GroupNormalized(epsilon=1e-12, divide_by_std=True), NoAdvantage()],
    ids=lambda estimator: type(estimator).__name__,
)
def test_equal_rewards_give_exactly_zero(estimator):
    rewards, index = torch.full((14,), 0.1), torch.arange(14) // 7
    advantages = estimator(rewards, index)
    assert advantages.dtype == torch.float32
    assert (advantages == 0).all()


@pytest.mark.parametrize("estimator", [LeaveOneOut(), GroupNormalized(epsilon=1e-4, divide_by_std=True)])
def test_a_lone_answer_cannot_be_compared(estimator):
    with pytest.raises(ValueError, match=r"prompt 3 has 1 answer.*rollouts\.group_size"):
        estimator(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 0, 3]))


def test_epsilon_is_checked_at_construction():
    with pytest.raises(ValueError, match=r"advantage\.epsilon"):
        GroupNormalized(epsilon=0.0, divide_by_std=True)
