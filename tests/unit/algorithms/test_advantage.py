# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from nemo_rba.algorithms import advantage
from nemo_rba.algorithms.advantage import (
    AmongOwn,
    BatchWhitened,
    GreedyBaseline,
    GroupCentred,
    GroupNormalized,
    LeaveOneOut,
    NoAdvantage,
    PerRewardNormalized,
    estimate,
    silent_share,
)

REWARDS = torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0])  # 2 groups x 3 rewards
INDEX = torch.tensor([0, 0, 0, 1, 1, 1])
OWN = torch.tensor([True, True, False, False, True, True])


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
    [
        LeaveOneOut(),
        GroupNormalized(epsilon=1e-12, divide_by_std=True),
        GroupCentred(),
        BatchWhitened(epsilon=1e-12, group_baseline=True),
        BatchWhitened(epsilon=1e-12, group_baseline=False),
        NoAdvantage(),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
def test_equal_rewards_give_exactly_zero(estimator):
    rewards, index = torch.full((14,), 0.1, dtype=torch.float64), torch.arange(14) // 7  # the mean is not 0.1
    advantages = estimator(rewards, index)
    assert advantages.dtype == torch.float32
    assert (advantages == 0).all()


@pytest.mark.parametrize(
    "estimator",
    [
        LeaveOneOut(),
        GroupNormalized(epsilon=1e-4, divide_by_std=True),
        GroupCentred(),
        BatchWhitened(epsilon=1e-4, group_baseline=True),
        PerRewardNormalized(weights={"a": 1.0}, epsilon=1e-4, batch_normalize=False),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
def test_a_lone_answer_cannot_be_compared(estimator):
    with pytest.raises(ValueError, match=r"prompt 3 has 1 answer.*rollouts\.group_size"):
        estimator(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 0, 3]))


def test_epsilon_is_checked_at_construction():
    with pytest.raises(ValueError, match=r"advantage\.epsilon"):
        GroupNormalized(epsilon=0.0, divide_by_std=True)
    with pytest.raises(ValueError, match=r"advantage\.epsilon"):
        BatchWhitened(epsilon=0.0, group_baseline=True)
    with pytest.raises(ValueError, match=r"advantage\.epsilon"):
        PerRewardNormalized(weights={"a": 1.0}, epsilon=-1.0, batch_normalize=True)


def test_group_centred_by_hand():
    assert GroupCentred()(REWARDS, INDEX).tolist() == [-2.0, -1.0, 3.0, -1.0, -1.0, 2.0]


def test_batch_whitened_by_hand():
    rewards, index = torch.tensor([1.0, 3.0, 5.0, 7.0]), torch.tensor([0, 0, 1, 1])  # mean 4, variance (9+1+1+9)/4 = 5
    plain = BatchWhitened(epsilon=1e-12, group_baseline=False)(rewards, index)
    torch.testing.assert_close(plain, torch.tensor([-1.3416408, -0.4472136, 0.4472136, 1.3416408]))
    rewards = torch.tensor([1.0, 3.0, 0.0, 8.0])  # minus the means 2 and 4: -1, 1, -4, 4; their mean square is 8.5
    grouped = BatchWhitened(epsilon=1e-12, group_baseline=True)(rewards, index)
    torch.testing.assert_close(grouped, torch.tensor([-0.3429972, 0.3429972, -1.3719887, 1.3719887]))
    assert BatchWhitened(epsilon=0.5, group_baseline=False)(torch.tensor([0.0, 1.0]), index[:2]).tolist() == [-0.5, 0.5]


def test_batch_whitened_counts_the_answers_of_all_ranks(monkeypatch):
    """Two ranks with 1, 3 and with 5, 7 get what one process gets for all four; the sums are played back in order."""
    played = {
        "first": [torch.tensor([16.0, 4.0], dtype=torch.float64), torch.tensor([20.0, 4.0], dtype=torch.float64)],
        "mine": [],
    }

    def summed(values):
        played["mine"].append(values.tolist())
        return played["first"][len(played["mine"]) - 1]

    monkeypatch.setattr(advantage, "data_parallel_sum", summed)
    mine = BatchWhitened(epsilon=1e-12, group_baseline=False)(torch.tensor([1.0, 3.0]), torch.tensor([0, 0]))
    torch.testing.assert_close(mine, torch.tensor([-1.3416408, -0.4472136]))
    assert played["mine"] == [[4.0, 2.0], [10.0, 2.0]], "this rank's sum and sum of squares, each with its count"


def test_batch_whitened_without_a_group_baseline_takes_lone_answers():
    lone = BatchWhitened(epsilon=1e-12, group_baseline=False)
    assert (lone.min_group_size, BatchWhitened(epsilon=1, group_baseline=True).min_group_size) == (1, 2)
    assert lone(torch.tensor([2.0, 4.0]), torch.tensor([0, 1])).tolist() == [-1.0, 1.0]


def test_a_constant_group_is_silent_only_where_the_group_is_the_baseline():
    rewards, index = torch.tensor([0.1, 0.1, 0.1, 0.0, 0.4, 0.8]), INDEX
    for estimator in (BatchWhitened(epsilon=1e-4, group_baseline=True), GroupCentred(), LeaveOneOut()):
        advantages = estimator(rewards, index)
        assert advantages[:3].tolist() == [0.0, 0.0, 0.0]
        assert silent_share(advantages, index) == 0.5
    plain = BatchWhitened(epsilon=1e-4, group_baseline=False)(rewards, index)
    assert (plain[:3] < 0).all()
    assert silent_share(plain, index) == 0.0


PARTS = {  # b is constant in group 0, a in group 1
    "a": torch.tensor([0.0, 0.0, 3.0, 1.0, 1.0, 1.0]),
    "b": torch.tensor([0.1, 0.1, 0.1, 0.0, 10.0, 20.0]),
}


def per_reward(weights=(1.0, 2.0), **changes):
    settings = {"weights": dict(zip("ab", weights, strict=True)), "epsilon": 1e-12, "batch_normalize": False}
    return PerRewardNormalized(**(settings | changes))


def test_per_reward_normalized_by_hand():
    # a, group 0: (-1, -1, 2) / sqrt(3); b, group 1: (-10, 0, 10) / 10, twice
    expected = torch.tensor([-0.5773503, -0.5773503, 1.1547005, -2.0, 0.0, 2.0])
    torch.testing.assert_close(per_reward()(REWARDS, INDEX, parts=PARTS), expected)
    normalized = per_reward(batch_normalize=True)(REWARDS, INDEX, parts=PARTS)
    torch.testing.assert_close(normalized, expected / 1.2909944)  # sqrt((1/3 + 1/3 + 4/3 + 4 + 0 + 4) / 6) = sqrt(5/3)


def test_per_reward_normalized_tells_apart_what_the_sum_does_not():
    parts = {"a": torch.tensor([1.0, 0.0, 0.0]), "b": torch.tensor([0.0, 10.0, 0.0])}
    index = torch.zeros(3, dtype=torch.int64)
    advantages = per_reward(weights=(2.0, 1.0))(torch.zeros(3), index, parts=parts)
    # z-scores of (1, 0, 0): 2/3 and -1/3 over sqrt(1/3): 1.1547005 and -0.5773503, whatever the units
    torch.testing.assert_close(advantages, torch.tensor([1.7320508, 0.0, -1.7320508]), atol=1e-6, rtol=0)


def test_per_reward_normalized_refuses_what_it_cannot_weigh():
    with pytest.raises(ValueError, match=r"\['a', 'b'\], but got the rewards \['a'\]"):
        per_reward()(REWARDS, INDEX, parts={"a": PARTS["a"]})
    with pytest.raises(ValueError, match=r"got the rewards \[\]"):
        per_reward()(REWARDS, INDEX)
    with pytest.raises(ValueError, match=r"advantage\.weights"):
        per_reward(weights=(0.0, 0.0))


def test_greedy_baseline_by_hand():
    greedy = torch.tensor([2.0, 0.0])
    advantages = GreedyBaseline()(REWARDS, INDEX, greedy=greedy)
    assert advantages.tolist() == [-1.0, 0.0, 4.0, 0.0, 0.0, 3.0]
    assert advantages.dtype == torch.float32
    lone = GreedyBaseline()(torch.tensor([1.0, 5.0]), torch.tensor([1, 0]), greedy=greedy)
    assert lone.tolist() == [1.0, 3.0], "one answer per prompt, rows in any order"
    for missing in (None, greedy[:1], greedy[None]):
        with pytest.raises(ValueError, match="each prompt row"):
            GreedyBaseline()(REWARDS, INDEX, greedy=missing)


def test_estimate_gives_each_estimator_what_it_asks_for():
    asked = []

    def greedy():
        asked.append(1)
        return torch.tensor([2.0, 0.0])

    def with_all(estimator):
        return estimate(estimator, REWARDS, INDEX, parts=PARTS, greedy=greedy, own=OWN)

    assert with_all(GroupCentred()).tolist() == [-2.0, -1.0, 3.0, -1.0, -1.0, 2.0]
    assert with_all(per_reward())[3:].tolist() == [-2.0, 0.0, 2.0]
    assert with_all(lambda rewards, index: rewards).tolist() == REWARDS.tolist(), "an estimator that has no needs_*"
    assert asked == [], "no greedy answers where nobody asks"
    assert with_all(GreedyBaseline()).tolist() == [-1.0, 0.0, 4.0, 0.0, 0.0, 3.0]
    assert asked == [1]
    assert with_all(AmongOwn(estimator=GroupCentred())).tolist() == [-0.5, 0.5, 0.0, 0.0, -1.5, 1.5]
    assert with_all(AmongOwn(estimator=per_reward()))[[2, 3]].tolist() == [0.0, 0.0]
    assert with_all(AmongOwn(estimator=GreedyBaseline())).tolist() == [-1.0, 0.0, 0.0, 0.0, 0.0, 3.0]
    assert asked == [1, 1]


def test_own_answers_are_compared_with_each_other_alone():
    """The teacher's are not even in the baseline: where all own answers are wrong, nothing is said of them."""
    rewards, index = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0]), torch.arange(8) // 4
    own = torch.tensor([True, True, False, False] * 2)
    advantages = AmongOwn(estimator=GroupNormalized(epsilon=1e-9, divide_by_std=True))(rewards, index, own=own)
    torch.testing.assert_close(advantages, torch.tensor([0, 0, 0, 0, -0.5, 0.5, 0, 0]) * 2**0.5)
    assert advantages.dtype == torch.float32
    with pytest.raises(ValueError, match="prompt 0 has 1 answer"):
        AmongOwn(estimator=LeaveOneOut())(rewards[:4], index[:4], own=own[:4] & torch.tensor([True, False, True, True]))


def test_rounding_of_a_mean_is_not_an_advantage():
    """Equal numbers, summed and divided again, may give another one: no epsilon could hide that."""
    index = torch.arange(14) // 7
    for value in torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)):
        rewards = value.expand(14)
        for group_baseline in (False, True):
            estimator = BatchWhitened(epsilon=1e-30, group_baseline=group_baseline)
            assert (estimator(rewards, index) == 0).all()
        advantages = per_reward(epsilon=1e-30)(rewards, index, parts={"a": rewards, "b": rewards})
        assert (advantages == 0).all()
