# SPDX-License-Identifier: Apache-2.0
"""How answers become a batch: padded, with every log-probability that the objective asks for.

Where they come from is ``rollout``.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nemo_rba.algorithms.importance import Importance
from nemo_rba.distributed.parallel import data_parallel_sum
from nemo_rba.functional import pad_sequences, typed, user_prompt
from nemo_rba.protocols import LikelihoodTeacher, Objective, Policy, Teacher
from nemo_rba.types import Instruction, Rollout, RolloutBatch, SpeechBatch


def prompt_index(rollouts: Sequence[Rollout]) -> Tensor:
    """Prompt row of each rollout (N,)."""
    return torch.tensor([rollout.prompt_index for rollout in rollouts])


def is_own(rollouts: Sequence[Rollout]) -> Tensor:
    """Which are the student's own answers and not the teacher's (N,), bool."""
    return torch.tensor([rollout.logprobs is not None for rollout in rollouts])


def collate(
    batch: SpeechBatch, rollouts: Sequence[Rollout], advantages: Tensor, *, policy: Policy, objective: Objective,
    teacher: LikelihoodTeacher | None, num_minibatches: int, importance: Importance | None = None,
) -> Iterator[RolloutBatch]:  # fmt: skip
    """Minibatches of rollouts whose ``advantages`` (N,) are known: ``judge``, then ``split``."""
    whole = judge(batch, rollouts, policy=policy, objective=objective, teacher=teacher, importance=importance)
    yield from split(dataclasses.replace(whole, advantages=advantages), num_minibatches)


def judge(
    batch: SpeechBatch, rollouts: Sequence[Rollout], *, policy: Policy, objective: Objective,
    teacher: LikelihoodTeacher | None, importance: Importance | None = None,
) -> RolloutBatch:  # fmt: skip
    """All rollouts with every log-probability the objective asks for, as yet without advantages and counts.

    The log-probabilities are of the policy before this batch's first update, so they are computed here, once.
    """
    response_ids, mask = pad_sequences([rollout.token_ids for rollout in rollouts], pad_value=0)
    whole = RolloutBatch(
        prompts=batch,
        prompt_index=prompt_index(rollouts),
        response_ids=response_ids,
        response_mask=mask,
        advantages=torch.zeros(len(rollouts)),
        num_loss_tokens=0,
        num_loss_rollouts=0,
    )
    whole = dataclasses.replace(whole, **_logprobs(whole, rollouts, policy, objective, teacher))
    if importance is not None:
        whole = _correct(whole, importance, policy)
    if whole.teacher_logprobs is not None and whole.old_logprobs is not None:
        whole = dataclasses.replace(whole, teacher_baseline=_teacher_baseline(whole))
    return whole


def split(whole: RolloutBatch, num_minibatches: int) -> Iterator[RolloutBatch]:
    """Minibatches of whole groups, one for each optimiser step, with their counts over all data-parallel ranks.

    Raises:
        ValueError: there are fewer prompts than minibatches.
    """
    prompts = whole.prompt_index.unique()
    if num_minibatches > len(prompts):
        raise ValueError(f"num_minibatches is {num_minibatches}, but a batch has only {len(prompts)} prompts; lower it")
    for chosen in prompts.tensor_split(num_minibatches):
        minibatch = select(whole, chosen)
        counts = data_parallel_sum(torch.tensor([minibatch.response_mask.sum(), len(minibatch)]))
        yield dataclasses.replace(minibatch, num_loss_tokens=int(counts[0]), num_loss_rollouts=int(counts[1]))


def _logprobs(
    whole: RolloutBatch, rollouts: Sequence[Rollout], policy: Policy, objective: Objective,
    teacher: LikelihoodTeacher | None,
) -> dict[str, Tensor]:  # fmt: skip
    fields = {}
    if objective.needs_old:
        fields["old_logprobs"] = _old_logprobs(whole, rollouts, policy)
    elif is_own(rollouts).all():
        fields["sampler_logprobs"] = _sampled(rollouts)
    if objective.needs_reference:
        fields["ref_logprobs"] = policy.logprobs(whole, reference=True)
        fields["is_own"] = is_own(rollouts)
    if objective.needs_teacher or objective.teacher_topk:
        fields |= _judgement(rollouts, objective, teacher)
    return fields


def _old_logprobs(whole: RolloutBatch, rollouts: Sequence[Rollout], policy: Policy) -> Tensor:
    """The sampler's, and of answers that are not the student's what it thinks of them: no answer is read twice."""
    old, is_taught = _sampled(rollouts), ~is_own(rollouts)
    if is_taught.any():
        old[is_taught] = policy.logprobs(_rows(whole, is_taught))
    return old


def _sampled(rollouts: Sequence[Rollout]) -> Tensor:
    """The sampler's log-probabilities (N, T), 0 for answers that it did not sample."""
    known = [torch.zeros(len(r.token_ids)) if r.logprobs is None else r.logprobs for r in rollouts]
    return pad_sequences(known, pad_value=0.0)[0]


def _correct(whole: RolloutBatch, importance: Importance, policy: Policy) -> RolloutBatch:
    """The trainer's log-probabilities in place of the sampler's, and weights for what lies between them."""
    trainer, sampler = policy.logprobs(whole), whole.old_logprobs
    weights = importance(trainer, sampler, whole.response_mask)
    return dataclasses.replace(whole, old_logprobs=trainer, sampler_logprobs=sampler, importance_weights=weights)


def _teacher_baseline(whole: RolloutBatch) -> float:
    """Mean of log pi_T - log pi_old over the tokens of the global batch."""
    logratio = (whole.teacher_logprobs - whole.old_logprobs)[whole.response_mask].double()
    total = data_parallel_sum(torch.tensor([logratio.sum(), len(logratio)], dtype=torch.float64))
    return float(total[0] / total[1])


def _judgement(rollouts: Sequence[Rollout], objective: Objective, teacher: LikelihoodTeacher) -> dict[str, Tensor]:
    """What the teacher, who reads the transcript, thinks of every token."""
    prompts = [transcript_prompt(teacher, rollout.instruction) for rollout in rollouts]
    tokens = [rollout.token_ids for rollout in rollouts]
    fields = {}
    if objective.needs_teacher:
        fields["teacher_logprobs"] = pad_sequences(teacher.logprobs(prompts, tokens), pad_value=0.0)[0]
    if objective.teacher_topk:
        ids, values = zip(*teacher.topk_logprobs(prompts, tokens, objective.teacher_topk), strict=True)
        if getattr(objective, "needs_sampled", False):  # of the token itself the teacher's value is not asked for
            ids = [torch.cat((some, own[:, None]), 1) for some, own in zip(ids, tokens, strict=True)]
            values = [torch.nn.functional.pad(some, (0, 1)) for some in values]
        fields["teacher_topk_ids"] = pad_sequences(ids, pad_value=0)[0]
        fields["teacher_topk_logprobs"] = pad_sequences(values, pad_value=0.0)[0]
    return fields


def transcript_prompt(teacher: Teacher, instruction: Instruction) -> str:
    """The teacher's prompt: the words spoken, typed."""
    return user_prompt(teacher, typed(instruction))


def select(batch: RolloutBatch, prompts: Tensor) -> RolloutBatch:
    """The rollouts of the given prompt rows; prompts and global counts stay as they are."""
    return _rows(batch, torch.isin(batch.prompt_index, prompts))


def _rows(batch: RolloutBatch, rows: Tensor) -> RolloutBatch:
    """Some rollouts (N,), bool."""
    tensors = {
        field.name: getattr(batch, field.name)[rows]
        for field in dataclasses.fields(batch)
        if isinstance(getattr(batch, field.name), Tensor)
    }
    return dataclasses.replace(batch, **tensors)


def select_prompts(batch: SpeechBatch, rows: Tensor) -> SpeechBatch:
    """Some prompts of a batch."""
    tensors = {
        field.name: getattr(batch, field.name)[rows]
        for field in dataclasses.fields(batch)
        if field.name != "instructions"
    }
    return SpeechBatch(instructions=tuple(batch.instructions[row] for row in rows.tolist()), **tensors)


def move(batch: RolloutBatch, device: torch.device) -> RolloutBatch:
    """The batch with its tensors on ``device``; its prompts stay where they are."""
    if batch.response_ids.device == device:
        return batch
    tensors = {
        field.name: getattr(batch, field.name).to(device)
        for field in dataclasses.fields(batch)
        if isinstance(getattr(batch, field.name), Tensor)
    }
    return dataclasses.replace(batch, **tensors)
