# SPDX-License-Identifier: Apache-2.0
"""Reinforced Behavior Alignment from nothing but a teacher, a TTS and a SALM checkpoint: the main job.

python examples/rba_align.py --config-name=rba_tiny
"""

import recipe
import recipe_conditions
import recipe_evaluation
import recipe_parts
from nemo.core.config import hydra_runner
from nemo.utils import logging
from omegaconf import DictConfig

from nemo_rba.distributed import parallel
from nemo_rba.stages import Stages


@hydra_runner(config_path="../conf", config_name="rba_tiny")
def main(cfg: DictConfig) -> None:
    recipe_conditions.check_conditions(cfg)
    recipe_evaluation.check_measures(cfg)
    recipe.start(cfg)
    arms = recipe_parts.arms(cfg)
    stages = Stages(cfg.output, rank=parallel.rank())
    data = stages.run(
        "synthesis",
        recipe_parts.keys(cfg, recipe_parts.SYNTHESIS),
        lambda folder: recipe.synthesize(cfg, folder, parallel.rank()),
        collective=True,
    )
    folders = {
        arm: stages.run(
            f"align_{arm}",
            recipe_parts.keys(arm_cfg, recipe_parts.ALIGNMENT),
            lambda folder, arm=arm, arm_cfg=arm_cfg: recipe.align(arm_cfg, data, folder, arm),
            after=["synthesis"],
            collective=True,
        )
        for arm, arm_cfg in arms.items()
    }
    files = {arm: folder / f"{arm}.nemo" for arm, folder in folders.items()}
    sets = recipe_conditions.held_out_sets(cfg, data)

    def evaluate_and_report(folder) -> None:
        predictions = recipe_evaluation.evaluate(cfg, sets, files, folder)
        recipe_evaluation.report(cfg, predictions, sets, list(arms), folder, recipe_evaluation.training(cfg, folders))

    report = stages.run(
        "report",
        recipe_parts.keys(cfg, recipe_parts.EVALUATION),
        evaluate_and_report,
        after=["synthesis", *(f"align_{arm}" for arm in arms)],
        collective=True,
    )
    logging.info(f"model: {files[cfg.arm]}   report: {report / 'report.html'}")


if __name__ == "__main__":
    main()
