# SPDX-License-Identifier: Apache-2.0
"""Self-synthesis alone: the first stage of the main job, in the folder the main job will look for it.

python examples/rba_synthesize.py --config-name=rba_tiny
torchrun --nproc_per_node=8 examples/rba_synthesize.py --config-name=rba_8b ...    # teacher and synthesizer on each GPU
sbatch --array=0-31 --wrap 'python examples/rba_synthesize.py +array=true ...'      # tasks that may come late, or die

Ranks share the output folder and nothing else; see nemo_rba/synthesis/orders.py.
"""

import recipe
import recipe_checks
import recipe_parts
import torch
from nemo.core.config import hydra_runner
from omegaconf import DictConfig

from nemo_rba.distributed.launch import rank_without_groups
from nemo_rba.stages import Stages


@hydra_runner(config_path="../conf", config_name="rba_tiny")
def main(cfg: DictConfig) -> None:
    torch.set_num_threads(cfg.num_threads)
    recipe_checks.preflight_synthesis(cfg)
    try:
        rank = rank_without_groups(array=cfg.get("array", False))
    except ValueError as problem:
        raise SystemExit(str(problem)) from None
    Stages(cfg.output, rank=rank).run(
        "synthesis",
        recipe_parts.keys(cfg, recipe_parts.SYNTHESIS),
        lambda folder: recipe.synthesize(cfg, folder, rank),
        collective=True,
    )


if __name__ == "__main__":
    main()
