# SPDX-License-Identifier: Apache-2.0
"""Several rewards as one: a weighted sum, each part logged under its own name (``reward/<part>``)."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nemo_rba.protocols import RewardFunction
from nemo_rba.types import Rollout


class RewardMixture:
    """sum_p weight_p * reward_p.

    Args:
        parts: name -> reward; the name is what logs show.
        weights: name -> weight, for the same names. A weight of 0 watches a reward without training on it.
    """

    def __init__(self, *, parts: Mapping[str, RewardFunction], weights: Mapping[str, float]):
        if set(parts) != set(weights):
            raise ValueError(
                f"parts and weights must have the same names, got parts {sorted(parts)} and weights "
                f"{sorted(weights)}: change reward.parts or reward.weights"
            )
        if not all(math.isfinite(weight) for weight in weights.values()) or not any(weights.values()):
            raise ValueError(
                f"weights must be finite and not all 0, got {dict(weights)}: change reward.weights "
                "(to train without a reward, set advantage to NoAdvantage)"
            )
        self.parts = dict(parts)
        self.weights = dict(weights)

    def __call__(self, rollouts: Sequence[Rollout]) -> Tensor:
        return self.score(rollouts)[0]

    def names(self) -> list[str]:
        """Names of the parts."""
        return list(self.parts)

    def vocabularies(self) -> dict[str, dict[str, int]]:
        """Part -> vocabulary of whoever reads the student's token ids there: the student must have the same ids."""
        return {name: part.vocabulary() for name, part in self.parts.items() if hasattr(part, "vocabulary")}

    def score(self, rollouts: Sequence[Rollout]) -> tuple[Tensor, dict[str, Tensor]]:
        """Total (N,) and the unweighted parts {name: (N,)}, float32 on the CPU."""
        scores = {name: _checked(name, part(rollouts), rollouts) for name, part in self.parts.items()}
        total = torch.stack([self.weights[name] * scores[name] for name in scores]).sum(0)
        return total, scores


def _checked(name: str, scores: Tensor, rollouts: Sequence[Rollout]) -> Tensor:
    scores = scores.detach().float().cpu()
    if scores.shape != (len(rollouts),):
        raise ValueError(
            f"reward part {name!r} gave scores of shape {tuple(scores.shape)}, expected ({len(rollouts)},): "
            f"one for each rollout; change reward.parts.{name}"
        )
    bad = (~scores.isfinite()).nonzero()
    if len(bad):
        rollout = rollouts[int(bad[0])]
        raise ValueError(
            f"reward part {name!r} gave {scores[bad[0]].item()} for response {rollout.response!r} to instruction "
            f"{rollout.instruction.id!r}, expected a finite number; change reward.parts.{name}"
        )
    return scores
