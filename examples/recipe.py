# SPDX-License-Identifier: Apache-2.0
"""The stages of a recipe as functions of its config. This is the only place that knows everyone: it chooses and wires.

synthesis/   Lhotse Shar: train, dev and test sets of spoken instructions with the teacher's answers
align_*/     one folder an arm: <arm>.nemo, metrics.jsonl, exp_manager's checkpoints
evaluation/  every system's answers to the test sets
report/      report.md, report.html, results.json
"""

import inspect
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from lightning.pytorch import Trainer
from nemo.utils import logging
from nemo.utils.exp_manager import exp_manager
from nemo.utils.get_rank import is_global_rank_zero
from omegaconf import Container, DictConfig, OmegaConf, open_dict

from nemo_rba.algorithms.alignment import RBAAlignment, check_choices
from nemo_rba.algorithms.controls import Controls, RunStopped
from nemo_rba.algorithms.metrics_file import MetricsFile
from nemo_rba.algorithms.strategy import MegatronStrategy
from nemo_rba.data.dataset import SpeechInstructionDataset
from nemo_rba.data.loader import SpeechLoader
from nemo_rba.distributed import parallel
from nemo_rba.distributed.launch import launch
from nemo_rba.distributed.once import once_per_model
from nemo_rba.models.rba_speech_lm import RBASpeechLM
from nemo_rba.protocols import RolloutSource, Teacher
from nemo_rba.synthesis.speech import check_setup

SYNTHESIS = ("teacher", "synthesis")  # what each stage's result depends on
TAUGHT = ("sampler", "instruction_filters", "spoken_form", "speech_filters", "response_filters")  # may need the teacher
OWN = ("kl_controller", "importance", "representation")  # optional, and for a loss on own answers
ALIGNMENT = (
    "model", "teacher", "rollouts", "reward", "advantage", "objective", "policy", "schedule", "num_minibatches", "data",
    "trainer", "validation", "seed", *OWN,
)  # fmt: skip
LABELS = {"rba": "RBA", "sft": "SFT", "distillation": "SFT", "forward_kl": "Forward KL", "reverse_kl": "Reverse KL"}
BORNE = ("max_batches", "allow_fewer", "on_change", "max_failed_share", "language")  # of self-synthesis
PASSES = (("policy", "micro_batch_size"), ("policy", "generation_batch_size"), ("policy", "recompute"))
EVALUATION = ("model", "teacher", "evaluation", "conditions", "data", "seed", "name")


def arms(cfg: DictConfig) -> dict[str, DictConfig]:
    """The config of every arm: the main one, then each baseline, which replaces or amends some keys of it.

    A baseline that the main arm has become by its overrides is not run twice. ``OWN`` parts are the main arm's alone.
    """
    found = {cfg.arm: cfg}
    for name, changes in cfg.baselines.items():
        if LABELS.get(name, name) == LABELS.get(cfg.arm, cfg.arm):
            continue
        arm = cfg.copy()
        with open_dict(arm):
            for key in OWN:
                arm.pop(key, None)
        for key, change in changes.items():
            arm[key] = change if "_target_" in change else OmegaConf.merge(cfg[key], change)
        found[name] = arm
    return found


def keys(cfg: DictConfig, names: tuple[str, ...]) -> dict:
    """A part of the config, resolved, without what only says how it is computed: the layout, and sizes of passes.

    So an interrupted job may go on with other GPUs. The batch of one data-parallel rank is given as the global one.
    """
    plain = OmegaConf.to_container(cfg, resolve=True)
    groups = layout(cfg)
    ranks = cfg.trainer.devices * cfg.trainer.num_nodes
    ranks //= groups["tensor_model_parallel_size"] * groups["pipeline_model_parallel_size"]
    if "batch_size" in cfg.data:
        plain["data"]["global_batch_size"] = plain["data"].pop("batch_size") * ranks
    free = [("trainer", "devices"), ("trainer", "num_nodes"), *(("model", key) for key in groups), *PASSES]
    free += [("synthesis", key) for key in BORNE]
    for part, key in free:
        plain.get(part, {}).pop(key, None)
    (plain.get("synthesis", {}).get("quality") or {}).pop("max_dropped_share", None)  # how much loss one bears
    return {name: _without_free(plain[name]) for name in names if name in plain}


def _without_free(part):
    """``part`` without what the classes in it call free: how a teacher is asked, and not what."""
    if isinstance(part, list):
        return [_without_free(item) for item in part]
    if not isinstance(part, dict):
        return part
    free = getattr(get_object(part["_target_"]), "FREE_KEYS", ()) if "_target_" in part else ()
    return {key: _without_free(value) for key, value in part.items() if key not in free}


def start(cfg: DictConfig) -> None:
    """Check the config, then make all processes that it asks for.

    Raises:
        SystemExit: something cannot work; nothing was started.
    """
    torch.set_num_threads(cfg.num_threads)
    if is_global_rank_zero():  # the others wait for it in launch
        preflight(cfg)
    launch(devices=cfg.trainer.devices, num_nodes=cfg.trainer.num_nodes, seed=cfg.seed, **_groups(cfg))


def layout(cfg: DictConfig) -> dict:
    """How the weights are spread, as ``RBASpeechLM.restore_from`` wants it."""
    keys = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "sequence_parallel")
    return {key: cfg.model[key] for key in keys}


def _groups(cfg: DictConfig) -> dict:
    return {
        "tensor_parallel_size": cfg.model.tensor_model_parallel_size,
        "pipeline_parallel_size": cfg.model.pipeline_model_parallel_size,
    }


def preflight(cfg: DictConfig) -> None:
    """Stop before any work when the config names something that is not there, or something that cannot work.

    Raises:
        SystemExit: everything that is wrong, and what to do about it.
    """
    wrong = missing(cfg) + unset(cfg) + unfit(cfg) + headless(cfg)
    if not wrong and "folder" in cfg.model:
        world_size = cfg.trainer.devices * cfg.trainer.num_nodes
        wrong = _complaint(partial(RBASpeechLM.check_salm, cfg.model.folder, world_size=world_size, **layout(cfg)))
    for name, arm in arms(cfg).items() if not wrong and "baselines" in cfg else ():
        wrong += [f"{name}: {line}" for line in _complaint(check_arm, arm)]
    if "batch_size" in cfg.data and cfg.num_minibatches > cfg.data.batch_size:
        wrong.append(f"num_minibatches = {cfg.num_minibatches} is more than data.batch_size = {cfg.data.batch_size}")
    _stop_if(wrong)


def preflight_synthesis(cfg: DictConfig) -> None:
    """As ``preflight``, of what self-synthesis reads: it needs neither the student nor the student's GPUs.

    Raises:
        SystemExit: everything that is wrong, and what to do about it.
    """
    read = (*SYNTHESIS, "noise", "train_voices", "dev_voices", "test_voices")
    wrong = [line for line in unset(cfg) if line.startswith(read)] + unfit(cfg) + headless(cfg)
    if not wrong:
        values = str(keys(cfg, SYNTHESIS))  # with teacher=self, the student's folder is one of them
        named = [need for need in cfg.requires if repr(str(OmegaConf.select(cfg, need.key))) in values]
        wrong = _absent(cfg, named)
    _stop_if(wrong)


def _stop_if(wrong: list[str]) -> None:
    if wrong:
        raise SystemExit("nothing was started, because:\n" + "\n".join(f"  - {line}" for line in wrong))


def check_arm(cfg: DictConfig) -> None:
    """Refuse, with a ``ValueError``, choices of an arm that do not go together."""
    objective, importance = instantiate(cfg.objective), instantiate(cfg.get("importance"))
    representation = instantiate(cfg.get("representation"))
    check_choices(rollout_source(cfg, None), instantiate(cfg.advantage), objective, importance, representation)
    controls(cfg).check(objective, cfg.num_minibatches)
    judgement = "topk_logprobs" if objective.teacher_topk else "logprobs" if objective.needs_teacher else ""
    if judgement and not hasattr(get_object(cfg.teacher["_target_"]), judgement):
        raise ValueError(
            f"{type(objective).__name__} learns from what the teacher thinks of every token, but "
            f"{cfg.teacher._target_} only writes; choose teacher=hf, or another objective (objective.dense_weight=0), "
            "or leave the baseline out (~baselines.forward_kl)"
        )


def missing(cfg: DictConfig) -> list[str]:
    """Files and machines that the config needs and that are not there."""
    lines = _absent(cfg, cfg.requires)
    if cfg.trainer.accelerator == "gpu" and torch.cuda.device_count() < cfg.trainer.devices:
        lines.append(
            f"trainer.devices = {cfg.trainer.devices}: this machine shows {torch.cuda.device_count()} GPUs. Run on a "
            "node that has them, in the NGC container of the Dockerfile, or choose --config-name=rba_tiny for a CPU"
        )
    return lines


def _absent(cfg: DictConfig, needs: Sequence[DictConfig]) -> list[str]:
    return [
        f"{need.key} = {OmegaConf.select(cfg, need.key)}: {need.what} is not there. {need.how}"
        for need in needs
        if (path := OmegaConf.select(cfg, need.key)) is not None and not Path(str(path)).exists()
    ]


def headless(cfg: DictConfig) -> list[str]:
    """Parts that were put into something which is not there: keys, but no ``_target_`` that they are arguments of."""
    parts = ("synthesis.quality", "synthesis.spoken_form", "data.augmentation")
    return [
        f"{part} has {', '.join(found)}, but no _target_: add to it only where there is one, or give the whole of it"
        for part in parts
        if isinstance(found := OmegaConf.select(cfg, part), DictConfig) and "_target_" not in found
    ]


def unset(cfg: DictConfig) -> list[str]:
    """Keys that a choice leaves to the user."""
    known = {need.key: f": {need.what}" for need in cfg.requires}
    return [
        f"{key} is not set{known.get(key, '')}; expected a value: give {key}=..."
        for key in sorted(OmegaConf.missing_keys(cfg))
    ]


def unfit(cfg: Container, path: str = "") -> list[str]:
    """Keys that the class named by ``_target_`` does not accept, or lacks."""
    lines = []
    items = cfg.items_ex(resolve=False) if isinstance(cfg, DictConfig) else enumerate(cfg)
    for key, value in items:
        if OmegaConf.is_config(value):
            lines += unfit(value, f"{path}.{key}".lstrip("."))
    if isinstance(cfg, DictConfig) and "_target_" in cfg:
        given = dict.fromkeys(key for key in cfg if not key.startswith("_"))
        try:
            signature = inspect.signature(get_object(cfg["_target_"]))
            (signature.bind_partial if "_partial_" in cfg else signature.bind)(**given)
        except (TypeError, ImportError, ValueError) as error:
            lines.append(f"{path}: {cfg['_target_']}: {error}")
    return lines


def _complaint(check: Callable, *args) -> list[str]:
    try:
        check(*args)
    except (ValueError, InstantiationException) as error:
        return [str(error)]
    return []


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
    augmentation: Callable | None = None, num_items: int | None = None,
) -> Callable[..., SpeechLoader]:  # fmt: skip
    """``build(prompt=, sampling_rate=)`` of this rank's batches of a manifest, or of ``num_items`` of it."""
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
            num_items=num_items,
        )

    return build


def rollout_source(cfg: DictConfig, teacher: Teacher | None) -> RolloutSource:
    """Who answers; a ``_partial_`` source waits for the teacher."""
    source = instantiate(cfg.rollouts)
    return source(teacher=teacher) if isinstance(source, partial) else source


def controls(cfg: DictConfig) -> Controls:
    """What steers and watches an arm; a run is watched for numbers that are no numbers whatever the config says."""
    return Controls(
        schedule=instantiate(cfg.schedule), kl_controller=instantiate(cfg.get("kl_controller")),
        watcher=instantiate(cfg.watcher),
    )  # fmt: skip


def align(cfg: DictConfig, data: Path, folder: Path, arm: str) -> None:
    """Stages b and c: build the start model, align it, keep it as ``<folder>/<arm>.nemo``."""
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
            num_items=cfg.data.get("train_items"),
        ),
        build_validation_loader=loader_builder(
            cfg,
            data / "dev",
            folder / "quarantine.jsonl",
            train=False,
            num_items=cfg.data.get("dev_items"),
        ),
        validation_params=instantiate(cfg.validation),
        num_minibatches=cfg.num_minibatches,
        seed=cfg.seed,
    )
    strategy = MegatronStrategy(
        tensor_model_parallel_size=cfg.model.tensor_model_parallel_size,
        pipeline_model_parallel_size=cfg.model.pipeline_model_parallel_size,
        seed=cfg.seed,
    )
    trainer = Trainer(**cfg.trainer, strategy=strategy, callbacks=[MetricsFile(path=folder / "metrics.jsonl")])
    exp_manager(trainer, OmegaConf.create(dict(cfg.exp_manager) | {"exp_dir": str(folder), "name": "lightning"}))
    try:
        trainer.fit(module)
    except RunStopped as reason:
        last = sorted(Path(trainer.checkpoint_callback.dirpath).glob("*-last"))
        raise SystemExit(
            f"{arm}: given up at step {trainer.global_step} of {cfg.trainer.max_steps}, because {reason}. The last "
            f"good checkpoint is {last[-1] if last else 'the start model'}. Change schedule, objective or reward and "
            "run again; or, if this is no reason to stop, the section watcher"
        ) from None
    if trainer.global_step < cfg.trainer.max_steps:
        raise SystemExit(f"{arm}: stopped at step {trainer.global_step} of {cfg.trainer.max_steps}; run again to go on")
    best = trainer.checkpoint_callback.best_model_path  # on the dev set, for every arm alike
    trainer.strategy.restore(module, best)
    logging.info(f"{arm}: keeping {Path(best).stem}")
    module.model.save_to(str(folder / f"{arm}.nemo"))
