# SPDX-License-Identifier: Apache-2.0
"""Does reinforcement beat distillation? A study of many runs, on as many cores as there are; see conf/rba_study.yaml.

python examples/rba_study.py                     # goes on where it was stopped

    synthesis/     one set of spoken instructions for all
    runs/<run>/    every training run: <run>.nemo, metrics.jsonl
    evaluation/    answers of the chosen runs, start, cascade and teacher to the test sets
    n<prompts>/    the report of each size
    study.md, .html, plots/    everything in one table and one picture
"""

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path

import recipe
import recipe_checks
import recipe_conditions
import recipe_evaluation
import recipe_parts
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from nemo.core.config import hydra_runner
from nemo.utils import logging
from omegaconf import DictConfig
from study.runs import Run, choose, config, dev_score, grid
from study.summary import Study, write_study

from nemo_rba.distributed import parallel
from nemo_rba.interruption import raise_on
from nemo_rba.stages import Stages

SECONDS_TO_SAVE = 10
CONF = Path(__file__).resolve().parents[1] / "conf"


@hydra_runner(config_path="../conf", config_name="rba_study")
def main(study: DictConfig) -> None:
    raise_on(signal.SIGTERM, stopped)
    try:
        runs = grid(study)
    except ValueError as problem:
        raise SystemExit(str(problem)) from None
    first = config(study, runs[0])
    for run in {run.arm: run for run in runs}.values():
        recipe_checks.preflight(config(study, run))
    recipe_conditions.check_conditions(first)
    recipe.start(first)
    stages = Stages(study.output, rank=parallel.rank())
    data = stages.run(
        "synthesis", recipe_parts.keys(first, recipe_parts.SYNTHESIS), partial(recipe.synthesize, first, rank=0)
    )
    finish(study, runs, partial(train_one, study, data))
    scores = {run: dev_score(folder(study, run), monitor(first)) for run in runs}
    chosen = choose(runs, scores)
    final = [replace(run, seed=seed) for run in chosen.values() for seed in study.seeds]
    finish(study, final, partial(train_one, study, data))
    finish(study, final, partial(ask_one, study, data))
    files, sets = {run.name: nemo_file(study, run) for run in final}, recipe_conditions.held_out_sets(first, data)
    predictions = recipe_evaluation.evaluate(first, sets, files, Path(study.output) / "evaluation")
    found = Study(config=study, recipe=first, scores=scores, chosen=chosen, predictions=predictions, sets=sets)
    write_study(found, folder)
    logging.info(f"study: {Path(study.output) / 'study.html'}")


def folder(study: DictConfig, run: Run) -> Path:
    """Where a run is."""
    return Path(study.output) / "runs" / run.name


def nemo_file(study: DictConfig, run: Run) -> Path:
    """What a run has made."""
    return folder(study, run) / f"{run.name}.nemo"


def monitor(cfg: DictConfig) -> str:
    """The dev score that checkpoints and learning rates are chosen by."""
    return cfg.exp_manager.checkpoint_callback_params.monitor


def finish(study: DictConfig, runs: list[Run], work: Callable[[Run], None]) -> None:
    """Do it for all runs, ``study.workers`` at a time, or with one worker here; what is done already is skipped.

    Raises:
        SystemExit: some could not be finished; all others were.
    """
    failed = []
    for number, (run, problem) in enumerate(_outcomes(study.workers, runs, work), start=1):
        logging.info(f"{number} of {len(runs)} runs: {run.name}{f' failed: {problem}' if problem else ''}")
        failed += [f"{run.name}: {problem}"] if problem else []
    if failed:
        raise SystemExit("these runs are not finished:\n" + "\n".join(f"  - {line}" for line in failed))


def _outcomes(workers: int, runs: list[Run], work: Callable[[Run], None]) -> Iterator[tuple[Run, BaseException | None]]:
    """Each run, as it ends, and what has ended it before its time.

    Who stops the study stops its workers: they are asked to save what they have, as by a scheduler.
    """
    if workers == 1:
        for run in runs:
            try:
                work(run)
            except Exception as problem:
                yield run, problem
            else:
                yield run, None
        return
    context = multiprocessing.get_context("spawn")  # processes of their own: each has its process groups and its model
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        try:
            waiting = {pool.submit(work, run): run for run in runs}
            for done in as_completed(waiting):
                yield waiting[done], done.exception()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            while children := set(multiprocessing.active_children()) - others:  # again: one may have begun the next run
                for child in children:
                    child.terminate()
                for child in children:
                    child.join(SECONDS_TO_SAVE)
            raise


def train_one(study: DictConfig, data: Path, run: Run) -> None:
    """One run, in a worker."""
    cfg = _begin(study, run)
    asked = recipe_parts.keys(cfg, recipe_parts.ALIGNMENT)
    try:
        Stages(Path(study.output) / "runs").run(run.name, asked, lambda path: recipe.align(cfg, data, path, run.name))
    except SystemExit as stop:
        if isinstance(stop, recipe.Interrupted) or not isinstance(stop.code, str):
            raise  # no complaint of the run: all of us are to stop
        raise RuntimeError(stop.code) from stop


def ask_one(study: DictConfig, data: Path, run: Run) -> None:
    """One run's answers to the test sets, in a worker; as the study's first run would ask, whatever the arm."""
    cfg = _begin(study, grid(study)[0])
    sets = recipe_conditions.held_out_sets(cfg, data)
    recipe_evaluation.answer(cfg, sets, run.name, nemo_file(study, run), Path(study.output) / "evaluation")


def stopped() -> recipe.Interrupted:
    """What ends the study."""
    return recipe.Interrupted("stopped by SIGTERM; run again to go on")


def _begin(study: DictConfig, run: Run) -> DictConfig:
    """The config of a run, in a process that may be new."""
    if not GlobalHydra.instance().is_initialized():
        initialize_config_dir(str(CONF), version_base=None)
    cfg = config(study, run)
    recipe.start(cfg)
    return cfg


if __name__ == "__main__":
    main()
