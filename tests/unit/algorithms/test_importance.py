# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from loss_cases import make_batch

from nemo_rba.algorithms.importance import MaskedImportance, TruncatedImportance
from nemo_rba.algorithms.objectives import ClippedPolicyLoss

# ratios 1, 3, 0.25 and padding, then 2 and padding
TRAINER = torch.tensor([[-1.0, -1.0, -1.0, torch.inf], [-2.0, torch.nan, 0.0, 0.0]])
SAMPLER = TRAINER - torch.tensor([[1.0, 3.0, 0.25, 1.0], [2.0, 1.0, 1.0, 1.0]]).log()
MASK = torch.tensor([[True, True, True, False], [True, False, False, False]])


def test_truncated_importance_by_hand():
    weights = TruncatedImportance(maximum=2.0)(TRAINER, SAMPLER, MASK)
    torch.testing.assert_close(weights, torch.tensor([[1.0, 2.0, 0.25, 0.0], [2.0, 0.0, 0.0, 0.0]]))


def test_masked_importance_by_hand():
    weights = MaskedImportance(minimum=0.5, maximum=2.5)(TRAINER, SAMPLER, MASK)
    torch.testing.assert_close(weights, torch.tensor([[1.0, 0.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0]]))


def test_weights_weigh_the_clipped_loss_token_by_token():
    settings = {"clip_low": 0.2, "clip_high": 0.28, "kl_coefficient": 0.0, "kl_estimator": "k3", "dense_weight": 0.0}
    objective = ClippedPolicyLoss(**settings, dense_clip=1.0, aggregation="token_mean")
    weights = torch.tensor([[1.0, 2.0], [0.0, 0.5]])
    old = torch.tensor([[-1.0, -1.0 - math.log(2)], [-1.0, -1.0]])  # ratios 1 and 2; 1 and 1
    advantages = torch.tensor([1.0, -4.0])
    batch = make_batch(
        torch.ones(2, 2, dtype=torch.bool), advantages=advantages, old_logprobs=old, importance_weights=weights,
        sampler_logprobs=torch.full((2, 2), -1.25),
    )  # fmt: skip
    loss, metrics = objective(torch.full((2, 2), -1.0), batch)
    assert loss.item() == pytest.approx((-1.0 - 2 * 1.28 + 0.5 * 4) / 4)
    assert metrics["sampler/weight"].item() == pytest.approx(3.5 / 4)
    assert metrics["sampler/dropped"].item() == pytest.approx(0.25)
    assert metrics["health/logprob_error"].item() == pytest.approx(0.25), "against the sampler, not the trainer"


def test_equal_models_need_no_correction_and_wild_ones_stay_finite():
    same = torch.full((1, 2), -3.0)
    for correction in (TruncatedImportance(maximum=2.0), MaskedImportance(minimum=0.5, maximum=2.0)):
        weights = correction(same, same, torch.ones(1, 2, dtype=torch.bool))
        assert weights.tolist() == [[1.0, 1.0]]
        wild = correction(same, same - 500, torch.ones(1, 2, dtype=torch.bool))
        assert torch.isfinite(wild).all()


def test_bad_settings_and_shapes():
    with pytest.raises(ValueError, match=r"importance\.maximum"):
        TruncatedImportance(maximum=0.5)
    with pytest.raises(ValueError, match=r"importance\.minimum"):
        MaskedImportance(minimum=1.5, maximum=2.0)
    with pytest.raises(ValueError, match="one shape"):
        TruncatedImportance(maximum=2.0)(TRAINER, SAMPLER[:1], MASK)
