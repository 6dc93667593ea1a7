# SPDX-License-Identifier: Apache-2.0
"""Small pure functions on tensors: means, KL estimators, log-probabilities, groups, padding; and two on words.

Letters are those of ``types.py``: N rollouts, T response tokens, V vocabulary. Nothing here knows of models, sharded
logits (``distributed/vocab_parallel.py``) or configs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_rba.protocols import Teacher
from nemo_rba.types import Instruction

KL_ESTIMATORS = ("k1", "k2", "k3")


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of ``values`` where ``mask`` is True, over all elements or over ``dim``; 0 where nothing is real."""
    total = torch.where(mask, values, 0.0)
    if dim is None:
        return total.sum() / mask.sum().clamp(min=1)
    return total.sum(dim) / mask.sum(dim).clamp(min=1)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """Elementwise estimate of KL(pi || pi_ref) from samples of pi (J. Schulman, joschu.net/blog/kl-approx.html).

    With r = pi_ref / pi: k1 = -log r (unbiased, may be negative), k2 = (log r)^2 / 2 (biased; its gradient is that of
    the KL), k3 = r - 1 - log r (unbiased, never negative).

    Args:
        logprobs: log pi of the sampled tokens, any shape.
        ref_logprobs: log pi_ref of the same tokens, the same shape.
        estimator: one of ``KL_ESTIMATORS``.
    """
    log_ratio = ref_logprobs - logprobs
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    if estimator == "k3":
        return log_ratio.expm1() - log_ratio
    raise ValueError(f"kl_estimator must be one of {KL_ESTIMATORS}, got {estimator!r}: change objective.kl_estimator")


def gather_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """Natural-log fp32 probability of ``ids`` (...) under unsharded ``logits`` (..., V), without a (..., V) copy."""
    logits = logits.float()
    return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats, fp32, of the distributions ``logits`` (..., V) -> (...)."""
    logprobs = logits.float().log_softmax(-1)
    return torch.special.entr(logprobs.exp()).sum(-1)


def group_mean(values: Tensor, prompt_index: Tensor) -> Tensor:
    """Mean of ``values`` (N,) over the rollouts of the same prompt, given back to each of them: (N,)."""
    member, size = _groups(prompt_index)
    total = torch.zeros(len(size), dtype=values.dtype, device=values.device).index_add(0, member, values)
    return (total / size)[member]


def group_std(values: Tensor, prompt_index: Tensor) -> Tensor:
    """Standard deviation of ``values`` (N,) over the rollouts of the same prompt: (N,), with Bessel's correction.

    Exactly 0 in a group whose values are all equal, whatever the rounding of their mean, and in a group of one.
    """
    member, size = _groups(prompt_index)
    squares = (values - group_mean(values, prompt_index)).square()
    variance = torch.zeros(len(size), dtype=values.dtype, device=values.device).index_add(0, member, squares)
    std = (variance / (size - 1).clamp(min=1)).sqrt()[member]
    return torch.where(group_is_constant(values, prompt_index), 0.0, std)


def group_size(prompt_index: Tensor) -> Tensor:
    """Number of rollouts of the same prompt, for each rollout: (N,) -> (N,) int64."""
    member, size = _groups(prompt_index)
    return size[member]


def group_is_constant(values: Tensor, prompt_index: Tensor) -> Tensor:
    """True for each rollout whose group has one and the same value: nothing to learn from. (N,) bool."""
    return group_max(values, prompt_index) == -group_max(-values, prompt_index)


def group_max(values: Tensor, prompt_index: Tensor) -> Tensor:
    """Largest of ``values`` (N,) over the rollouts of the same prompt, given back to each of them: (N,)."""
    member, size = _groups(prompt_index)
    return values.new_full((len(size),), -torch.inf).scatter_reduce(0, member, values, "amax")[member]


def group_argmax(values: Tensor, prompt_index: Tensor) -> Tensor:
    """Row of the largest of ``values`` (N,) in each group, the first among equals: (groups,), by rising prompt."""
    member, size = _groups(prompt_index)
    rows = torch.arange(len(values), device=values.device)
    rows = torch.where(values == group_max(values, prompt_index), rows, len(values))
    return torch.full_like(size, len(values)).scatter_reduce(0, member, rows, "amin")


def group_softmax(values: Tensor, prompt_index: Tensor) -> Tensor:
    """Softmax of ``values`` (N,) over the rollouts of the same prompt: (N,), adding up to 1 in each group."""
    member, size = _groups(prompt_index)
    shifted = (values - group_max(values.detach(), prompt_index)).exp()
    return shifted / torch.zeros_like(values[: len(size)]).index_add(0, member, shifted)[member]


def group_share(flags: Tensor, prompt_index: Tensor) -> Tensor:
    """Share of the groups in which all rollouts are flagged: bool (N,) -> a number from 0 to 1."""
    member, size = _groups(prompt_index)
    flagged = torch.zeros(len(size), device=flags.device).index_add(0, member, flags.float())
    return (flagged == size).float().mean()


def pad_sequences(sequences: Sequence[Tensor], *, pad_value: float) -> tuple[Tensor, Tensor]:
    """Right-pad N tensors (T_i, ...) to (N, T, ...); the mask (N, T) is True where there is something real."""
    if not sequences:
        raise ValueError("pad_sequences got no sequences, expected at least one: is the batch empty?")
    padded = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True, padding_value=pad_value)
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=padded.device)
    return padded, torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]


def _groups(prompt_index: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) prompt rows, in any order and with gaps -> group of each rollout (N,), size of each group."""
    _, member, size = torch.unique(prompt_index, return_inverse=True, return_counts=True)
    return member, size


def typed(instruction: Instruction) -> str:
    """What a reader gets instead of the speech: the typed context, if there is one, and the words as one types them."""
    words = instruction.typed or instruction.text
    return f"{instruction.context} {words}" if instruction.context else words


def user_prompt(teacher: Teacher, message: str) -> str:
    """``message`` as the one turn of a user, the assistant's turn left open: what ``Teacher.generate`` is given."""
    return teacher.render([{"role": "user", "content": message}], open_turn="assistant")
