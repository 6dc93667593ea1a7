# SPDX-License-Identifier: Apache-2.0
"""Where answers come from: the student, its teacher, or both.

``PolicyRollouts`` with a policy-gradient loss is RBA; ``TeacherRollouts`` with a likelihood loss is distillation. The
loop does not know which of the two it runs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_rba.algorithms.collate import prompt_index, transcript_prompt
from nemo_rba.functional import group_is_constant
from nemo_rba.protocols import Policy, RolloutSource, Teacher
from nemo_rba.rewards.mixture import RewardMixture
from nemo_rba.types import Rollout, SamplingParams, SpeechBatch


class PolicyRollouts:
    """G answers of the student itself to each spoken prompt.

    Args:
        group_size: G.
        max_new_tokens: the longest answer.
        temperature, top_p: 1 samples the policy itself. Others sample something else, which no importance weight
            corrects: log-probabilities are those of the policy as it is (``types``), where verl, NeMo-RL and TRL divide
            their logits by the temperature, and so learn the policy at that temperature.

    Raises:
        ValueError: a setting is out of range, or all answers of a group would be equal.
    """

    on_policy = True
    num_unfinished = 0  # a truncated answer is an answer
    max_resamples = 0

    def __init__(self, *, group_size: int, max_new_tokens: int, temperature: float, top_p: float):
        if group_size < 1:
            raise ValueError(f"rollouts.group_size must be 1 or more, got {group_size}")
        if temperature <= 0 and group_size > 1:
            raise ValueError(
                f"rollouts.temperature {temperature} makes all {group_size} answers of a group equal; expected above 0"
            )
        self.group_size = group_size
        self.max_new_tokens, self.temperature, self.top_p = max_new_tokens, temperature, top_p

    def __call__(self, policy: Policy, batch: SpeechBatch, seed: int, rows: Tensor | None = None) -> list[Rollout]:
        params = SamplingParams(
            max_new_tokens=self.max_new_tokens, temperature=self.temperature, top_p=self.top_p, seed=seed
        )
        return policy.generate(batch, group_size=self.group_size, params=params, rows=rows)


class ResampledRollouts(PolicyRollouts):
    """``PolicyRollouts`` that asks again where a prompt's answers are all equally good, see ``respond``.

    Args:
        max_resamples: how often it asks again.
    """

    def __init__(self, *, group_size: int, max_new_tokens: int, temperature: float, top_p: float, max_resamples: int):
        super().__init__(group_size=group_size, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
        if max_resamples < 1:
            raise ValueError(f"rollouts.max_resamples must be 1 or more, got {max_resamples}; or set rollouts=policy")
        self.max_resamples = max_resamples


class TeacherRollouts:
    """The teacher's stored answer to each spoken prompt: the data of supervised fine-tuning."""

    group_size = num_taught = 1
    on_policy = False
    num_unfinished = max_resamples = 0

    def __call__(self, policy: Policy, batch: SpeechBatch, seed: int, rows: Tensor | None = None) -> list[Rollout]:
        asked = enumerate(batch.instructions) if rows is None else ((r, batch.instructions[r]) for r in rows.tolist())
        return [
            Rollout(
                prompt_index=row,
                instruction=instruction,
                response=instruction.response,
                token_ids=batch.response_ids[row, : batch.response_lens[row]],
                logprobs=None,
                truncated=False,
            )
            for row, instruction in asked
        ]


class MixedRollouts:
    """G - 1 answers of the student, and the teacher's stored one as the last of the group: a mixed policy (2504.14945).

    The teacher's answer is compared with the student's own and learned from like them; its ``old_logprobs`` are the
    student's. 2504.14945 has no clip there, and weighs a teacher's token by f(pi), f(x) = x / (x + 0.1).
    With ``reward=spin`` and the DPO loss this is SPIN (2401.01335): the teacher's answer is to be preferred. The
    opponent is today's student and the reference the start model; SPIN takes the last iteration's for both, so that a
    new run from an aligned model is its next iteration.

    Args:
        group_size: G, the teacher's answer included.
    """

    on_policy = False  # one of them is not
    num_unfinished = max_resamples = 0

    def __init__(self, *, group_size: int, max_new_tokens: int, temperature: float, top_p: float):
        if group_size < 2:
            raise ValueError(f"rollouts.group_size must be 2 or more, the teacher's answer included, got {group_size}")
        own = PolicyRollouts(
            group_size=group_size - 1, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p
        )
        self._among(own, TeacherRollouts())

    def _among(self, own: PolicyRollouts, taught: RolloutSource) -> None:
        self.group_size, self.max_new_tokens = own.group_size + taught.group_size, own.max_new_tokens
        self.num_taught = taught.num_taught
        self._own, self._taught = own, taught

    def __call__(self, policy: Policy, batch: SpeechBatch, seed: int, rows: Tensor | None = None) -> list[Rollout]:
        answers = [*self._own(policy, batch, seed, rows), *self._taught(policy, batch, seed, rows)]
        self.num_unfinished = self._taught.num_unfinished
        return sorted(answers, key=lambda rollout: rollout.prompt_index)  # stable: the teacher's are the last of each


class FreshTeacherRollouts:
    """G new answers of the teacher, who reads the words, each time a spoken prompt comes by: its distribution, sampled.

    Distillation on it is the strongest rival of reinforcement: no answer is ever learned by heart. Where the teacher
    did not come to an end, its stored answer takes the place, and ``num_unfinished`` counts it.
    """

    on_policy = False
    max_resamples = 0

    def __init__(self, *, teacher: Teacher, group_size: int, max_new_tokens: int, temperature: float, top_p: float):
        if group_size < 1:
            raise ValueError(f"rollouts.group_size must be 1 or more, got {group_size}")
        if temperature <= 0:
            raise ValueError(
                f"rollouts.temperature {temperature} makes every new answer the same one; expected above 0, or "
                "rollouts=teacher for the stored answers"
            )
        self.teacher, self.group_size, self.max_new_tokens = teacher, group_size, max_new_tokens
        self.num_taught = group_size
        self.temperature, self.top_p = temperature, top_p
        self.num_unfinished = 0

    def __call__(self, policy: Policy, batch: SpeechBatch, seed: int, rows: Tensor | None = None) -> list[Rollout]:
        params = SamplingParams(
            max_new_tokens=self.max_new_tokens, temperature=self.temperature, top_p=self.top_p, seed=seed
        )
        chosen = range(len(batch)) if rows is None else rows.tolist()
        asked = [(row, batch.instructions[row]) for row in chosen for _ in range(self.group_size)]
        answers = self.teacher.generate(
            [transcript_prompt(self.teacher, instruction) for _, instruction in asked], params
        )
        self.num_unfinished = answers.count("")
        responses = [answer or instruction.response for answer, (_, instruction) in zip(answers, asked, strict=True)]
        return [
            Rollout(
                prompt_index=row,
                instruction=instruction,
                response=response,
                token_ids=torch.tensor(policy.encode_response(response)),
                logprobs=None,
                truncated=False,
            )
            for response, (row, instruction) in zip(responses, asked, strict=True)
        ]


class FreshMixedRollouts(MixedRollouts):
    """As ``MixedRollouts``, with new answers of the teacher, who reads the words, each time a spoken prompt comes by.

    Where all of the student's own answers are wrong, a reward has nothing to choose from; here it has. With the
    teacher's distribution as judgement (``JudgedPolicyLoss``) this is GKD (2306.13649) on both kinds of answers, and a
    reward.

    Args:
        teacher: writes them, with the same settings as the student: ``FreshTeacherRollouts``.
        num_taught: how many of a group's answers are the teacher's.
        group_size: G, these included.
    """

    def __init__(
        self, *, teacher: Teacher, num_taught: int, group_size: int, max_new_tokens: int, temperature: float,
        top_p: float,
    ):  # fmt: skip
        if not 1 <= num_taught < group_size:
            raise ValueError(
                f"rollouts.num_taught is {num_taught}, of rollouts.group_size {group_size}; expected 1 or more of the "
                "teacher's and one or more of the student's own: or set rollouts=policy, or rollouts=fresh_teacher"
            )
        settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        own = PolicyRollouts(group_size=group_size - num_taught, **settings)
        self._among(own, FreshTeacherRollouts(teacher=teacher, group_size=num_taught, **settings))


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Scored rollouts of a batch."""

    rollouts: list[Rollout]  # N, ordered by prompt
    rewards: Tensor  # (N,)
    parts: dict[str, Tensor]  # each reward by name, (N,)
    num_resampled: int = 0  # prompts that were asked again


def respond(
    source: RolloutSource, policy: Policy, batch: SpeechBatch, reward: RewardMixture, seed: int
) -> Answers:  # fmt: skip
    """The source's answers with their rewards; where a group teaches nothing, its prompt may be asked again.

    A group whose answers are all equally good has no advantage. DAPO (2503.14476) draws other prompts in its place;
    here the same prompts are asked again with other random numbers, up to ``source.max_resamples`` times, so that the
    batch, and with it the data position of a resumed run, stays what it was. What is silent even then stays as it is.
    """
    rollouts = source(policy, batch, seed=seed)
    rewards, parts = reward.score(rollouts)
    asked_again: set[int] = set()
    for attempt in range(1, source.max_resamples + 1):
        index = prompt_index(rollouts)
        silent = index[group_is_constant(rewards, index)].unique()
        if len(silent) == 0:
            break
        asked_again |= set(silent.tolist())
        fresh = source(policy, batch, seed=-(seed * (source.max_resamples + 1) + attempt), rows=silent)
        again = torch.isin(index, silent).nonzero()[:, 0]
        values, new_parts = reward.score(fresh)
        for place, rollout in zip(again.tolist(), fresh, strict=True):
            rollouts[place] = rollout
        rewards = rewards.index_copy(0, again, values)
        parts = {name: scores.index_copy(0, again, new_parts[name]) for name, scores in parts.items()}
    return Answers(rollouts=rollouts, rewards=rewards, parts=parts, num_resampled=len(asked_again))
