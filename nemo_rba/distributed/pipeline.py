# SPDX-License-Identifier: Apache-2.0
"""Talk between the stages of a pipeline outside of megatron's schedules: what generation and metrics need.

Every function is collective over the stages concerned, and free of cost where there is one stage and one rank.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from nemo_rba.distributed.parallel import device


def num_stages() -> int:
    """Into how many stages the layers are cut."""
    return parallel_state.get_pipeline_model_parallel_world_size()


def is_first_stage() -> bool:
    """Whether audio and word embeddings are ours."""
    return parallel_state.is_pipeline_first_stage()


def is_last_stage() -> bool:
    """Whether logits and the objective are ours."""
    return parallel_state.is_pipeline_last_stage()


def send(hidden: Tensor) -> None:
    """Hidden states to the next stage."""
    dist.send(
        hidden.contiguous(),
        parallel_state.get_pipeline_model_parallel_next_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )


def receive(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Hidden states of the previous stage."""
    hidden = torch.empty(shape, dtype=dtype, device=device())
    dist.recv(
        hidden,
        parallel_state.get_pipeline_model_parallel_prev_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    return hidden


def from_first_stage(values: Tensor) -> Tensor:
    """The first stage's values, written into everybody else's tensor of the same shape and type."""
    if num_stages() > 1:
        dist.broadcast(
            values,
            parallel_state.get_pipeline_model_parallel_first_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    return values


def from_last_stage(values: Tensor) -> Tensor:
    """The last stage's values, written into everybody else's tensor of the same shape and type."""
    if num_stages() > 1:
        dist.broadcast(
            values,
            parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    return values


def metrics_from_last_stage(metrics: dict[str, float]) -> dict[str, float]:
    """The last stage's metrics; other stages do not even know their names."""
    if num_stages() == 1:
        return metrics
    box = [metrics]
    dist.broadcast_object_list(
        box,
        parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
        device=device(),
    )
    return box[0]


def gather_over_stages(names: Sequence[str]) -> list[list[str]]:
    """Every stage's names, in the order of stages."""
    if num_stages() == 1:
        return [list(names)]
    parts: list = [None] * num_stages()
    dist.all_gather_object(parts, list(names), group=parallel_state.get_pipeline_model_parallel_group())
    return parts


def union_over_stages(names: Sequence[str]) -> list[str]:
    """Names of all stages, in their order, without repetition."""
    return list(dict.fromkeys(name for part in gather_over_stages(names) for name in part))


def to_first_stage(value: Tensor | None, stage: int) -> Tensor | None:
    """A tensor of ``stage``, of a shape only known there, on the first stage; None elsewhere."""
    group, here = parallel_state.get_pipeline_model_parallel_group(), parallel_state.get_pipeline_model_parallel_rank()
    if stage == 0 or here not in (0, stage):
        return value if stage == here else None
    first, owner = (dist.get_process_group_ranks(group)[i] for i in (0, stage))
    if here == stage:
        dist.send_object_list([tuple(value.shape), value.dtype], first, group=group, device=device())
        dist.send(value.contiguous(), first, group=group)
        return None
    about: list = [None, None]
    dist.recv_object_list(about, owner, group=group, device=device())
    value = torch.empty(about[0], dtype=about[1], device=device())
    dist.recv(value, owner, group=group)
    return value


class _Arrived:
    """Nothing to wait for."""

    def wait(self) -> None:
        """Done already."""


def agree(values: Tensor) -> dist.Work | _Arrived:
    """The values of one rank of the last stage, on their way into the tensor of every rank of the model-parallel group.

    They are there after ``wait()`` of what is returned. Ranks that draw from the same numbers need not come to the same
    token: sums on a GPU are not bitwise repeatable.
    """
    group = parallel_state.get_model_parallel_group()
    if dist.get_world_size(group) == 1:
        return _Arrived()
    ranks = dist.get_process_group_ranks(group)  # tensor-parallel rank fastest, then stage
    source = ranks[-parallel_state.get_tensor_model_parallel_world_size()]
    return dist.broadcast(values, source, group=group, async_op=True)


def sum_over_stages(values: Tensor) -> Tensor:
    """Sum of every pipeline stage's values, on each of them, where it was. Collective."""
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        dist.all_reduce(values, group=parallel_state.get_pipeline_model_parallel_group())
    return values
