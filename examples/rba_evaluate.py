# SPDX-License-Identifier: Apache-2.0
"""Evaluate aligned models, .nemo files or SALM folders: the last stage of the main job, alone.

python examples/rba_evaluate.py --config-name=rba_eval model=model.nemo 'tasks=[llama_shar, fleurs_shar]'
python examples/rba_evaluate.py aligned=model.nemo manifest=shar_folder   # model= is short for aligned=
python examples/rba_evaluate.py aligned=salm_folder 'tasks={llama: {manifest: llama_shar, evaluation: spoken_qa}}'
python examples/rba_evaluate.py 'aligned={rba: a.nemo, sft: b.nemo}' manifest=shar_folder   # the first is on trial
python examples/rba_evaluate.py aligned=salm_folder start=false manifest=shar_folder teacher=self   # one model alone
python examples/rba_evaluate.py aligned=model.nemo manifest=shar_folder saved=true   # scores what is there, anew
"""

import json
import sys
from collections import Counter
from pathlib import Path

import recipe
import recipe_checks
import recipe_conditions
import recipe_evaluation
import recipe_identity
import torch
from hydra.errors import InstantiationException
from nemo.core.config import hydra_runner
from nemo.utils import logging
from omegaconf import DictConfig, OmegaConf

from nemo_rba.evaluation.conditions import HeldOut
from nemo_rba.evaluation.runner import Prediction, SavedAnswers, read_answers, rescore
from nemo_rba.manifest import cut_to_instruction, read_manifest
from nemo_rba.types import Instruction

OTHERS = ("teacher", "cascade", "start")  # who is asked beside the aligned models; of them the start if cfg.start
MODELS = Path(__file__).parent.parent / "conf" / "model"  # how a start model can be made


def respelled(arguments: list[str]) -> list[str]:
    """``model=x.nemo`` is ``aligned=x.nemo``: Hydra would look for a conf/model/x.nemo.yaml."""
    options = {path.stem for path in MODELS.glob("*.yaml")}
    return [
        f"aligned={argument.removeprefix('model=')}"
        if argument.startswith("model=") and argument.removeprefix("model=") not in options
        else argument
        for argument in arguments
    ]


def aligned_models(cfg: DictConfig) -> dict[str, Path]:
    """Name -> path of what is to be evaluated, the one on trial first.

    Raises:
        ValueError: there is none, or a name is another's already.
    """
    given = OmegaConf.select(cfg, "aligned")
    if not given:
        raise ValueError("aligned is not set; expected a .nemo, a SALM folder, or name -> path of several")
    if not isinstance(given, DictConfig):
        given = {Path(given).stem: given}
    labels = [recipe_evaluation.LABELS.get(name, name) for name in given]
    twice = [name for name, label in zip(given, labels, strict=True) if name in OTHERS or labels.count(label) > 1]
    if twice:
        raise ValueError(
            f"aligned names models {twice}, but something else is called so in the report; expected names of their own "
            f"(not {', '.join(OTHERS)}): give aligned={{name: path}}"
        )
    return {str(name): Path(str(path)) for name, path in given.items()}


def held_out_sets(cfg: DictConfig) -> dict[str, HeldOut]:
    """Name -> condition: those of ``tasks``, and ``manifest`` under its own name.

    Raises:
        ValueError: there is none, or two have one name; as ``recipe_conditions.benchmark_sets``.
    """
    sets = recipe_conditions.benchmark_sets(cfg)
    if cfg.manifest is not None:
        name = Path(cfg.manifest).stem
        if name in sets:
            raise ValueError(
                f"manifest is called {name!r} as one of tasks is; expected two names: change that in tasks"
            )
        sets[name] = HeldOut(manifest=Path(cfg.manifest))
    if not sets:
        raise ValueError("nothing to evaluate on: give manifest=..., or tasks={name: {manifest: ..., evaluation: ...}}")
    return sets


def check_files(cfg: DictConfig, files: dict[str, Path], sets: dict[str, HeldOut]) -> None:
    """Stop before any work where something is named that is not there, or a measure lacks a setting.

    Saved answers need the manifests alone.

    Raises:
        ValueError: all that is missing, and what to do.
    """
    needed = {f"manifest of {name}": held_out.manifest for name, held_out in sets.items()}
    start = OmegaConf.select(cfg, "model.restore_path")
    missing = [line for line in recipe_checks.unset(cfg) if line.startswith("evaluation.")]
    missing += recipe_checks.unfit(cfg.evaluation, "evaluation")
    if not cfg.saved:
        needed |= {f"aligned model {name}": path for name, path in files.items()}
        needed |= {"start model": Path(start)} if start else {}
        missing += recipe_checks.missing(cfg)
        if start and (folders := [name for name, path in files.items() if path.is_dir()]):
            missing.append(
                f"aligned: {', '.join(folders)} are SALM folders, but model=nemo reads .nemo files; start from a "
                "folder, with model=salm model.folder=..."
            )
    missing += [f"{what}: there is no {path}; name another" for what, path in needed.items() if not path.exists()]
    missing += recipe_evaluation.unmeasurable(cfg, sets) if not missing else []
    if missing:
        raise ValueError("nothing was started, because:\n" + "\n".join(f"  - {line}" for line in missing))


def saved_predictions(
    cfg: DictConfig, sets: dict[str, HeldOut], arms: list[str], folder: Path
) -> tuple[list[Prediction], dict[str, str]]:
    """What ``recipe_evaluation.evaluate`` would return, read and not asked for; and what to tell of it in the report.

    Items that the run has set aside (``quarantine.jsonl``), and that nobody has answered, are left out as they were.

    Raises:
        ValueError: items without an answer of everybody; a file of another system; an item that has changed since.
    """
    names = [name for name in (*OTHERS, *arms) if cfg.start or name != "start"]
    answers = {
        (system, name): read_answers(system, name, folder)
        for system in names
        for name, held_out in sets.items()
        if recipe_evaluation.is_asked(system, held_out)
    }
    _check_ways(sets, answers)
    items = _answered_items(sets, answers, folder)
    tasks = {name: recipe_evaluation.make_task(cfg, name, sets[name], list) for name in sets}
    speakers = {name: held_out.speakers() for name, held_out in sets.items()}
    predictions = [
        prediction
        for (_, name), saved in answers.items()
        for prediction in rescore(saved, tasks[name], items[name], speakers[name])
    ]
    recipe_evaluation.keep_accounts(list(tasks.values()), folder)
    return predictions, _told(cfg, sets, answers)


def _check_ways(sets: dict[str, HeldOut], answers: dict[tuple[str, str], SavedAnswers]) -> None:
    """Refuse, with a ``ValueError``, to call answers heard that were read, or heard through something else."""
    for (_, name), saved in answers.items():
        asked = sets[name].way
        if saved.basis and {key: saved.basis.get(key) for key in asked} != asked:
            raise ValueError(
                f"{saved.path} holds answers to items that came as {dict(saved.basis)}, but {name!r} is {asked} now: "
                "name the condition as it was, or run without saved=true in another output"
            )


def _answered_items(
    sets: dict[str, HeldOut], answers: dict[tuple[str, str], SavedAnswers], folder: Path
) -> dict[str, list[Instruction]]:
    """Condition -> its items in the manifest's order; those that everybody answered, or it is refused."""
    quarantine = folder / "quarantine.jsonl"
    rows = [json.loads(line) for line in quarantine.read_text().splitlines()] if quarantine.exists() else []
    reasons = {row["id"]: row["reason"] for row in rows}
    items, lacking, left_out = {}, [], Counter()
    for name, held_out in sets.items():
        cuts = list(read_manifest(held_out.manifest))
        saved = {system: kept.predictions for (system, task), kept in answers.items() if task == name}
        aside = {c.id for c in cuts if c.id in reasons and not any(c.id in known for known in saved.values())}
        left_out.update(f"{name}: {reasons[id]}" for id in aside)
        wanted = [cut for cut in cuts if cut.id not in aside]
        numbers = {system: sum(cut.id not in known for cut in wanted) for system, known in saved.items()}
        lacking += [f"{name}: {n} of {len(wanted)} answers of {system}" for system, n in numbers.items() if n]
        if not any(numbers.values()):
            items[name] = [cut_to_instruction(cut) for cut in wanted]
    if lacking:
        raise ValueError(
            f"{folder} lacks\n" + "\n".join(f"  - {line}" for line in lacking) + "\nRun without saved=true to ask for "
            "them, or name the models, sets and output of the run that is to be scored anew"
        )
    for reason, number in left_out.items():
        logging.warning(f"left out as in the run: {reason}: {number} items")
    return items


def _told(
    cfg: DictConfig, sets: dict[str, HeldOut], answers: dict[tuple[str, str], SavedAnswers]
) -> dict[str, str]:  # fmt: skip
    """Where saved answers come from, as far as they say so; the models are those that the config names."""
    usual = {place: saved for place, saved in answers.items() if sets[place[1]].decoding is None}
    told = {
        "answers": f"saved in {Path(cfg.output).name}, scored anew; start model and teacher as configured, not loaded"
    }
    told["decoding"], told["decoding of the cascade's transcript"] = _decoded(usual)
    for name in (name for name, one in sets.items() if one.decoding is not None):
        how, heard = _decoded({place: saved for place, saved in answers.items() if place[1] == name})
        told[f"decoding of {name}"] = f"{how}; of the cascade's transcript: {heard}"
    return told


def _decoded(answers: dict[tuple[str, str], SavedAnswers]) -> tuple[str, str]:
    """How answers, and a cascade's transcripts, were decoded as their files say; who differs is named."""
    systems: dict[str, list[str]] = {}  # how they decoded -> who
    heard = []
    for (system, name), saved in answers.items():
        own = {key: value for key, value in saved.decoding.items() if not key.startswith("transcribe_")}
        systems.setdefault(recipe_identity.in_words(own), []).append(f"{system} on {name}")
        heard.append(recipe_identity.in_words(saved.decoding.get("transcribe_params", {})))
    is_one = len(systems) == 1
    how = "; ".join(how if is_one else f"{', '.join(who)}: {how}" for how, who in systems.items())
    return how, "; ".join(dict.fromkeys(words for words in heard if words))


@hydra_runner(config_path="../conf", config_name="rba_eval")
def main(cfg: DictConfig) -> None:
    folder = Path(cfg.output)
    try:
        files, sets = aligned_models(cfg), held_out_sets(cfg)
        if not cfg.start:
            cfg.model = recipe_evaluation.model_config(cfg, next(iter(files.values())))
        check_files(cfg, files, sets)
        told = {"aligned models": ", ".join(f"{name} ({path.name})" for name, path in files.items())}
        if cfg.saved:
            torch.set_num_threads(cfg.num_threads)
            predictions, source = saved_predictions(cfg, sets, list(files), folder)
            told |= source
    except (ValueError, ImportError, InstantiationException) as problem:
        raise SystemExit(str(problem)) from None
    if not cfg.saved:
        recipe.start(cfg)
        predictions = recipe_evaluation.evaluate(cfg, sets, files, folder)
    recipe_evaluation.report(cfg, predictions, sets, list(files), folder, {"curves": None, "budget": {}}, told)
    logging.info(f"report: {folder / 'report.html'}")


if __name__ == "__main__":
    sys.argv[1:] = respelled(sys.argv[1:])
    main()
