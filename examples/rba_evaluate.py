# SPDX-License-Identifier: Apache-2.0
"""Evaluate one aligned model on one manifest: the last stage of the main job, alone.

python examples/rba_evaluate.py aligned=model.nemo manifest=shar_folder
"""

from pathlib import Path

import recipe
import recipe_evaluation
from nemo.core.config import hydra_runner
from nemo.utils import logging
from omegaconf import DictConfig

from nemo_rba.evaluation.conditions import HeldOut


@hydra_runner(config_path="../conf", config_name="rba_evaluate")
def main(cfg: DictConfig) -> None:
    recipe.start(cfg)
    aligned, manifest, folder = Path(cfg.aligned), Path(cfg.manifest), Path(cfg.output)
    sets = {manifest.stem: HeldOut(manifest=manifest)}
    predictions = recipe_evaluation.evaluate(cfg, sets, {aligned.stem: aligned}, folder)
    recipe_evaluation.report(cfg, predictions, sets, [aligned.stem], folder, {"curves": None, "budget": {}})
    logging.info(f"report: {folder / 'report.html'}")


if __name__ == "__main__":
    main()
