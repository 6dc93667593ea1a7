# SPDX-License-Identifier: Apache-2.0
"""Evaluate one aligned model, a .nemo or a SALM folder: the last stage of the main job, alone.

python examples/rba_evaluate.py aligned=model.nemo manifest=shar_folder
python examples/rba_evaluate.py aligned=salm_folder 'tasks={llama: {manifest: llama_shar, evaluation: spoken_qa}}'
"""

from pathlib import Path

import recipe
import recipe_evaluation
from hydra.errors import InstantiationException
from nemo.core.config import hydra_runner
from nemo.utils import logging
from omegaconf import DictConfig

from nemo_rba.evaluation.conditions import HeldOut


@hydra_runner(config_path="../conf", config_name="rba_evaluate")
def main(cfg: DictConfig) -> None:
    try:
        sets = recipe_evaluation.benchmark_sets(cfg)
    except (ValueError, InstantiationException) as problem:
        raise SystemExit(str(problem)) from None
    recipe.start(cfg)
    aligned, folder = Path(cfg.aligned), Path(cfg.output)
    if cfg.manifest is not None:
        sets[Path(cfg.manifest).stem] = HeldOut(manifest=Path(cfg.manifest))
    absent = [f"{name}: {held_out.manifest}" for name, held_out in sets.items() if not held_out.manifest.exists()]
    if absent or not sets:
        raise SystemExit(
            f"no such manifests: {', '.join(absent)}" if absent
            else "nothing to evaluate on: give manifest=..., or tasks={name: {manifest: ..., evaluation: ...}}"
        )  # fmt: skip
    predictions = recipe_evaluation.evaluate(cfg, sets, {aligned.stem: aligned}, folder)
    recipe_evaluation.report(cfg, predictions, sets, [aligned.stem], folder, {"curves": None, "budget": {}})
    logging.info(f"report: {folder / 'report.html'}")


if __name__ == "__main__":
    main()
