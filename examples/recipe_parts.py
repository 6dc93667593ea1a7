# SPDX-License-Identifier: Apache-2.0
"""What a recipe's config says: its arms, what each stage depends on, and parts that need more than ``instantiate``."""

from functools import partial

from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_rba.algorithms.controls import Controls
from nemo_rba.protocols import EvalTask, RolloutSource, Teacher

SYNTHESIS = ("teacher", "synthesis")  # what each stage's result depends on
OWN = ("kl_controller", "importance", "representation")  # optional, and for a loss on own answers
ALIGNMENT = (
    "model", "teacher", "rollouts", "reward", "advantage", "objective", "policy", "schedule", "num_minibatches",
    "ppo_epochs", "data", "trainer", "validation", "validation_task", "validation_typed", "seed",
    *OWN,
)  # fmt: skip
EVALUATION = ("model", "teacher", "evaluation", "conditions", "data", "seed", "name")
LABELS = {
    "rba": "RBA", "rba_judged": "RBA", "sft": "SFT", "distillation": "SFT", "forward_kl": "Forward KL",
    "reverse_kl": "Reverse KL",
}  # fmt: skip
BORNE = ("max_batches", "allow_fewer", "on_change", "max_failed_share", "language")  # of self-synthesis
PASSES = (("policy", "micro_batch_size"), ("policy", "generation_batch_size"), ("policy", "recompute"))


def clips_heard(cfg: DictConfig, steps: int) -> int:
    """Spoken prompts that so many optimiser steps ask for, on all ranks."""
    return steps // steps_a_batch(cfg) * cfg.data.batch_size * data_parallel_ranks(cfg)


def steps_a_batch(cfg: DictConfig) -> int:
    """Optimiser steps on the answers to one batch of prompts."""
    return cfg.num_minibatches * cfg.ppo_epochs


def data_parallel_ranks(cfg: DictConfig) -> int:
    """How many models share a global batch; 0 where there are too few devices for one."""
    groups = layout(cfg)
    ranks = cfg.trainer.devices * cfg.trainer.num_nodes
    return ranks // max(1, groups["tensor_model_parallel_size"] * groups["pipeline_model_parallel_size"])


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


def layout(cfg: DictConfig) -> dict:
    """How the weights are spread, as ``RBASpeechLM.restore_from`` wants it."""
    keys = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "sequence_parallel")
    return {key: cfg.model[key] for key in keys}


def rollout_source(cfg: DictConfig, teacher: Teacher | None) -> RolloutSource:
    """Who answers; a ``_partial_`` source waits for the teacher."""
    source = instantiate(cfg.rollouts)
    return source(teacher=teacher) if isinstance(source, partial) else source


def validation_task(cfg: DictConfig) -> EvalTask | None:
    """What measures the dev answers beside the reward, which gives the batches; None where nothing does."""
    make_task = instantiate(cfg.get("validation_task"))
    return make_task(name="dev", batches=list) if make_task is not None else None


def controls(cfg: DictConfig) -> Controls:
    """What steers and watches an arm; a run is watched for numbers that are no numbers whatever the config says."""
    return Controls(
        schedule=instantiate(cfg.schedule), kl_controller=instantiate(cfg.get("kl_controller")),
        watcher=instantiate(cfg.watcher),
    )  # fmt: skip
