# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from nemo_rba import functional


def test_masked_mean_ignores_what_is_masked():
    values = torch.tensor([[1.0, 3.0, torch.nan], [5.0, torch.inf, torch.nan]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert functional.masked_mean(values, mask).item() == 3.0
    assert functional.masked_mean(values, mask, dim=1).tolist() == [2.0, 5.0]
    assert functional.masked_mean(values, torch.zeros_like(mask), dim=1).tolist() == [0.0, 0.0]


def test_kl_estimators_by_hand():
    logprobs, reference = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])  # r = 0.5
    expected = {"k1": math.log(2), "k2": math.log(2) ** 2 / 2, "k3": 0.5 - 1 + math.log(2)}
    for estimator, value in expected.items():
        assert functional.kl_estimate(logprobs, reference, estimator).item() == pytest.approx(value)
    with pytest.raises(ValueError, match=r"objective\.kl_estimator"):
        functional.kl_estimate(logprobs, reference, "k4")


def test_k1_and_k3_average_to_the_kl_and_k3_is_never_negative():
    pi, reference = torch.randn(2, 7, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    exact = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=pi), torch.distributions.Categorical(logits=reference)
    )
    for estimator in ("k1", "k3"):
        expectation = (pi.exp() * functional.kl_estimate(pi, reference, estimator)).sum()
        torch.testing.assert_close(expectation, exact)
    assert (functional.kl_estimate(pi, reference, "k3") >= 0).all()


def test_gather_logprobs_and_entropy_against_torch():
    logits = torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[0, 5, 10], [3, 3, 1]])
    distribution = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(functional.gather_logprobs(logits, ids), distribution.log_prob(ids))
    torch.testing.assert_close(functional.entropy(logits), distribution.entropy())
    assert functional.gather_logprobs(logits.bfloat16(), ids).dtype == torch.float32
    assert functional.entropy(torch.tensor([0.0, -torch.inf])).item() == 0.0


def test_group_statistics():
    values = torch.tensor([1.0, 2.0, 6.0, 4.0, 4.0, 7.0])
    index = torch.tensor([0, 0, 0, 5, 5, 9])
    assert functional.group_mean(values, index).tolist() == [3.0, 3.0, 3.0, 4.0, 4.0, 7.0]
    torch.testing.assert_close(
        functional.group_std(values, index), torch.tensor([math.sqrt(7)] * 3 + [0.0] * 3), rtol=1e-6, atol=0
    )
    assert functional.group_size(index).tolist() == [3, 3, 3, 2, 2, 1]
    assert functional.group_is_constant(values, index).tolist() == [False] * 3 + [True] * 3


def test_pad_sequences():
    padded, mask = functional.pad_sequences([torch.tensor([1, 2, 3]), torch.tensor([4])], pad_value=9)
    assert padded.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert mask.tolist() == [[True, True, True], [True, False, False]]
    candidates, _ = functional.pad_sequences([torch.ones(2, 4), torch.ones(3, 4)], pad_value=0)
    assert candidates.shape == (2, 3, 4)
    with pytest.raises(ValueError, match="empty"):
        functional.pad_sequences([], pad_value=0)


def test_group_maxima_softmax_and_shares():
    values = torch.tensor([1.0, 6.0, 6.0, 4.0, 7.0, 4.0])
    index = torch.tensor([5, 5, 5, 0, 9, 0])  # in any order, with gaps
    assert functional.group_max(values, index).tolist() == [6.0, 6.0, 6.0, 4.0, 7.0, 4.0]
    assert functional.group_argmax(values, index).tolist() == [3, 1, 4], "groups 0, 5 and 9; the first among equals"
    logits = torch.tensor([0.0, math.log(3), math.log(4), 900.0, -5.0, 900.0])
    expected = torch.tensor([1 / 8, 3 / 8, 4 / 8, 0.5, 1.0, 0.5])
    torch.testing.assert_close(functional.group_softmax(logits, index), expected)
    flags = torch.tensor([True, True, False, True, False, True])
    assert functional.group_share(flags, index).item() == pytest.approx(1 / 3)


def test_group_softmax_has_the_gradient_of_softmax():
    logits = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    index = torch.zeros(3, dtype=torch.int64)
    assert torch.autograd.gradcheck(lambda values: functional.group_softmax(values, index), logits)
