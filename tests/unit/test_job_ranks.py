# SPDX-License-Identifier: Apache-2.0
import pytest

from nemo_rba.distributed.launch import rank_without_groups

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SRUN = {"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
        "SLURM_JOB_NAME": "synthesis"}  # fmt: skip
ARRAY = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_STEP": "2"}


@pytest.fixture
def started_as(monkeypatch):
    """``started_as(environment)``: what a launcher has set."""

    def start(environment):
        for name in {**TORCHRUN, **SRUN, **ARRAY}:
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return start


@pytest.mark.parametrize(
    ("environment", "rank"),
    [({}, 0), (TORCHRUN, 5), (SRUN, 3), (ARRAY, 2), (SRUN | ARRAY, 2 * 4 + 3), ({"SLURM_ARRAY_TASK_ID": "4"}, 4)],
)
def test_every_process_of_a_job_has_a_rank_of_its_own(started_as, environment, rank):
    started_as(environment)
    assert rank_without_groups(array="SLURM_ARRAY_TASK_ID" in environment) == rank


def test_tasks_of_an_array_are_jobs_of_their_own_unless_told(started_as):
    started_as(ARRAY)
    assert rank_without_groups(array=False) == 0
    started_as(SRUN)
    with pytest.raises(ValueError, match="array=true, but SLURM_ARRAY_TASK_ID is not set"):
        rank_without_groups(array=True)
