# SPDX-License-Identifier: Apache-2.0
"""What the teacher thinks of an answer, as one number: its own probability of it, or whether it wrote it.

The teacher *reads* the instruction that the student *heard*. The per-token form of the same judgement is not a reward:
it is ``dense_weight`` of ``algorithms/objectives.ClippedPolicyLoss``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_rba.functional import typed, user_prompt
from nemo_rba.protocols import LikelihoodTeacher
from nemo_rba.types import Rollout

NORMALIZATIONS = ("token", "none")


class TeacherLikelihood:
    """log P_teacher(answer | transcript) in nats, end-of-turn token included.

    Args:
        teacher: a teacher with the student's vocabulary, whose token ids it is given: the loop compares them at setup.
        normalize: "token" divides by the number of tokens (does not favour short answers), "none" keeps the sum.
        floor: lowest reward, below 0; also that of an empty answer. Bounds what one impossible token can do.

    Raises:
        ValueError: a setting is out of range, or the teacher only writes.
    """

    def __init__(self, *, teacher: LikelihoodTeacher, normalize: str, floor: float):
        if normalize not in NORMALIZATIONS:
            raise ValueError(
                f"normalize must be one of {NORMALIZATIONS}, got {normalize!r}: change normalize of TeacherLikelihood"
            )
        if not -torch.inf < floor < 0:
            raise ValueError(f"floor must be finite and below 0 nats, got {floor}: change floor of TeacherLikelihood")
        if not hasattr(teacher, "logprobs"):
            raise ValueError(
                f"TeacherLikelihood asks a teacher how likely an answer is, and {type(teacher).__name__} only writes; "
                "change teacher of TeacherLikelihood, e.g. to teacher=hf or teacher=self"
            )
        self.teacher = teacher
        self.normalize = normalize
        self.floor = floor

    def __call__(self, rollouts: Sequence[Rollout]) -> Tensor:
        scores = torch.full((len(rollouts),), self.floor)
        answered = [n for n, rollout in enumerate(rollouts) if len(rollout.token_ids)]
        prompts = [user_prompt(self.teacher, typed(rollouts[n].instruction)) for n in answered]
        logprobs = self.teacher.logprobs(prompts, [rollouts[n].token_ids for n in answered]) if answered else []
        for n, tokens in zip(answered, logprobs, strict=True):
            score = tokens.float().mean() if self.normalize == "token" else tokens.float().sum()
            scores[n] = score.clamp(min=self.floor)
        return scores

    def vocabulary(self) -> dict[str, int]:
        """The teacher's, token string -> id."""
        return self.teacher.vocabulary()


class TeacherAuthorship:
    """1 for the teacher's own answer, 0 for the student's: SPIN's preference (2401.01335), for ``MixedRollouts``."""

    def __call__(self, rollouts: Sequence[Rollout]) -> Tensor:
        return torch.tensor([float(rollout.logprobs is None) for rollout in rollouts])
