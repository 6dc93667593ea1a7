# SPDX-License-Identifier: Apache-2.0
"""The last stages of a recipe: everybody answers the held-out sets, and a report says what came out."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig
from recipe import LABELS, layout, loader_builder

from nemo_rba.algorithms.policy import FrozenPolicy
from nemo_rba.algorithms.speech_cache import SpeechCache
from nemo_rba.data.prompt import typed_batch
from nemo_rba.distributed import parallel
from nemo_rba.distributed.once import once_per_model
from nemo_rba.evaluation.conditions import HeldOut
from nemo_rba.evaluation.plots import TrainingCurves, read_curve
from nemo_rba.evaluation.report import write_report
from nemo_rba.evaluation.results import Roles
from nemo_rba.evaluation.runner import CascadeSystem, PolicySystem, Prediction, System, TeacherSystem, run
from nemo_rba.evaluation.tasks import ItemTask
from nemo_rba.models.rba_speech_lm import RBASpeechLM

PANELS = {
    "Reward": "reward/mean",
    "Dev: gap closed": "val/gap_closed",
    "KL to the start model": "kl/reference",
    "KL coefficient": "kl/coefficient",
    "Entropy": "entropy",
    "Teacher minus student, log p": "teacher/logratio",
    "Answer length": "rollout/length",
}


def held_out_sets(cfg: DictConfig, data: Path) -> dict[str, HeldOut]:
    """Name in the report -> condition: a split of ``data``, or {split: ..., and what ``HeldOut`` has}."""

    def one(value: str | DictConfig) -> HeldOut:
        if isinstance(value, str):
            return HeldOut(manifest=data / value)
        choice = instantiate(value)
        return HeldOut(manifest=data / choice.split, **{key: choice[key] for key in choice if key != "split"})

    return {name: one(value) for name, value in cfg.conditions.items()}


def tasks(cfg: DictConfig, sets: dict[str, HeldOut], folder: Path, model: RBASpeechLM) -> list[ItemTask]:
    """The held-out sets of the report."""
    make_task = instantiate(cfg.evaluation.task)

    def one(name: str, held_out: HeldOut) -> ItemTask:
        build = loader_builder(
            cfg, held_out.manifest, folder / "quarantine.jsonl", train=False, needs_response=False,
            augmentation=held_out.augmentation,
        )  # fmt: skip
        loader = build(prompt=model.prompt, sampling_rate=model.sampling_rate)
        if held_out.typed:
            return make_task(name=name, batches=lambda: (typed_batch(batch, model.prompt) for batch in loader))
        return make_task(name=name, batches=lambda: loader)

    return [one(name, held_out) for name, held_out in sets.items()]


def systems(cfg: DictConfig, start: RBASpeechLM, files: dict[str, Path]) -> list[Callable[[], System]]:
    """Everyone who is compared, built when needed: T, the cascade, S0, and every aligned model."""
    evaluation, teacher = cfg.evaluation, once_per_model(partial(instantiate, cfg.teacher))
    params, heard = instantiate(evaluation.params), SpeechCache()

    def frozen(model: RBASpeechLM) -> FrozenPolicy:
        return FrozenPolicy(model=model, generation_batch_size=evaluation.generation_batch_size, speech_cache=heard)

    def cascade() -> System:
        return CascadeSystem(
            name="cascade",
            policy=frozen(start),
            teacher=teacher,
            encoder=start.prompt,
            transcribe_context=evaluation.transcribe_context,
            transcribe_params=instantiate(evaluation.transcribe_params),
            params=params,
        )

    def aligned(arm: str) -> System:
        model = RBASpeechLM.restore_from(files[arm], **layout(cfg))
        return PolicySystem(name=arm, policy=frozen(model), params=params)

    return [
        lambda: TeacherSystem(name="teacher", teacher=teacher, params=params),
        cascade,
        lambda: PolicySystem(name="start", policy=frozen(start), params=params),
        *(partial(aligned, arm) for arm in files),
    ]


def evaluate(
    cfg: DictConfig, sets: dict[str, HeldOut], files: dict[str, Path], folder: Path
) -> list[Prediction]:  # fmt: skip
    """Stage d: every system answers every held-out set; goes on where an interrupted run stopped."""
    start = instantiate(cfg.model)
    held_out = tasks(cfg, sets, folder, start)
    predictions = []
    for build in systems(cfg, start, files):
        system = build()
        for task in held_out:
            if not (sets[task.name].typed and isinstance(system, CascadeSystem)):  # which would have nothing to hear
                predictions += run(system, task, folder)
    return predictions


def report(
    cfg: DictConfig, predictions: list[Prediction], sets: dict[str, HeldOut], arms: list[str], folder: Path,
    trained: dict,
) -> None:  # fmt: skip
    """Stage e: tables, plots and a verdict. ``trained``: what to say of how the arms were made, see ``training``."""
    if parallel.rank() > 0:
        return
    labels = {"teacher": "Teacher reads the text (T)", "cascade": "Cascade", "start": "Start (S0)"}
    labels |= {arm: LABELS.get(arm, arm) for arm in arms}
    write_report(
        folder=folder,
        title=f"{cfg.name}: Reinforced Behavior Alignment",
        roles=Roles(
            systems=labels, teacher=labels["teacher"], start=labels["start"], arms=[labels[arm] for arm in arms]
        ),
        predictions=predictions,
        **trained,
        held_out=sets,
        notes=list(cfg.evaluation.notes),
        num_samples=cfg.evaluation.num_samples,
        num_draws=cfg.evaluation.num_draws,
        seed=cfg.seed,
    )


def training(cfg: DictConfig, folders: dict[str, Path]) -> dict:
    """Training curves and budget of the arms, for the report."""
    clips = cfg.trainer.max_steps // cfg.num_minibatches * cfg.data.batch_size
    curves = {LABELS.get(arm, arm): [folder / "metrics.jsonl"] for arm, folder in folders.items()}
    budget = {}
    for arm, folder in folders.items():
        seconds = json.loads((folder / "done.json").read_text())["seconds"]
        budget[LABELS.get(arm, arm)] = {"clips": f"{clips:,}", "time": f"{seconds:.0f} s"}
    files = [file for paths in curves.values() for file in paths]
    panels = {
        title: column
        for title, column in PANELS.items()
        if any(len(read_curve(file, step="step", column=column)[0]) for file in files)
    }
    return {"curves": TrainingCurves(runs=curves, panels=panels, step="step"), "budget": budget}
