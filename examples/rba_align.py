# SPDX-License-Identifier: Apache-2.0
"""Reinforced Behavior Alignment from nothing but a teacher, a TTS and a SALM checkpoint: the main job.

python examples/rba_align.py --config-name=rba_tiny
"""

import recipe
from nemo.core.config import hydra_runner
from nemo.utils import logging
from omegaconf import DictConfig

from nemo_rba.stages import Stages


@hydra_runner(config_path="../conf", config_name="rba_tiny")
def main(cfg: DictConfig) -> None:
    recipe.preflight(cfg)
    stages = Stages(cfg.output)
    data = stages.run("synthesis", recipe.keys(cfg, recipe.SYNTHESIS), lambda folder: recipe.synthesize(cfg, folder))
    files, metrics = {}, {}
    for arm, arm_cfg in recipe.arms(cfg).items():
        folder = stages.run(
            f"align_{arm}",
            recipe.keys(arm_cfg, recipe.ALIGNMENT),
            lambda folder, arm=arm, arm_cfg=arm_cfg: recipe.align(arm_cfg, data, folder, arm),
            after=["synthesis"],
        )
        files[arm], metrics[arm] = folder / f"{arm}.nemo", folder / "metrics.jsonl"

    def evaluate(folder) -> None:
        predictions = recipe.evaluate(cfg, data, files, folder)
        recipe.report(cfg, predictions, metrics, folder)

    folder = stages.run(
        "report", recipe.keys(cfg, recipe.EVALUATION), evaluate, after=["synthesis", *(f"align_{arm}" for arm in files)]
    )
    logging.info((folder / "report.md").read_text().split("\n\n")[1])
    logging.info(f"model: {files[cfg.arm]}   report: {folder / 'report.html'}")


if __name__ == "__main__":
    main()
