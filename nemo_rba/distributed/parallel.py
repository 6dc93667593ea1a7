# SPDX-License-Identifier: Apache-2.0
"""Process groups, ranks and seeds: the one place that asks who this process is."""

import os
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from nemo_rba.distributed import cpu

TIMEOUT = timedelta(hours=1)  # of one collective: ranks wait for the first one's teacher, and for slow disks


def initialize(*, tensor_parallel_size: int, pipeline_parallel_size: int, seed: int) -> None:
    """Create torch's and megatron's process groups, once per process.

    A process that no launcher started becomes a world of one, without touching a port.

    Raises:
        ValueError: a size is no number of ranks, the world does not divide by the model-parallel size, or groups of
            another size exist already.
    """
    check_sizes(tensor_parallel_size, pipeline_parallel_size)
    cpu.install()
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if dist.is_torchelastic_launched():
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group(backend, timeout=TIMEOUT)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    world, model_parallel = dist.get_world_size(), tensor_parallel_size * pipeline_parallel_size
    if world % model_parallel:
        raise ValueError(
            f"{world} processes cannot be split into groups of tensor_model_parallel_size {tensor_parallel_size} x "
            f"pipeline_model_parallel_size {pipeline_parallel_size} = {model_parallel}; change trainer.devices, "
            "trainer.num_nodes or the model.*_parallel_size keys"
        )
    if parallel_state.model_parallel_is_initialized():
        _check_existing(tensor_parallel_size, pipeline_parallel_size)
        return
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_parallel_size,
        pipeline_model_parallel_size=pipeline_parallel_size,
        distributed_timeout_minutes=TIMEOUT // timedelta(minutes=1),  # megatron's own is half an hour
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def check_sizes(tensor_parallel_size: int, pipeline_parallel_size: int) -> None:
    """Refuse what is no number of ranks.

    Raises:
        ValueError: a size is not a whole number, or below 1.
    """
    for name, size in (("tensor", tensor_parallel_size), ("pipeline", pipeline_parallel_size)):
        if type(size) is not int or size < 1:
            raise ValueError(f"model.{name}_model_parallel_size is {size!r}; expected a whole number of at least 1")


def _check_existing(tensor_parallel_size: int, pipeline_parallel_size: int) -> None:
    have = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )
    if have != (tensor_parallel_size, pipeline_parallel_size):
        raise ValueError(
            f"this process already runs with tensor x pipeline parallel size {have}, not "
            f"({tensor_parallel_size}, {pipeline_parallel_size}); use one layout per process"
        )


def rank() -> int:
    """This process among all; 0 before ``initialize``."""
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    """Wait for every process."""
    if dist.is_initialized():
        dist.barrier()


def model_parallel_rank() -> int:
    """This process among those that share one copy of the weights; 0 before ``initialize``."""
    if not parallel_state.model_parallel_is_initialized():
        return 0
    return dist.get_rank(parallel_state.get_model_parallel_group())


def model_parallel_size() -> int:
    """Over how many processes one copy of the weights is spread; 1 before ``initialize``."""
    if not parallel_state.model_parallel_is_initialized():
        return 1
    return dist.get_world_size(parallel_state.get_model_parallel_group())


def data_parallel_rank() -> int:
    """Which share of the prompts is ours; 0 before ``initialize``."""
    return parallel_state.get_data_parallel_rank() if parallel_state.model_parallel_is_initialized() else 0


def data_parallel_size() -> int:
    """How many ways the prompts are split; 1 before ``initialize``."""
    return parallel_state.get_data_parallel_world_size() if parallel_state.model_parallel_is_initialized() else 1


def data_parallel_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum of a small tensor over the data-parallel ranks, where it was."""
    if data_parallel_size() == 1:
        return values
    total = values.to(device(), copy=True)  # NCCL sums on the GPU only
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return total.to(values.device)


def data_parallel_mean(metrics: Mapping[str, float]) -> dict[str, float]:
    """Mean of each metric over the data-parallel ranks, which all have the same names."""
    total = data_parallel_sum(torch.tensor(list(metrics.values()), dtype=torch.float64)) / data_parallel_size()
    return dict(zip(metrics, total.tolist(), strict=True))


def data_parallel_lists(items: list) -> list[list]:
    """Every data-parallel rank's list of plain objects, in the order of ranks."""
    if data_parallel_size() == 1:
        return [items]
    lists: list = [None] * data_parallel_size()
    dist.all_gather_object(lists, items, group=parallel_state.get_data_parallel_group())
    return lists


def device() -> torch.device:
    """Where this process computes."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
