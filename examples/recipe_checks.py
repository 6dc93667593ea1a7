# SPDX-License-Identifier: Apache-2.0
"""What is looked at before any work: all that a config names and that is not there, or that cannot work, at once."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import Container, DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException
from recipe_parts import (
    SYNTHESIS,
    arms,
    controls,
    data_parallel_ranks,
    keys,
    layout,
    rollout_source,
    steps_a_batch,
)
from transformers import AutoTokenizer

from nemo_rba.algorithms.choices import check_choices, check_passes
from nemo_rba.models.rba_speech_lm import RBASpeechLM
from nemo_rba.synthesis.teacher_folder import check_same_vocabulary


def preflight(cfg: DictConfig) -> None:
    """Stop before any work when the config names something that is not there, or something that cannot work.

    Raises:
        SystemExit: everything that is wrong, and what to do about it.
    """
    _stop_if(uncountable(cfg) + dangling(cfg))
    wrong = missing(cfg) + unset(cfg) + unfit(cfg) + headless(cfg) + too_few(cfg)
    if not wrong and "folder" in cfg.model:
        world_size = cfg.trainer.devices * cfg.trainer.num_nodes
        wrong = _complaint(partial(RBASpeechLM.check_salm, cfg.model.folder, world_size=world_size, **layout(cfg)))
    for name, arm in arms(cfg).items() if not wrong and "baselines" in cfg else ():
        wrong += [f"{name}: {line}" for line in _complaint(check_arm, arm)]
    if "batch_size" in cfg.data and cfg.num_minibatches > cfg.data.batch_size:
        wrong.append(f"num_minibatches = {cfg.num_minibatches} is more than data.batch_size = {cfg.data.batch_size}")
    _stop_if(wrong + never_scored(cfg) + never_read(cfg))


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
    check_passes(objective, cfg.ppo_epochs)
    controls(cfg).check(objective, cfg.num_minibatches * cfg.ppo_epochs)
    judgement = "topk_logprobs" if objective.teacher_topk else "logprobs" if objective.needs_teacher else ""
    if judgement and not hasattr(get_object(cfg.teacher["_target_"]), judgement):
        raise ValueError(
            f"{type(objective).__name__} learns from what the teacher thinks of every token, but "
            f"{cfg.teacher._target_} only writes; choose teacher=hf, or another objective (objective.dense_weight=0), "
            "or leave the baseline out (~baselines.forward_kl)"
        )
    if judgement and "folder" in cfg.model and Path(str(cfg.teacher.get("path"))).is_dir():
        read = partial(AutoTokenizer.from_pretrained, local_files_only=True)
        check_same_vocabulary(read(cfg.teacher.path).get_vocab(), read(cfg.model.folder).get_vocab())


def uncountable(cfg: DictConfig) -> list[str]:
    """Numbers of processes that are none: Lightning's ``auto`` and -1 leave open how the batch is shared out."""
    counts = {f"trainer.{key}": cfg.trainer[key] for key in ("devices", "num_nodes")}
    return [
        f"{key} is {value!r}; expected a whole number of 1 or more, as batches and layouts are counted by it"
        for key, value in counts.items()
        if not isinstance(value, int) or value < 1
    ]


def too_few(cfg: DictConfig) -> list[str]:
    """A dev set that leaves a data-parallel rank without an item: Lightning would let it go on, the others wait."""
    ranks = data_parallel_ranks(cfg)
    sizes = {key: cfg.data.get(key) for key in ("num_dev", "dev_prompts")}
    return [
        f"data.{key} is {size}, but {ranks} data-parallel ranks share the dev set; expected an item for each"
        for key, size in sizes.items()
        if size is not None and size < ranks
    ]


def never_scored(cfg: DictConfig) -> list[str]:
    """A run that ends before the dev set is read: no checkpoint would be the best."""
    steps, interval = (cfg.trainer.get(key) for key in ("max_steps", "val_check_interval"))
    if not isinstance(interval, int) or not steps or steps < 1:  # nothing is trained, or without end
        return []
    batches = steps // steps_a_batch(cfg)
    if interval <= batches:
        return []
    return [
        f"trainer.val_check_interval is {interval} batches, but trainer.max_steps = {steps} are "
        f"{batches} batches, of num_minibatches * ppo_epochs = {steps_a_batch(cfg)} steps each: no checkpoint would "
        "ever be scored; lower the interval"
    ]


def never_read(cfg: DictConfig) -> list[str]:
    """A checkpoint to be chosen, or a run to be stopped, by how the student reads, where nobody asks it to."""
    names = [f"exp_manager.{callback}_callback_params.monitor" for callback in ("checkpoint", "early_stopping")]
    monitors = {key: OmegaConf.select(cfg, key) or "" for key in names}
    return [
        f"{key} is {monitor}, of dev prompts that are read, but validation_typed is not true; set it, or monitor "
        "val/reward"
        for key, monitor in monitors.items()
        if not cfg.get("validation_typed") and monitor.startswith(("val/typed/", "val/both/"))
    ]


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


def dangling(cfg: Container) -> list[str]:
    """Keys that refer to a key which another choice has taken away, e.g. ``rollouts.max_new_tokens``."""
    lines = []
    for path, part, key in _keys(cfg):
        try:
            part[key]
        except InterpolationKeyError as error:
            lines.append(f"{path}: {str(error).splitlines()[0]}, which a choice has taken away; give {path}=...")
        except OmegaConfBaseException:  # told by ``unset``, or by whoever needs it
            continue
    return lines


def _keys(cfg: Container, path: str = "") -> Iterator[tuple[str, Container, str | int]]:
    """(full name, where it is, key) of everything that is an interpolation."""
    for key in cfg if isinstance(cfg, DictConfig) else range(len(cfg)):
        name, node = f"{path}.{key}".lstrip("."), cfg._get_node(key)
        if OmegaConf.is_interpolation(cfg, key):
            yield name, cfg, key
        elif isinstance(node, Container) and not node._is_none() and not node._is_missing():
            yield from _keys(node, name)


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
    except (ValueError, TypeError, InstantiationException) as error:  # TypeError: what a ``_partial_`` one still lacks
        return [str(error)]
    return []
