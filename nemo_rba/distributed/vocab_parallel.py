# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities and entropy of logits whose vocabulary is sharded over tensor-parallel ranks.

Every function takes the local slice (..., V / tp) and returns full-vocabulary values, the same on every rank, with
gradients for the local slice. ``reduce`` below is all-reduce forward and identity backward; ``copy`` is the converse.
log Z is used by each rank's own slice, so its gradient must be summed over ranks: copy(reduce(.)).
"""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor


def log_softmax(logits: Tensor) -> Tensor:
    """Local slice (..., V / tp) of the log-softmax over the whole vocabulary, float32."""
    logits = logits.float()
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return logits.log_softmax(-1)
    largest = logits.detach().amax(-1, keepdim=True)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=parallel_state.get_tensor_model_parallel_group())
    shifted = logits - largest
    total = reduce_from_tensor_model_parallel_region(shifted.exp().sum(-1, keepdim=True))
    return shifted - copy_to_tensor_model_parallel_region(total).log()


def gather(log_probs: Tensor, ids: Tensor) -> Tensor:
    """Values at vocabulary ids: local slice (..., V / tp), ids (..., K) -> (..., K)."""
    tp = parallel_state.get_tensor_model_parallel_world_size()
    if tp == 1:
        return log_probs.gather(-1, ids)
    width = log_probs.shape[-1]
    local = ids - parallel_state.get_tensor_model_parallel_rank() * width
    mine = (local >= 0) & (local < width)
    values = log_probs.gather(-1, local.clamp(0, width - 1))
    return reduce_from_tensor_model_parallel_region(torch.where(mine, values, 0.0))


def entropy(log_probs: Tensor) -> Tensor:
    """Entropy in nats of the local slice (..., V / tp) of a log-softmax: (...)."""
    local = -(log_probs.exp() * log_probs).sum(-1)
    return reduce_from_tensor_model_parallel_region(local)
