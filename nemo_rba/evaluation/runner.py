# SPDX-License-Identifier: Apache-2.0
"""Ask a system every item of a task and keep what it said: ``<output>/<task>/<system>.jsonl``.

The file's first line says who was asked, what, and how it decoded; every further line is one ``Prediction``. Lines are
written batch by batch, so an interrupted run goes on where it stopped; a line cut off by the interruption is dropped.
Scores in the file are for people: they are computed anew on every run, so a corrected verifier needs no new answers.

The file's first line also says what else the answers depend on, as far as the caller tells: weights, and how the items
reach the system. Where that has changed the answers are another's, and a run refuses to go on with them. ``rescore``
needs neither system nor sound: it scores what is there.

With several ranks all call ``run`` and all get all predictions. Each data-parallel rank asks its share of the items and
writes a file of its own (``<system>.rank-<r>.jsonl`` from the second on); all read all files, so a run may go on with
another number of ranks.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from types import MappingProxyType

from tqdm import tqdm

from nemo_rba.distributed.parallel import barrier, data_parallel_lists, data_parallel_rank, model_parallel_rank, rank
from nemo_rba.evaluation.measures import Statistics, item_share
from nemo_rba.evaluation.systems import System
from nemo_rba.evaluation.tasks import Batched, ItemTask, SeveralMeasures
from nemo_rba.types import Instruction, SpeechBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One system's answer to one item, scored. Made by ``run``, read by ``results.py``."""

    system: str
    task: str  # the condition, ``ItemTask.name``
    measure: str  # "score" or "wer"
    id: str
    family: str
    kind: str
    context: str
    text: str  # the words spoken
    speaker: str = ""  # of the item, also for those who read it; "" where nobody speaks, or it is not told
    heard: str  # the words the system answered to: ``text``, except for a cascade
    reference: str  # the teacher's answer in the manifest
    response: str
    truncated: bool
    value: float  # the item's share of the measure: sum of values / sum of weights, in percent
    weight: float
    statistics: Statistics = field(default_factory=dict)  # of all measures, the task's own first; {} where it has one


def run(
    system: System, task: ItemTask, output: str | Path, basis: Mapping[str, object] = MappingProxyType({}),
    speakers: Mapping[str, str] = MappingProxyType({}), walked: dict[str, list[Instruction]] | None = None,
) -> list[Prediction]:  # fmt: skip
    """Every item of ``task`` answered by ``system``, in the task's order; goes on with what ``output`` already has.

    Args:
        basis: what else the answers depend on: a fingerprint of the weights, how items are heard; plain JSON.
        speakers: id -> who speaks the item, see ``HeldOut.speakers``; of others, what the file says is kept.
        walked: task name -> this rank's items in order, noted when a task has been gone through. Given to the calls for
            several systems, those who have answered all of them cost no second reading of the clips.

    Raises:
        ValueError: the file belongs to another system, task, decoding or basis; an item has changed since; two items
            share an id; the system did not answer every prompt of a batch exactly once.
    """
    folder, name = Path(output) / _file_name(task.name, "task"), _file_name(system.name, "system")
    header = {"system": system.name, "task": task.name, "measure": task.measure, "decoding": dict(system.decoding),
              "basis": dict(basis)}  # fmt: skip
    share = data_parallel_rank()
    log = _PredictionLog(folder / (f"{name}.jsonl" if share == 0 else f"{name}.rank-{share}.jsonl"), header)
    others = [_PredictionLog(path, header) for path in sorted(folder.glob(f"{name}.rank-*.jsonl"))]
    earlier = [_PredictionLog(folder / f"{name}.jsonl", header), *others]
    answered = {prediction.id: prediction for file in earlier for prediction in file.read()}
    barrier()  # all have read before one writes
    known = (walked or {}).get(task.name)
    if known and all(item.id in answered for item in known):
        mine = _kept(task, known, answered, log.path, speakers)
    else:
        mine, items = _answers(system, task, log, answered, speakers)
        if walked is not None:
            walked[task.name] = items
    predictions: dict[str, Prediction] = {}
    for batch in zip_longest(*data_parallel_lists(mine)):  # ranks take turns in the task's order
        for prediction in batch:
            if prediction is not None and prediction.id in predictions:
                raise ValueError(f"task {task.name!r} has two items with id {prediction.id!r}, expected unique ids")
            if prediction is not None:
                predictions[prediction.id] = prediction
    return list(predictions.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedAnswers:
    """What ``run`` has kept of one system on one task."""

    path: Path
    decoding: Mapping[str, object]  # {} where nothing was kept
    basis: Mapping[str, object]  # as ``run`` was told; {} where nothing was
    predictions: Mapping[str, Prediction]  # id -> prediction, scored as it was then


def read_answers(system: str, task: str, output: str | Path) -> SavedAnswers:
    """The answers of one system to one task, of all ranks; without any where there is no file.

    Raises:
        ValueError: a file is of another system or task, or ranks decoded differently.
    """
    folder, name = Path(output) / _file_name(task, "task"), _file_name(system, "system")
    found, decoding, basis = {}, {}, {}
    for path in (folder / f"{name}.jsonl", *sorted(folder.glob(f"{name}.rank-*.jsonl"))):
        header, predictions = _PredictionLog.content(path)
        if header is None:
            continue
        owner = {"system": system, "task": task, "decoding": decoding or header["decoding"]}
        if {key: header[key] for key in owner} != owner:
            raise ValueError(f"{path} belongs to {header}, expected {owner}: name the folder that the answers are in")
        decoding, basis = header["decoding"], header.get("basis", {})
        found |= {prediction.id: prediction for prediction in predictions}
    return SavedAnswers(path=folder / f"{name}.jsonl", decoding=decoding, basis=basis, predictions=found)


def rescore(
    saved: SavedAnswers, task: ItemTask, items: Sequence[Instruction],
    speakers: Mapping[str, str] = MappingProxyType({}),
) -> list[Prediction]:  # fmt: skip
    """What ``run`` would return for these items, all of which were answered: nobody is asked, except a judge.

    Args:
        speakers: as for ``run``.

    Raises:
        ValueError: an item has changed since.
    """
    scored = _kept(task, items, saved.predictions, saved.path, speakers)
    return [replace(prediction, measure=task.measure) for prediction in scored]


def _kept(
    task: ItemTask, items: Sequence[Instruction], answered: Mapping[str, Prediction], path: Path,
    speakers: Mapping[str, str],
) -> list[Prediction]:  # fmt: skip
    """Today's scores of answers that are there."""
    if isinstance(task, Batched):
        task.prepare([(item, answered[item.id].response) for item in items])
    return [_scored(answered[item.id], task, item, path, speakers) for item in items]


def _answers(
    system: System, task: ItemTask, log: "_PredictionLog", answered: dict[str, Prediction], speakers: Mapping[str, str]
) -> tuple[list[Prediction], list[Instruction]]:  # fmt: skip
    """This rank's predictions and their items, in its order; what is new is written as it comes."""
    predictions, items = [], []
    writes = model_parallel_rank() == 0
    for batch in tqdm(task.batches(), desc=f"{system.name} on {task.name}", unit="batch", disable=rank() > 0):
        missing = [item for item in batch.instructions if item.id not in answered]
        if isinstance(task, Batched):  # scored anew, but all at once
            task.prepare([(i, answered[i.id].response) for i in batch.instructions if i.id in answered])
        fresh = {p.id: p for p in _predict(system, task, batch, speakers)} if missing else {}
        if writes and missing:
            log.append([fresh[item.id] for item in missing])
        for item in batch.instructions:
            kept = answered[item.id] if item.id in answered else fresh[item.id]
            predictions.append(_scored(kept, task, item, log.path, speakers))
        items += batch.instructions
    return predictions, items


class _PredictionLog:
    """The file of one system on one task. Nothing is written, or repaired, before the first ``append``."""

    def __init__(self, path: Path, header: dict):
        self.path = path
        self.header = json.loads(json.dumps(header))  # as it will come back
        self.is_open = False

    def read(self) -> list[Prediction]:
        """Predictions already there; nothing if the file does not exist or not even its header was finished."""
        found, predictions = self.content(self.path)
        if found is not None and found != self.header:
            raise ValueError(
                f"{self.path} holds answers of something else: {_differences(found, self.header)}. Use a new output "
                "folder, or delete the file"
            )
        return predictions

    @classmethod
    def content(cls, path: Path) -> tuple[dict | None, list[Prediction]]:
        """Header and predictions of a file; no header if it does not exist or not even that was finished."""
        lines = cls._whole_lines(path)
        if not lines:
            return None, []
        return json.loads(lines[0]), [Prediction(**json.loads(line)) for line in lines[1:]]

    def append(self, predictions: Sequence[Prediction]) -> None:
        if not self.is_open:
            self._open()
        with self.path.open("ab") as file:
            file.writelines(_line(asdict(prediction)) for prediction in predictions)

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = self._whole_lines(self.path) or [_line(self.header)]
        with self.path.open("wb") as file:  # without a line that an interruption has cut off
            file.writelines(whole)
        self.is_open = True

    @staticmethod
    def _whole_lines(path: Path) -> list[bytes]:
        if not path.exists():
            return []
        return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def _differences(found: Mapping, expected: Mapping) -> str:
    """What two headers disagree in, in words."""
    flat = [{key: value for key, value in header.items() if not isinstance(value, dict)}
            | {f"{key} {inner}": value for key in header if isinstance(header[key], dict)
               for inner, value in header[key].items()} for header in (found, expected)]  # fmt: skip
    names = [key for key in {**flat[0], **flat[1]} if flat[0].get(key) != flat[1].get(key)]
    return "; ".join(f"{key} was {flat[0].get(key)!r}, expected {flat[1].get(key)!r}" for key in names)


def _predict(
    system: System, task: ItemTask, batch: SpeechBatch, speakers: Mapping[str, str]
) -> Iterator[Prediction]:  # fmt: skip
    rollouts = sorted(system.answer(batch), key=lambda rollout: rollout.prompt_index)
    if [rollout.prompt_index for rollout in rollouts] != list(range(len(batch))):
        raise ValueError(
            f"system {system.name!r} answered prompts {[rollout.prompt_index for rollout in rollouts]}, expected each "
            f"of 0..{len(batch) - 1} once"
        )
    if isinstance(task, Batched):
        task.prepare([(item, rollout.response) for item, rollout in zip(batch.instructions, rollouts, strict=True)])
    for item, rollout in zip(batch.instructions, rollouts, strict=True):
        yield Prediction(
            system=system.name,
            task=task.name,
            measure=task.measure,
            id=item.id,
            family=item.task,
            kind=task.kind(item),
            context=item.context,
            text=item.text,
            speaker=speakers.get(item.id, ""),
            heard=rollout.instruction.text,
            reference=item.response,
            response=rollout.response,
            truncated=rollout.truncated,
            **_shares(task, item, rollout.response),
        )


def _scored(
    prediction: Prediction, task: ItemTask, item: Instruction, path: Path, speakers: Mapping[str, str]
) -> Prediction:  # fmt: skip
    """``prediction`` with today's score, if it still belongs to ``item``."""
    if (prediction.context, prediction.text) != (item.context, item.text):
        raise ValueError(
            f"{path}: item {item.id!r} was {prediction.text!r} (context {prediction.context!r}), but now the manifest "
            f"has {item.text!r} (context {item.context!r}): use a new output folder for a new manifest"
        )
    shares = _shares(task, item, prediction.response)
    speaker = speakers.get(item.id, prediction.speaker)
    return replace(
        prediction, family=item.task, kind=task.kind(item), speaker=speaker, reference=item.response, **shares
    )


def _shares(task: ItemTask, item: Instruction, response: str) -> dict:
    """What an answer adds to the scores: the last fields of ``Prediction``."""
    statistics = dict(task.statistics(item, response)) if isinstance(task, SeveralMeasures) else {}
    value, weight = item_share(statistics) if statistics else task.item(item, response)
    return {"value": value, "weight": weight, "statistics": statistics}


def _line(record: dict) -> bytes:
    return (json.dumps(record, ensure_ascii=False) + "\n").encode()


def _file_name(name: str, what: str) -> str:
    if not re.fullmatch(r"[\w][\w .,()+=-]*", name):
        raise ValueError(f"{what} name {name!r} becomes a file name, expected letters, digits and ' .,()+=-_' only")
    return name
