# SPDX-License-Identifier: Apache-2.0
"""Resume checkpoints that any layout can write and any other can read, by megatron's ``dist_checkpointing``.

    <name>/             one folder a checkpoint
      lightning.pt      Lightning's own: loops, callbacks, the place in the data, schedules
      *.distcp          weights and optimizer, every rank its share; tensors carry their place in the whole
      metadata.json     written last by megatron

A checkpoint is written beside its place and renamed when it is complete, so one that was cut off is never found.
"""

import multiprocessing
import shutil
import sys
from multiprocessing.managers import SyncManager
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import nn

from nemo_rba.checkpoint.lifeline import end_with_parent
from nemo_rba.distributed import cpu, parallel

_LIGHTNING = "lightning.pt"
_UNFINISHED = "unfinished"  # folder for what is being written, beside the folder of checkpoints


def metadata() -> dict:
    """What megatron's ``sharded_state_dict`` functions want to be told; the same for saving and loading."""
    return {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": True,  # by gloo, to one rank: no GPU memory, half the host's
    }


def sharded_weights(model: nn.Module) -> dict:
    """Every tensor of an RBASpeechLM on this rank, with its place in the whole model."""
    state = model.llm.sharded_state_dict(prefix="llm.", metadata=metadata())
    if model.perception is not None:
        tp_group = parallel_state.get_tensor_model_parallel_group()
        state |= sharded_state_dict_default(model.perception, "perception.", (), metadata(), tp_group=tp_group)
    return state


def start_writer() -> None:
    """Start the process of megatron's writer, once, without our main module in it; it ends with ours.

    It is spawned, and a spawned process imports the program's main module: all of NeMo, 11 s at the first checkpoint,
    for a queue that needs none of it; or a script without ``if __name__ == "__main__"`` a second time. And megatron's
    own would stay, with 0.3 GB, when we are killed.
    """
    if filesystem_async._results_queue is not None:
        return
    main = vars(sys.modules["__main__"])
    kept = {name: main[name] for name in ("__file__", "__spec__") if name in main}
    main.update(dict.fromkeys(kept))
    try:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        manager.start(end_with_parent)
        filesystem_async._results_queue = manager.Queue()
    finally:
        main.update(kept)


def save(folder: Path, *, sharded: dict, lightning: dict) -> None:
    """Write a checkpoint. Collective over all processes."""
    draft = folder.parent.with_name(_UNFINISHED) / folder.name
    if parallel.rank() == 0:
        shutil.rmtree(draft.parent, ignore_errors=True)  # left by a crash
        draft.mkdir(parents=True)
    dist.barrier()
    written = {key: value for key, value in metadata().items() if key != "dp_cp_group"}
    start_writer()
    with cpu.redirect_cuda():
        dist_checkpointing.save(sharded, str(draft), content_metadata=written)
    if parallel.rank() == 0:
        torch.save(lightning, draft / _LIGHTNING)
    dist.barrier()
    if parallel.rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft.rename(folder)
        draft.parent.rmdir()
    dist.barrier()


def read_lightning(folder: Path) -> dict:
    """Lightning's part of a checkpoint.

    Raises:
        ValueError: there is no whole checkpoint.
    """
    if not (folder / _LIGHTNING).is_file():
        raise ValueError(f"{folder} is no checkpoint of an alignment; expected a folder with {_LIGHTNING}")
    return torch.load(folder / _LIGHTNING, map_location="cpu", weights_only=False)  # the run's own file


def load(folder: Path, sharded: dict) -> dict:
    """The tensors that ``sharded`` describes, read from a checkpoint of any layout. Collective."""
    with cpu.redirect_cuda():
        return dist_checkpointing.load(sharded, str(folder))
