# SPDX-License-Identifier: Apache-2.0
"""One program, many processes: started by torchrun, by SLURM, or by itself as Lightning does.

A job makes its processes here, at its very beginning, and not in the middle of it at ``trainer.fit``: synthesis and
evaluation run in them too.
"""

import os

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.fabric.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.fabric.utilities.rank_zero import rank_zero_only

from nemo_rba.distributed import cpu, parallel


def launch(*, devices: int, num_nodes: int, tensor_parallel_size: int, pipeline_parallel_size: int, seed: int) -> None:
    """Make ``devices * num_nodes`` processes run this script, and their process groups. Idempotent.

    Where nobody else has started them, this process starts the others of its node with its own command line.

    Raises:
        ValueError: the launcher's world is of another size, or does not divide by the model-parallel size.
    """
    cpu.install()
    environment = cluster_environment()
    if not dist.is_initialized() and (devices * num_nodes > 1 or environment.creates_processes_externally):
        _check_world(environment, devices, num_nodes)
        _SubprocessScriptLauncher(environment, num_processes=devices, num_nodes=num_nodes).launch(lambda: None)
        _connect(environment, devices, num_nodes)
    parallel.initialize(
        tensor_parallel_size=tensor_parallel_size, pipeline_parallel_size=pipeline_parallel_size, seed=seed
    )


def cluster_environment() -> ClusterEnvironment:
    """Who starts the processes. Under SLURM the batch script queues a job again, not Lightning in a signal handler."""
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    return SLURMEnvironment(auto_requeue=False) if SLURMEnvironment.detect() else LightningEnvironment()


def rank_without_groups(*, array: bool) -> int:
    """This process among those of a job that share a disk and nothing else; also chooses its GPU.

    torchrun's or srun's rank; 0 where nobody else was started.

    Args:
        array: whether the tasks of a SLURM array work on the same. They then count on from each other, so an array of
            4 with 8 processes each has the ranks 0 to 31. Mostly they do not: each is a job of its own.

    Raises:
        ValueError: ``array``, but this is no task of a SLURM array.
    """
    environment = cluster_environment()
    alone = isinstance(environment, LightningEnvironment)
    rank, size = (0, 1) if alone else (environment.global_rank(), environment.world_size())
    if array and "SLURM_ARRAY_TASK_ID" not in os.environ:
        raise ValueError("array=true, but SLURM_ARRAY_TASK_ID is not set; start this by sbatch --array=0-<n>")
    if array:
        task = int(os.environ["SLURM_ARRAY_TASK_ID"]) - int(os.environ.get("SLURM_ARRAY_TASK_MIN", 0))
        rank += task // int(os.environ.get("SLURM_ARRAY_TASK_STEP", 1)) * size
    if torch.cuda.is_available() and not alone:
        torch.cuda.set_device(environment.local_rank())
    return rank


def _check_world(environment: ClusterEnvironment, devices: int, num_nodes: int) -> None:
    started = environment.world_size() if not isinstance(environment, LightningEnvironment) else devices * num_nodes
    if started != devices * num_nodes:
        raise ValueError(
            f"{started} processes were started, but trainer.devices {devices} x trainer.num_nodes {num_nodes} = "
            f"{devices * num_nodes}; change these keys, or torchrun's --nproc_per_node and --nnodes (srun's tasks)"
        )


def _connect(environment: ClusterEnvironment, devices: int, num_nodes: int) -> None:
    environment.set_world_size(devices * num_nodes)
    environment.set_global_rank(environment.node_rank() * devices + environment.local_rank())
    rank_zero_only.rank = environment.global_rank()
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = environment.main_address, str(environment.main_port)
    if torch.cuda.is_available():
        torch.cuda.set_device(environment.local_rank())
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo", rank=environment.global_rank(), world_size=devices * num_nodes,
        timeout=parallel.TIMEOUT,
    )  # fmt: skip
