# SPDX-License-Identifier: Apache-2.0
"""A run of two processes that changes its layout on the way.

``main``'s FOLDER/<name> holds what each run left: checkpoints, metrics, and its final weights as ``final.nemo``.
"""

import shutil
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
from alignment_run import EVERY_TWO_STEPS, StopHere, build, fit
from megatron.core import parallel_state

from nemo_rba.checkpoint.whole import gather_state
from nemo_rba.distributed import parallel
from nemo_rba.models.rba_speech_lm import RBASpeechLM

CRASH_AT = 4  # batches
LAYOUTS = {"tp2": (2, 1), "pp2": (1, 2)}


def start(layout: str) -> None:
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    tp, pp = LAYOUTS[layout]
    parallel.initialize(tensor_parallel_size=tp, pipeline_parallel_size=pp, seed=0)


def run(salm: Path, manifest: Path, folder: Path, layout: str, crash_at: int | None) -> None:
    """Train to the end, or to a crash; goes on with what ``folder`` has."""
    start(layout)
    tp, pp = LAYOUTS[layout]
    module = build(salm, manifest, folder, crash_at=crash_at, tensor_parallel=tp, pipeline_parallel=pp)
    fit(module, folder, EVERY_TWO_STEPS, devices=2, tensor_parallel=tp, pipeline_parallel=pp)
    module.model.save_to(folder / "final.nemo")


def copy(source: Path, target: Path) -> None:
    if dist.get_rank() == 0:
        shutil.copytree(source, target)
    dist.barrier()


def main(salm: Path, manifest: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    with suppress(StopHere):
        run(salm, manifest, folder / "broken", "tp2", CRASH_AT)
    for name in ("one", "to_pp2", "to_tp2"):
        copy(folder / "broken", folder / name)
    run(salm, manifest, folder / "to_tp2", "tp2", None)
    run(salm, manifest, folder / "to_pp2", "pp2", None)
    for layout, (tp, pp) in LAYOUTS.items():  # the .nemo of a pipeline, at every layout
        start(layout)
        model = RBASpeechLM.restore_from(
            folder / "to_pp2" / "final.nemo", tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp
        )
        whole = gather_state(model)
        if dist.get_rank() == 0:
            torch.save(whole, folder / f"restored_{layout}.pt")
        dist.barrier()
