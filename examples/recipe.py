# SPDX-License-Identifier: Apache-2.0
"""The stages of a recipe as functions of its config. This is the only place that knows everyone: it chooses and wires.

synthesis/   Lhotse Shar: train, dev and test sets of spoken instructions with the teacher's answers
align_*/     one folder an arm: <arm>.nemo, metrics.jsonl, exp_manager's checkpoints
evaluation/  every system's answers to the test sets
report/      report.md, report.html, results.json
"""

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from hydra.utils import instantiate
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping
from nemo.utils import logging
from nemo.utils.callbacks import PreemptionCallback
from nemo.utils.exp_manager import exp_manager
from nemo.utils.get_rank import is_global_rank_zero
from omegaconf import DictConfig, OmegaConf
from recipe_checks import preflight
from recipe_parts import controls, rollout_source, validation_task

from nemo_rba.algorithms.alignment import RBAAlignment
from nemo_rba.algorithms.controls import RunStopped
from nemo_rba.algorithms.metrics_file import MetricsFile
from nemo_rba.algorithms.strategy import MegatronStrategy
from nemo_rba.data.dataset import SpeechInstructionDataset
from nemo_rba.data.loader import SpeechLoader
from nemo_rba.distributed import parallel
from nemo_rba.distributed.launch import launch
from nemo_rba.distributed.once import once_per_model
from nemo_rba.interruption import raise_on
from nemo_rba.synthesis.speech import check_setup

TAUGHT = ("sampler", "instruction_filters", "spoken_form", "speech_filters", "response_filters")  # may need the teacher


def start(cfg: DictConfig) -> None:
    """Check the config, then make all processes that it asks for.

    Raises:
        SystemExit: something cannot work; nothing was started.
    """
    torch.set_num_threads(cfg.num_threads)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        raise_on(signal.SIGINT, KeyboardInterrupt)
    if is_global_rank_zero():  # the others wait for it in launch
        preflight(cfg)
    launch(devices=cfg.trainer.devices, num_nodes=cfg.trainer.num_nodes, seed=cfg.seed, **_groups(cfg))


def _groups(cfg: DictConfig) -> dict:
    return {
        "tensor_parallel_size": cfg.model.tensor_model_parallel_size,
        "pipeline_parallel_size": cfg.model.pipeline_model_parallel_size,
    }


def synthesize(cfg: DictConfig, folder: Path, rank: int) -> None:
    """Stage a: the teacher's instructions and answers, spoken, by as many ranks as call this."""
    pipeline = instantiate(cfg.synthesis)  # voices, noise and checks first: what is wrong with them costs no teacher
    check_setup(pipeline.keywords)
    teacher = instantiate(cfg.teacher)

    def complete(part):
        """``part``, and every ``_partial_`` in it, with the teacher it waits for."""
        if isinstance(part, list):
            return [complete(item) for item in part]
        return part(teacher=teacher) if isinstance(part, partial) else part

    waiting = {name: complete(pipeline.keywords[name]) for name in TAUGHT}
    settings = OmegaConf.to_container(cfg.synthesis, resolve=True)
    pipeline(teacher=teacher, output=str(folder), **waiting).run(settings, rank)


def loader_builder(
    cfg: DictConfig, manifest: Path, quarantine: Path, *, train: bool, needs_response: bool = True,
    augmentation: Callable | None = None, num_prompts: int | None = None,
) -> Callable[..., SpeechLoader]:  # fmt: skip
    """``build(prompt=, sampling_rate=)`` of this rank's batches of a manifest, or of ``num_prompts`` of it."""
    if parallel.model_parallel_rank() > 0:  # reads what the first rank of its model reads, and reports it
        quarantine = Path(os.devnull)

    def build(*, prompt, sampling_rate: int) -> SpeechLoader:
        return SpeechLoader(
            manifest=manifest,
            dataset=SpeechInstructionDataset(
                prompt=prompt,
                sampling_rate=sampling_rate,
                max_duration_seconds=cfg.data.max_duration_seconds,
                max_response_tokens=cfg.data.max_response_tokens,
                quarantine=quarantine,
                needs_response=needs_response,
                augmentation=augmentation,
            ),
            batch_size=cfg.data.batch_size if train else cfg.data.validation_batch_size,
            shuffle=train,
            seed=cfg.seed,
            rank=parallel.data_parallel_rank(),
            world_size=parallel.data_parallel_size(),
            drop_last=train,
            num_prompts=num_prompts,
        )

    return build


class Interrupted(SystemExit):
    """A signal has ended the work; the same command goes on."""


def align(cfg: DictConfig, data: Path, folder: Path, arm: str) -> None:
    """Stages b and c: build the start model, align it, keep it as ``<folder>/<arm>.nemo``.

    Raises:
        SystemExit: the run was given up, or its time is over; run again to go on.
        Interrupted: SIGTERM or Ctrl-C; likewise.
    """
    objective = instantiate(cfg.objective)
    judged = objective.needs_teacher or objective.teacher_topk
    teacher = once_per_model(partial(instantiate, cfg.teacher)) if judged or "_partial_" in cfg.rollouts else None
    module = RBAAlignment(
        build_model=partial(instantiate, cfg.model),
        build_policy=instantiate(cfg.policy),
        source=rollout_source(cfg, teacher),
        reward=once_per_model(partial(instantiate, cfg.reward)),
        advantage=instantiate(cfg.advantage),
        objective=objective,
        teacher=teacher if judged else None,
        controls=controls(cfg),
        importance=instantiate(cfg.get("importance")),
        representation=instantiate(cfg.get("representation")),
        build_loader=loader_builder(
            cfg,
            data / "train",
            folder / "quarantine.jsonl",
            train=True,
            augmentation=instantiate(cfg.data.get("augmentation")),
            num_prompts=cfg.data.get("train_prompts"),
        ),
        build_validation_loader=loader_builder(
            cfg,
            data / "dev",
            folder / "quarantine.jsonl",
            train=False,
            num_prompts=cfg.data.get("dev_prompts"),
        ),
        validation_params=instantiate(cfg.validation),
        validation_task=validation_task(cfg),
        validation_typed=cfg.get("validation_typed", False),
        num_minibatches=cfg.num_minibatches,
        ppo_epochs=cfg.ppo_epochs,
        seed=cfg.seed,
    )
    trainer = _trainer(cfg, folder)
    try:
        interrupted = fit(trainer, module)
    except RunStopped as reason:
        last = sorted(Path(trainer.checkpoint_callback.dirpath).glob("*-last"))
        best = trainer.checkpoint_callback.best_model_path
        raise SystemExit(
            f"{arm}: given up at step {trainer.global_step} of {cfg.trainer.max_steps}, because {reason}. The last "
            f"checkpoint is {last[-1] if last else 'the start model'}, the best on dev {best or 'the start model'}. "
            "Change schedule, objective or reward and run again; or, if this is no reason to stop, the section watcher"
        ) from None
    if interrupted or (trainer.global_step < cfg.trainer.max_steps and not _stopped_early(trainer)):
        parallel.barrier()  # rank 0 may still be tidying checkpoints, and launchers kill all when the first one ends
        ended = f"{arm}: stopped at step {trainer.global_step} of {cfg.trainer.max_steps}; run again to go on"
        raise Interrupted(ended) if interrupted else SystemExit(ended)
    best = trainer.checkpoint_callback.best_model_path  # on the dev set, for every arm alike
    trainer.strategy.restore(module, best)
    logging.info(f"{arm}: keeping {Path(best).stem}")
    module.model.save_to(str(folder / f"{arm}.nemo"))


def _trainer(cfg: DictConfig, folder: Path) -> Trainer:
    """A trainer over megatron's groups, with exp_manager's loggers and checkpoints in ``folder``."""
    strategy = MegatronStrategy(
        tensor_model_parallel_size=cfg.model.tensor_model_parallel_size,
        pipeline_model_parallel_size=cfg.model.pipeline_model_parallel_size,
        seed=cfg.seed,
    )
    trainer = Trainer(**cfg.trainer, strategy=strategy, callbacks=[MetricsFile(path=folder / "metrics.jsonl")])
    exp_manager(trainer, OmegaConf.create(dict(cfg.exp_manager) | {"exp_dir": str(folder), "name": "lightning"}))
    if cfg.exp_manager.get("create_preemption_callback", True):
        save_on_signals(trainer)
    return trainer


def save_on_signals(trainer: Trainer) -> None:
    """SIGTERM and Ctrl-C save and stop at the end of the batch; a second one stops at once. See ``fit``.

    exp_manager has it on GPUs alone and for SIGTERM. What the caller has the process ignore stays ignored: a shell's
    script starts its jobs behind ``&`` without Ctrl-C.
    """
    known = [callback.sig for callback in trainer.callbacks if isinstance(callback, PreemptionCallback)]
    for sig in (signal.SIGTERM, signal.SIGINT):
        if sig not in known and signal.getsignal(sig) is not signal.SIG_IGN:
            trainer.callbacks.append(PreemptionCallback(trainer.checkpoint_callback, sig))


def fit(trainer: Trainer, module: RBAAlignment) -> bool:
    """Train; True where a signal has ended it before its time: NeMo's callback saves, and exits with status 0."""
    try:
        trainer.fit(module)
    except SystemExit as stop:
        if stop.code != 0:  # Lightning's own, without a code, saves nothing, and other ranks may not have it
            raise
        return True
    return False


def _stopped_early(trainer: Trainer) -> bool:
    """Whether exp_manager's early stopping (``create_early_stopping_callback``) has ended the arm: it is finished."""
    return any(isinstance(c, EarlyStopping) and c.wait_count >= c.patience for c in trainer.callbacks)
