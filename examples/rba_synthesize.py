# SPDX-License-Identifier: Apache-2.0
"""Self-synthesis alone: the first stage of the main job, in the folder the main job will look for it.

python examples/rba_synthesize.py --config-name=rba_tiny
"""

import recipe
from nemo.core.config import hydra_runner
from omegaconf import DictConfig

from nemo_rba.stages import Stages


@hydra_runner(config_path="../conf", config_name="rba_tiny")
def main(cfg: DictConfig) -> None:
    recipe.preflight(cfg)
    Stages(cfg.output).run(
        "synthesis", recipe.keys(cfg, recipe.SYNTHESIS), lambda folder: recipe.synthesize(cfg, folder)
    )


if __name__ == "__main__":
    main()
