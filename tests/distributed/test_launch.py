# SPDX-License-Identifier: Apache-2.0
"""The same job by torchrun, by SLURM and by itself; a wrong number of processes is refused with the numbers."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = str(Path(__file__).with_name("launch_worker.py"))
LAUNCHERS = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "RANK", "WORLD_SIZE")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[2])
    clean = {key: value for key, value in os.environ.items() if key not in LAUNCHERS}
    return clean | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}


def start(folder: Path, *launcher: str, tensor_parallel: int = 2, devices: int = 2, env: dict | None = None):
    command = [sys.executable, *launcher, WORKER, str(folder), str(devices), str(tensor_parallel)]
    return subprocess.Popen(
        command, env=environment() | (env or {}), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def by_slurm(folder: Path, tensor_parallel: int) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return [
        start(
            folder,
            tensor_parallel=tensor_parallel,
            env={
                "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "rba", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
                "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0", "SLURM_NNODES": "1",
                "SLURM_NODELIST": "localhost", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            },
        )
        for rank in range(2)
    ]  # fmt: skip


STARTS = {
    "torchrun": lambda folder: [start(folder, *TORCHRUN)],
    "itself": lambda folder: [start(folder)],
    "slurm": lambda folder: by_slurm(folder, tensor_parallel=2),
    "data parallel": lambda folder: by_slurm(folder, tensor_parallel=1),
}


@pytest.mark.parametrize("how", list(STARTS))
def test_every_launcher_makes_the_same_job(how, tmp_path):
    for process in STARTS[how](tmp_path):
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output[-3000:]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert len({rank["pid"] for rank in ranks}) == 2
    for number, rank in enumerate(ranks):
        assert (rank["rank"], rank["world"], rank["sum"]) == (number, 2, 2)
        if how == "data parallel":
            assert rank["data_parallel"] == [number, 2]
            assert rank["lists"] == [[0], [1]]
            assert rank["costly"] == [rank["pid"], 3]
        else:
            assert rank["data_parallel"] == [0, 1]
            assert rank["costly"] == [ranks[0]["pid"], 3], "it was built by the first rank alone"
        assert rank["timeouts"] == [3600.0] * 5, "a teacher is waited for in megatron's groups too"
        assert rank["complaint"].endswith("value -1; expected 0 or more")


def test_a_wrong_number_of_processes_is_refused(tmp_path):
    output, _ = start(tmp_path, *TORCHRUN, devices=4).communicate(timeout=300)
    assert "2 processes were started, but trainer.devices 4 x trainer.num_nodes 1 = 4" in output
    assert not list(tmp_path.iterdir())
