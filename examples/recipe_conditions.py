# SPDX-License-Identifier: Apache-2.0
"""What is asked: the held-out sets of a recipe, and public sets, each as it is heard or read and measured."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import Container, DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigKeyError

from nemo_rba.benchmarks.writing import SUMMARY, read_summary
from nemo_rba.evaluation.conditions import Decoding, HeldOut, check_curves

WAYS = ("typed", "augmentation", "curve", "at")  # of ``HeldOut``, how items reach the student


def check_conditions(cfg: DictConfig) -> None:
    """Stop before any work where a condition cannot be met after it.

    Raises:
        SystemExit: a condition has a key that means nothing, or names a split that is not made.
    """
    made = [split.name for split in cfg.synthesis.splits if split.size]
    try:
        sets = held_out_sets(cfg, Path())
        wrong = [
            f"conditions.{name}: there is no split {held_out.manifest.name!r}; expected one of {', '.join(made)}"
            for name, held_out in sets.items()
            if held_out.manifest.name not in made
        ]
    except (ValueError, InstantiationException) as error:
        wrong = [str(error)]
    if wrong:
        raise SystemExit("nothing was started, because:\n" + "\n".join(f"  - {line}" for line in wrong))


def held_out_sets(cfg: DictConfig, data: Path) -> dict[str, HeldOut]:
    """Name in the report -> condition: a split of ``data``, or {split: ..., and what ``HeldOut`` has}.

    Raises:
        ValueError: a condition lacks its split, or has a key that means nothing.
    """
    given = {name: {"split": value} if isinstance(value, str) else value for name, value in cfg.conditions.items()}
    for name, value in given.items():
        _check_keys(f"conditions.{name}", value, needed=("split",), optional=WAYS)
    found = {name: _held_out(value, manifest=data / value["split"]) for name, value in given.items()}
    check_curves(found)
    return found


def benchmark_sets(cfg: DictConfig) -> dict[str, HeldOut]:
    """As ``held_out_sets``, of ``cfg.tasks``: each with a manifest, and an evaluation of its own where it names one.

    ``evaluation`` is a name of conf/evaluation, measures and decoding; ``task`` changes keys of its task. Tasks may
    be a list of manifests too: those that ``rba_benchmark.py`` wrote know how they are measured.

    Raises:
        ValueError: a task lacks its manifest, has a key that means nothing, or names no evaluation that there is; two
            of a list have one name.
    """
    found = {}
    for name, choice in _choices(cfg.tasks or {}):
        if name in found:
            raise ValueError(
                f"tasks has two manifests called {name!r}; give them names: tasks={{name: {{manifest: ...}}}}"
            )
        _check_keys(f"tasks.{name}", choice, needed=("manifest",), optional=("evaluation", "task", *WAYS))
        if "task" in choice and "evaluation" not in choice:
            raise ValueError(f"tasks.{name} changes a task, but names no evaluation; give evaluation as well")
        own = _own_evaluation(cfg, f"tasks.{name}", choice) if "evaluation" in choice else {}
        found[name] = _held_out(choice, manifest=Path(choice["manifest"]), **own)
    check_curves(found)
    return found


def _choices(tasks: Container | str) -> Iterator[tuple[str, Mapping]]:
    """(name, what is chosen) of each task; of a manifest in a list, by its folder and what is written in it."""
    if isinstance(tasks, DictConfig):
        yield from tasks.items()
        return
    for place in map(Path, [tasks] if isinstance(tasks, str) else tasks):
        known = read_summary(place).get("measure", {}) if (place / SUMMARY).is_file() else {}
        yield place.stem, OmegaConf.create({"manifest": str(place), **known})


def decoding_of(evaluation: DictConfig) -> Decoding:
    """How an evaluation has everybody answer."""
    return Decoding(
        params=instantiate(evaluation.params),
        transcribe_context=evaluation.transcribe_context,
        transcribe_params=instantiate(evaluation.transcribe_params),
    )


def _own_evaluation(cfg: DictConfig, where: str, choice: DictConfig) -> dict[str, object]:
    """Task, decoding and notes of an evaluation, in the place of the main one, so that what it refers to is found.

    Where it is the main one, it is as the command line has it: a judge's server is named once. The words that ask for a
    transcript are always the main one's: the model knows them, whatever the set.
    """
    evaluation = cfg.evaluation.copy() if choice.evaluation == _main_evaluation() else _composed(where, choice)
    scope = cfg.copy()
    with open_dict(scope):
        scope.evaluation = evaluation
        if "task" in choice:
            scope.evaluation.task = _merged(evaluation.task, choice.task, f"{where}.task")
        if OmegaConf.select(scope.evaluation.task, "reward.judge.section") is not None:  # as messages name its keys
            scope.evaluation.task.reward.judge.section = f"{where}.task.reward.judge"
    unset = sorted(key for key in OmegaConf.missing_keys(scope) if key.startswith("evaluation."))
    if unset:
        raise ValueError(
            f"{where}: {', '.join(unset)} not set; give them in {where}.task, or with evaluation={choice.evaluation}"
        )
    make_task, notes = instantiate(scope.evaluation.task), tuple(scope.evaluation.notes)
    decoding = replace(decoding_of(scope.evaluation), transcribe_context=cfg.evaluation.transcribe_context)
    return {"make_task": make_task, "decoding": decoding, "notes": notes}


def _main_evaluation() -> str | None:
    """What the command line or the config has chosen; None outside of a command."""
    return HydraConfig.get().runtime.choices.get("evaluation") if HydraConfig.initialized() else None


def _composed(where: str, choice: DictConfig) -> DictConfig:
    try:
        return compose(overrides=[f"+evaluation={choice.evaluation}"]).evaluation
    except HydraException as error:
        raise ValueError(f"{where}.evaluation is {choice.evaluation!r}: {str(error).splitlines()[0]}") from error


def _merged(task: DictConfig, changes: DictConfig, where: str) -> DictConfig:
    try:
        return OmegaConf.merge(task, changes)
    except ConfigKeyError as error:
        raise ValueError(
            f"{where} has a key that this evaluation does not: {str(error).splitlines()[0]}; it has {', '.join(task)}"
        ) from error


def _check_keys(where: str, choice: Mapping, *, needed: tuple[str, ...], optional: tuple[str, ...]) -> None:
    unknown = [key for key in choice if key not in needed + optional]
    absent = [key for key in needed if key not in choice]
    if unknown or absent:
        raise ValueError(
            f"{where} has the keys {list(choice)}; expected {', '.join(needed)} and, if wanted, {', '.join(optional)}"
        )


def _held_out(choice: Mapping, **known) -> HeldOut:
    given = {key: choice[key] for key in WAYS if key in choice}
    settings = given.get("augmentation")
    return HeldOut(
        **known,
        **{k: instantiate(v) if OmegaConf.is_config(v) else v for k, v in given.items()},
        settings=OmegaConf.to_container(settings, resolve=True) if OmegaConf.is_config(settings) else {},
    )
