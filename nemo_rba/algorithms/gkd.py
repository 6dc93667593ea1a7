# SPDX-License-Identifier: Apache-2.0
"""Who answers in generalized knowledge distillation: the student a share of the prompts, its teacher the others.

GKD (2306.13649, algorithm 1) draws once a batch: with probability lambda, its ``share`` here, the student answers all
of it, else the answers are a fixed set's. Here the draw is made for each prompt. What a step is expected to
learn is the same, but every step learns from both, so that gradients of two kinds do not take turns, and a run's share
of own answers scatters less, by the root of the number of prompts in a batch. What it costs: every step samples. The
draw hangs on (seed, instruction id) alone, as sampling does, and the seed on the step; so batch size, order,
data-parallel layout and resuming change nothing.

What the answers are learned by is the loss: ``jsd``, ``forward_kl`` or ``reverse_kl``. ``distillation`` learns from the
teacher's alone: on own answers its gradient is 0 in expectation, and so their share is noise.
"""

import hashlib

import torch
from torch import Tensor

from nemo_rba.algorithms.rollout import FreshTeacherRollouts, PolicyRollouts, TeacherRollouts
from nemo_rba.protocols import Objective, Policy, RolloutSource, Teacher
from nemo_rba.types import Rollout, SpeechBatch


class GKDRollouts:
    """The student's own answer, or the teacher's stored one, to each spoken prompt.

    With a share of 1 these are ``PolicyRollouts``, with a share of 0 ``TeacherRollouts``.

    Args:
        share: how likely it is that the student answers, GKD's lambda, from 0 to 1.
        group_size: answers to a prompt, all by the same one: 1, for there is one stored answer.
        max_new_tokens, temperature, top_p: of the student's answers, see ``PolicyRollouts``.

    Raises:
        ValueError: a setting is out of range.
    """

    max_resamples = 0

    def __init__(self, *, share: float, group_size: int, max_new_tokens: int, temperature: float, top_p: float):
        if group_size != 1:
            raise ValueError(
                f"rollouts.group_size is {group_size}, but the teacher has one stored answer to a prompt; set it to 1, "
                "or rollouts=gkd_fresh for new answers of the teacher"
            )
        own = PolicyRollouts(group_size=1, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
        self._between(share, own, TeacherRollouts())

    def _between(self, share: float, own: PolicyRollouts, taught: RolloutSource) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"rollouts.share must be from 0 to 1, got {share}: 1 for the student's answers alone")
        self.share, self._own, self._taught = share, own, taught
        self.group_size, self.max_new_tokens = own.group_size, own.max_new_tokens
        self.on_policy = share == 1
        self.num_unfinished = 0

    def check(self, objective: Objective) -> None:
        """Refuse, with a ``ValueError``, a policy gradient where some answers are not the policy's.

        No prompt has answers of both, so nothing would be compared; where they are to be, ``MixedRollouts`` does it.
        """
        if objective.needs_advantages and not self.on_policy:
            raise ValueError(
                f"{type(objective).__name__} is a policy gradient, and with rollouts.share {self.share} some prompts "
                "are answered by the teacher alone; choose objective=jsd, forward_kl or reverse_kl, or "
                "set rollouts.share=1, or rollouts=mixed for a teacher's answer in each group"
            )

    def __call__(self, policy: Policy, batch: SpeechBatch, seed: int, rows: Tensor | None = None) -> list[Rollout]:
        asked = torch.arange(len(batch)) if rows is None else rows
        is_own = torch.tensor([_draw(seed, batch.instructions[row].id) < self.share for row in asked.tolist()])
        answers, self.num_unfinished = [], 0
        for source, chosen in ((self._own, asked[is_own]), (self._taught, asked[~is_own])):
            if len(chosen):
                answers += source(policy, batch, seed, chosen)
                self.num_unfinished += source.num_unfinished
        place = {row: n for n, row in enumerate(asked.tolist())}
        return sorted(answers, key=lambda rollout: place[rollout.prompt_index])


class FreshGKDRollouts(GKDRollouts):
    """As ``GKDRollouts``, with new answers of the teacher, who reads the words: ``FreshTeacherRollouts``.

    Args:
        teacher: writes them, with the same settings as the student.
        group_size: answers to a prompt, all by the same one.
    """

    def __init__(
        self, *, teacher: Teacher, share: float, group_size: int, max_new_tokens: int, temperature: float, top_p: float
    ):
        settings = {
            "group_size": group_size, "max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p,
        }  # fmt: skip
        self._between(share, PolicyRollouts(**settings), FreshTeacherRollouts(teacher=teacher, **settings))


def _draw(seed: int, name: str) -> float:
    """A uniform number in [0, 1), a function of (seed, id), and not the one that draws the answer's first token."""
    digest = hashlib.blake2b(f"author:{seed}:{name}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53
