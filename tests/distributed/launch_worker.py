# SPDX-License-Identifier: Apache-2.0
"""What a process of a job finds after ``launch``: ``launch_worker.py FOLDER DEVICES TENSOR_PARALLEL``."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from nemo_rba.distributed import parallel
from nemo_rba.distributed.launch import launch
from nemo_rba.distributed.once import once_per_model


class Costly:
    """Stands for a teacher: knows in which process it lives."""

    def __init__(self):
        self.built_by = os.getpid()

    def answer(self, value: int) -> tuple[int, int]:
        if value < 0:
            raise ValueError(f"value {value}; expected 0 or more")
        return self.built_by, value


def timeouts() -> list[float]:
    """Seconds after which a collective of each kind of group gives up."""
    groups = (
        dist.group.WORLD, parallel_state.get_model_parallel_group(), parallel_state.get_data_parallel_group(),
        parallel_state.get_tensor_model_parallel_group(), parallel_state.get_pipeline_model_parallel_group(),
    )  # fmt: skip
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


def main(folder: Path, devices: int, tensor_parallel: int) -> None:
    for _ in range(2):  # the second time nothing is left to do
        launch(
            devices=devices, num_nodes=1, tensor_parallel_size=tensor_parallel, pipeline_parallel_size=1, seed=0
        )  # fmt: skip
    total = torch.ones(())
    dist.all_reduce(total)
    costly = once_per_model(Costly)
    try:
        costly.answer(-1)
    except ValueError as error:
        complaint = str(error)
    found = {
        "pid": os.getpid(), "rank": parallel.rank(), "world": dist.get_world_size(), "sum": int(total),
        "data_parallel": [parallel.data_parallel_rank(), parallel.data_parallel_size()],
        "timeouts": timeouts(), "lists": parallel.data_parallel_lists([parallel.rank()]),
        "costly": costly.answer(3), "complaint": complaint,
    }  # fmt: skip
    (folder / f"{found['rank']}.json").write_text(json.dumps(found))
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
