# SPDX-License-Identifier: Apache-2.0
"""The last stages of a recipe: everybody answers the held-out sets, and a report says what came out."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from urllib.parse import quote

import soundfile
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from recipe import loader_builder
from recipe_conditions import decoding_of
from recipe_identity import fingerprints, has_start, identity
from recipe_parts import LABELS, clips_heard, layout

from nemo_rba.algorithms.frozen_policy import FrozenPolicy
from nemo_rba.algorithms.speech_cache import SpeechCache
from nemo_rba.data.loader import SpeechLoader
from nemo_rba.data.prompt import typed_batch
from nemo_rba.distributed import parallel
from nemo_rba.distributed.once import once_per_model
from nemo_rba.evaluation.browser import Sound, choose_items, write_browser
from nemo_rba.evaluation.conditions import Decoding, HeldOut
from nemo_rba.evaluation.plots import TrainingCurves, read_curve
from nemo_rba.evaluation.report import write_report
from nemo_rba.evaluation.results import Roles
from nemo_rba.evaluation.runner import Prediction, read_answers, run
from nemo_rba.evaluation.systems import CascadeSystem, PolicySystem, System, TeacherSystem
from nemo_rba.evaluation.tasks import ItemTask
from nemo_rba.manifest import read_manifest
from nemo_rba.models.rba_speech_lm import RBASpeechLM
from nemo_rba.protocols import PromptEncoder
from nemo_rba.rewards.votes import Accounted
from nemo_rba.types import Instruction

PANELS = {
    "Reward": "reward/mean",
    "Dev: gap closed": "val/gap_closed",
    "Dev, read: reward": "val/typed/reward",
    "KL to the start model": "kl/reference",
    "KL coefficient": "kl/coefficient",
    "Entropy": "entropy",
    "Teacher minus student, log p": "teacher/logratio",
    "Answer length": "rollout/length",
}


ACCOUNTS = "accounts.json"  # what scoring has cost


def tasks(
    cfg: DictConfig, sets: dict[str, HeldOut], folder: Path, model: RBASpeechLM
) -> list[tuple[ItemTask, dict[str, object]]]:  # fmt: skip
    """The held-out sets of the report, each with what the answers to it depend on."""

    def one(name: str, held_out: HeldOut) -> tuple[ItemTask, dict[str, object]]:
        loader = _loader(cfg, held_out, folder, model)
        basis = held_out.way | {"items": loader.heard}
        if held_out.typed:
            read = lambda: (typed_batch(batch, model.prompt) for batch in loader)  # noqa: E731
            return make_task(cfg, name, held_out, read), basis
        return make_task(cfg, name, held_out, lambda: loader), basis

    return [one(name, held_out) for name, held_out in sets.items()]


def make_task(cfg: DictConfig, name: str, held_out: HeldOut, batches: Callable) -> ItemTask:
    """The set's own task, or the evaluation's."""
    return (held_out.make_task or instantiate(cfg.evaluation.task))(name=name, batches=batches)


def check_measures(cfg: DictConfig) -> None:
    """Stop before any work where the report's measure lacks a package; a judge's server is asked for when it is needed.

    Raises:
        SystemExit: what is missing, and how to get it.
    """
    is_judged = OmegaConf.select(cfg.evaluation.task, "reward.judge") is not None
    if wrong := [] if is_judged else unmeasurable(cfg, {"evaluation": HeldOut(manifest=Path())}):
        raise SystemExit("nothing was started, because:\n" + "\n".join(f"  - {line}" for line in wrong))


def unmeasurable(cfg: DictConfig, sets: dict[str, HeldOut]) -> list[str]:
    """What the measures lack, known before a model is loaded: a package, IFEval's sentence model, a judge's server."""
    lines = []
    for name, held_out in sets.items():
        try:
            make_task(cfg, name, held_out, list)
        except InstantiationException as error:  # of what a task is made with
            lines.append(f"{name}: {error.__cause__ or error}")
        except (ValueError, ImportError) as error:
            lines.append(f"{name}: {error}")
    return lines


def _loader(cfg: DictConfig, held_out: HeldOut, folder: Path, model: RBASpeechLM) -> SpeechLoader:
    """A held-out set as the student hears it."""
    build = loader_builder(
        cfg, held_out.manifest, folder / "quarantine.jsonl", train=False, needs_response=False,
        augmentation=held_out.augmentation,
    )  # fmt: skip
    return build(prompt=model.prompt, sampling_rate=model.sampling_rate)


def systems(
    cfg: DictConfig, start: RBASpeechLM, files: dict[str, Path]
) -> dict[str, Callable[[], Callable[[Decoding], System]]]:
    """Everyone who is compared, built when needed, then told how to answer: T, the cascade, S0, the aligned models.

    Args:
        start: whose prompts all are asked; without a start model, the first aligned one.
    """
    teacher, heard = once_per_model(partial(instantiate, cfg.teacher)), SpeechCache()

    def frozen(model: RBASpeechLM) -> FrozenPolicy:
        size = cfg.evaluation.generation_batch_size
        return FrozenPolicy(model=model, generation_batch_size=size, speech_cache=heard)

    def reader(how: Decoding) -> System:
        return TeacherSystem(name="teacher", teacher=teacher, params=how.params)

    def cascade() -> Callable[[Decoding], System]:
        policy = frozen(start)
        return lambda how: CascadeSystem(
            name="cascade", policy=policy, teacher=teacher, encoder=start.prompt, params=how.params,
            transcribe_context=how.transcribe_context, transcribe_params=how.transcribe_params,
        )  # fmt: skip

    def hearer(name: str, model: RBASpeechLM) -> Callable[[Decoding], System]:
        policy = frozen(model)
        return lambda how: PolicySystem(name=name, policy=policy, params=how.params)

    def aligned(arm: str) -> Callable[[Decoding], System]:
        model = start if arm == known else instantiate(model_config(cfg, files[arm]))
        check_same_prompts(arm, model.prompt, start.prompt)
        return hearer(arm, model)

    known = None if has_start(cfg) else next(iter(files))  # the model that is there already
    before = {"start": lambda: hearer("start", start)} if has_start(cfg) else {}
    return {"teacher": lambda: reader, "cascade": cascade} | before | {arm: partial(aligned, arm) for arm in files}


def model_config(cfg: DictConfig, path: Path) -> DictConfig:
    """How to make the model of a ``.nemo`` or a SALM folder, laid out and computed as the start model is."""
    if path.is_dir():
        return OmegaConf.merge(cfg.model, {"folder": str(path)})
    restored = {"_target_": f"{RBASpeechLM.__module__}.{RBASpeechLM.__name__}.restore_from", "restore_path": str(path)}
    return OmegaConf.create(restored | layout(cfg))


def check_same_prompts(arm: str, prompt: PromptEncoder, asked: PromptEncoder) -> None:
    """Refuse a model that would read other words into the prompts, which are those of the start model.

    Raises:
        ValueError: tokenizer or prompt format are not the start model's.
    """
    probe = Instruction(id="", text="Say: 42 Äpfel, please!", response="", task="", context="Now:")
    ways = [(p.encode_prompt(probe), p.encode_typed(probe), p.encode_response("It is 42.")) for p in (prompt, asked)]
    if ways[0] != ways[1]:
        raise ValueError(
            f"aligned model {arm!r} has another tokenizer or prompt format than the start model, whose prompts all are "
            "asked: evaluate it by itself, with a start model of its own kind"
        )


def evaluate(
    cfg: DictConfig, sets: dict[str, HeldOut], files: dict[str, Path], folder: Path
) -> list[Prediction]:  # fmt: skip
    """Stage d: every system answers every held-out set; goes on where an interrupted run stopped.

    What the student heard of the items that are to be played is kept in ``folder / "sounds"``.
    """
    start = instantiate(cfg.model)
    held_out = tasks(cfg, sets, folder, start)
    predictions = _answers(cfg, sets, held_out, systems(cfg, start, files), fingerprints(cfg, files), folder)
    keep_accounts([task for task, _ in held_out], folder)
    if parallel.rank() == 0:
        _keep_sounds(cfg, sets, predictions, roles(cfg, list(files)), folder, start)
    return predictions


def answer(cfg: DictConfig, sets: dict[str, HeldOut], name: str, file: Path, folder: Path) -> None:
    """One aligned model's part of ``evaluate``, which finds its answers there: several processes, as many models."""
    start, files = instantiate(cfg.model), {name: file}
    mine = {name: systems(cfg, start, files)[name]}
    _answers(cfg, sets, tasks(cfg, sets, folder, start), mine, fingerprints(cfg, files), folder)


def _answers(
    cfg: DictConfig, sets: dict[str, HeldOut], held_out: list, asked: dict[str, Callable], weights: dict, folder: Path
) -> list[Prediction]:  # fmt: skip
    predictions, usual, walked = [], decoding_of(cfg.evaluation), {}
    speakers = {name: one.speakers() for name, one in sets.items()}
    for build in asked.values():
        told = cache(build())  # a decoding -> who answers so: a teacher remembers what it has read
        for task, basis in held_out:
            system = told(sets[task.name].decoding or usual)
            if is_asked(system.name, sets[task.name]):
                predictions += run(system, task, folder, basis | weights[system.name], speakers[task.name], walked)
    return predictions


def is_asked(system: str, held_out: HeldOut) -> bool:
    """Everybody is, but for a cascade that would have nothing to hear."""
    return not (held_out.typed and system == "cascade")


def keep_accounts(asked: list[ItemTask], folder: Path) -> None:
    """What scoring has cost on all ranks, for the report: ``accounts.json``, {} where nothing is paid for."""
    mine = {task.name: task.account() for task in asked if isinstance(task, Accounted)}
    total: dict[str, Counter] = {name: Counter() for name, account in mine.items() if account}
    for (accounts,) in parallel.data_parallel_lists([mine]):
        for name, sums in total.items():
            sums.update(accounts[name])
    if parallel.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ACCOUNTS).write_text(json.dumps(total, indent=2) + "\n")


def roles(cfg: DictConfig, arms: list[str]) -> Roles:
    """Who is who among the systems that ``evaluate`` asked."""
    labels = {"teacher": "Teacher reads the text (T)", "cascade": "Cascade"}
    labels |= {"start": "Start (S0)"} if has_start(cfg) else {}
    labels |= {arm: LABELS.get(arm, arm) for arm in arms}
    mine = [labels[arm] for arm in arms]
    return Roles(systems=labels, teacher=labels["teacher"], start=labels.get("start"), arms=mine)


def _sound_files(
    cfg: DictConfig, sets: dict[str, HeldOut], predictions: list[Prediction], who: Roles, folder: Path
) -> dict[str, dict[str, Path]]:
    """Condition -> id -> file, of the items that are to be played."""
    heard = [prediction for prediction in predictions if not sets[prediction.task].typed]
    chosen = choose_items(heard, who, cfg.evaluation.num_sounds, cfg.seed)
    return {
        name: {id: folder / "sounds" / name / f"{quote(id, safe='')}.flac" for id in ids}
        for name, ids in chosen.items()
    }


def _keep_sounds(
    cfg: DictConfig, sets: dict[str, HeldOut], predictions: list[Prediction], who: Roles, folder: Path,
    model: RBASpeechLM,
) -> None:  # fmt: skip
    for name, files in _sound_files(cfg, sets, predictions, who, folder).items():
        dataset = _loader(cfg, sets[name], folder, model).dataset
        for cut in read_manifest(sets[name].manifest) if files else ():
            item = dataset.load(cut) if cut.id in files else None  # None too if unusable by now: it is in quarantine
            if item is not None:
                files[cut.id].parent.mkdir(parents=True, exist_ok=True)
                soundfile.write(files[cut.id], item.audio.numpy(), model.sampling_rate, subtype="PCM_16")


def _read_sound(path: Path) -> Sound:
    samples, sampling_rate = soundfile.read(path, dtype="float32")
    return Sound(waveform=torch.from_numpy(samples), sampling_rate=sampling_rate)


def report(
    cfg: DictConfig, predictions: list[Prediction], sets: dict[str, HeldOut], arms: list[str], folder: Path,
    trained: dict, told: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Stage e: tables, plots and a verdict, and a page of all items.

    Args:
        trained: what to say of how the arms were made, see ``training``.
        told: what to say of where the answers come from, in the place of what the config says.
    """
    if parallel.rank() > 0:
        return
    who, source = roles(cfg, arms), identity(cfg, sets, arms) | weights(sets, arms, folder) | dict(told or {})
    accounts = folder / ACCOUNTS
    sounds = {
        name: {id: _read_sound(path) for id, path in files.items() if path.exists()}
        for name, files in _sound_files(cfg, sets, predictions, who, folder).items()
    }
    page = write_browser(
        folder=folder, title=f"{cfg.name}: all items", roles=who, predictions=predictions, sounds=sounds,
        identity=source,
    )  # fmt: skip
    write_report(
        folder=folder,
        title=f"{cfg.name}: how well spoken instructions are followed",
        roles=who,
        predictions=predictions,
        **trained,
        held_out=sets,
        notes=list(dict.fromkeys([*cfg.evaluation.notes, *(note for one in sets.values() for note in one.notes)])),
        num_samples=cfg.evaluation.num_samples,
        num_draws=cfg.evaluation.num_draws,
        seed=cfg.seed,
        identity=source,
        samples_page=page.name,
        accounts=json.loads(accounts.read_text()) if accounts.exists() else None,
    )


def weights(sets: dict[str, HeldOut], arms: list[str], folder: Path) -> dict[str, str]:
    """Whose answers these are, by the digests that the files of answers have; {} where they tell nothing."""
    bases = {system: read_answers(system, next(iter(sets)), folder).basis for system in ("start", *arms)}
    told = [f"{system} {basis['weights']}" for system, basis in bases.items() if "weights" in basis]
    return {"weights, SHA-256": ", ".join(told)} if told else {}


def training(cfg: DictConfig, folders: dict[str, Path]) -> dict:
    """Training curves and budget of the arms, for the report."""
    clips = clips_heard(cfg, cfg.trainer.max_steps)
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
