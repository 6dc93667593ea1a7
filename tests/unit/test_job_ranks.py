# SPDX-License-Identifier: Apache-2.0
import pytest

from nemo_rba.distributed.launch import rank_without_groups

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SRUN = {"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
        "SLURM_JOB_NAME": "synthesis"}  # fmt: skip
ARRAY = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_STEP": "2"}


@pytest.mark.parametrize(
    ("environment", "rank"),
    [({}, 0), (TORCHRUN, 5), (SRUN, 3), (ARRAY, 2), (SRUN | ARRAY, 2 * 4 + 3), ({"SLURM_ARRAY_TASK_ID": "4"}, 4)],
)
def test_every_process_of_a_job_has_a_rank_of_its_own(monkeypatch, environment, rank):
    for name in {**TORCHRUN, **SRUN, **ARRAY}:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert rank_without_groups() == rank
