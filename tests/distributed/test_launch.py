# SPDX-License-Identifier: Apache-2.0
"""The same job by torchrun, by SLURM and by itself; a wrong number of processes is refused with the numbers."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import launch_worker
import pytest
from forked import LAUNCHER, ROOT, by_slurm, run_ranks


def command(folder: Path, *launcher: str) -> None:
    clean = {key: value for key, value in os.environ.items() if key not in LAUNCHER}
    done = subprocess.run(
        [sys.executable, *launcher, launch_worker.__file__, str(folder), "2", "2"], text=True, timeout=900,
        env=clean | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]


def slurm(folder: Path, tensor_parallel: int) -> None:
    run_ranks(launch_worker.main, folder, 2, tensor_parallel, num_ranks=2, folder=folder, told=by_slurm)


STARTS = {
    "torchrun": lambda folder: command(folder, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
    "itself": command,
    "slurm": partial(slurm, tensor_parallel=2),
    "data parallel": partial(slurm, tensor_parallel=1),
}


@pytest.mark.parametrize("how", list(STARTS))
def test_every_launcher_makes_the_same_job(how, tmp_path):
    STARTS[how](tmp_path)
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
    expected = r"2 processes were started, but trainer.devices 4 x trainer.num_nodes 1 = 4"
    with pytest.raises(RuntimeError, match=expected):
        run_ranks(launch_worker.main, tmp_path, 4, 2, num_ranks=2, folder=tmp_path)
    assert not list(tmp_path.glob("*.json"))
