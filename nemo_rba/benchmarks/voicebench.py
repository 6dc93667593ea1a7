# SPDX-License-Identifier: Apache-2.0
"""VoiceBench (arXiv 2410.17196) and Speech-IFEval (arXiv 2505.19037): spoken instructions of many kinds."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from nemo_rba.benchmarks import tables
from nemo_rba.benchmarks.audio import read_embedded, read_file
from nemo_rba.benchmarks.benchmark import (
    UNKNOWN_SPEAKER,
    Unusable,
    numbered,
    read_constraints,
    require_choice,
    require_files,
    require_words,
    split_answers,
    usable,
)
from nemo_rba.types import Instruction, Utterance

REGIONS = ("aus", "gbr", "ind_n", "ind_s", "irl", "kenya", "nga", "nzl", "phl", "usa", "zaf")  # of sd-qa's speakers
DOMAINS = ("biology", "business", "chemistry", "economics", "engineering", "health", "history", "law", "other",
           "philosophy", "physics", "psychology")  # fmt: skip
VOICES = tuple(
    f"en_{voice}_0.0_0.0"
    for voice in (
        "AU_Wavenet_A_1.0",
        "AU_Wavenet_B_1.0",
        "GB_Wavenet_A_1.0",
        "GB_Wavenet_B_1.0",
        "IN_Wavenet_A_1.0",
        "IN_Wavenet_B_1.0",
        "US_Wavenet_A_0.5",
        "US_Wavenet_A_1.0",
        "US_Wavenet_A_1.5",
        "US_Wavenet_A_2.0",
        "US_Wavenet_C_1.0",
    )
)  # of alpacaeval_speaker: region, voice, speed, pitch, volume
SPLITS = {
    **dict.fromkeys(("alpacaeval", "alpacaeval_full", "commoneval", "wildvoice", "advbench", "ifeval", "bbh",
                     "openbookqa", "mtbench"), ("test",)),
    "alpacaeval_speaker": VOICES,
    "sd-qa": REGIONS,
    "mmsu": DOMAINS,
}  # fmt: skip
MEASURES = {
    **dict.fromkeys(SPLITS, "judge"),
    **dict.fromkeys(("openbookqa", "mmsu"), "multiple_choice"),
    **{"sd-qa": "spoken_qa", "ifeval": "ifeval", "advbench": "refusal", "bbh": "bbh"},
}
LETTERS = ("A", "B", "C", "D")
_COLUMNS = {
    **dict.fromkeys(SPLITS, ("audio", "prompt")),
    **dict.fromkeys(("sd-qa", "openbookqa", "mmsu"), ("audio", "prompt", "reference")),
    "bbh": ("audio", "prompt", "id", "reference"),
    "ifeval": ("audio", "prompt", "key", "instruction_id_list", "kwargs"),
    "mtbench": ("audio1", "turns", "reference", "category", "question_id"),
}
_OPTION = re.compile(r"^([A-D])\.\s(.+)$", re.MULTILINE)  # "A. a marsh"
_SPAN = re.compile(r"\[\d\d:\d\d:\d\d - \d\d:\d\d:\d\d\]")
_TRAITS = re.compile(r"\(Gender: [^()]*\)")


class VoiceBench:
    """One subset of the Hugging Face data set ``hlt-lab/voicebench``, as it is stored: ``<subset>/<split>-*.parquet``.

    Sources: the data set's card (``audio`` and ``prompt`` in all subsets but one; splits of sd-qa and mmsu), and the
    fields that the authors' evaluators read (github.com/MatthewCYM/VoiceBench, ``src/evaluator``: ``reference`` of
    sd-qa, openbookqa, mmsu and bbh, ``id`` of bbh, whose name says which task it is, ``key``, ``instruction_id_list``
    and ``kwargs`` of ifeval). Multiple-choice prompts hold their options as lines ``A. a marsh``; where a prompt has
    other lines, its options are called ``option A`` and so on.

    The splits of alpacaeval_speaker (alpacaeval_full in other synthetic voices) and the columns of mtbench (``turns``,
    their sound in ``audio1`` and ``audio2``, ``reference`` for some) are those that NeMo-Skills reads
    (``nemo_skills/dataset/voicebench/prepare.py``). Of mtbench the first turns are asked, as there: a prompt has one
    clip. The others are counted. The authors have no protocol for them (their issue 3).

    Args:
        folder: the data set's own folder.
        subset: a key of ``SPLITS``.
        splits: of the subset, as regions of sd-qa or domains of mmsu; [] for all.
        sampling_rate: Hz of the utterances.

    Raises:
        ValueError: an unknown subset or split, missing shards, or missing columns.
    """

    name = "voicebench"

    def __init__(self, *, folder: str, subset: str, splits: Sequence[str], sampling_rate: int):
        require_choice(self.name, "subset", subset, SPLITS)
        for split in splits:
            require_choice(self.name, f"splits ({subset})", split, SPLITS[subset])
        self._subset, self._sampling_rate = subset, sampling_rate
        self.measure = {"evaluation": MEASURES[subset]}
        place = Path(folder) / subset
        self._shards = {s: tables.find_shards(place, s, ".parquet") for s in splits or SPLITS[subset]}
        files = [path for shards in self._shards.values() for path in shards]
        require_files(self.name, Path(folder), files, "hlt-lab/voicebench")
        self._columns = _COLUMNS[subset]
        for path in files:
            tables.require_columns(self.name, path, self._columns)
        self.counts: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Utterance]:
        return usable(self._rows(), self._utterance, self.counts)

    def _rows(self) -> Iterator[tuple[str, tuple[str, dict]]]:
        for split, shards in self._shards.items():
            rows = numbered(f"{self.name}-{self._subset}-{split}", tables.parquet_rows(shards, self._columns))
            for identity, row in rows:
                for asked in _turns(row):
                    turn = asked.get("turn", 1)
                    yield identity if turn == 1 else f"{identity}-turn-{turn}", (split, asked)

    def _utterance(self, identity: str, place: tuple[str, dict[str, Any]]) -> Utterance:
        split, row = place
        if row.get("turn", 1) > 1:
            raise Unusable("a turn after the first", "a prompt has one clip, and no answer before it")
        text = require_words(row["prompt"])
        response, extra = _expected(self._subset, row)
        return Utterance(
            instruction=Instruction(
                id=identity,
                text=text,
                response=response,
                task=_family(self._subset, split, row),
                extra=extra,
            ),
            audio=read_embedded(row["audio"], self._sampling_rate),
            sampling_rate=self._sampling_rate,
            speaker=UNKNOWN_SPEAKER,
        )


def _turns(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What is asked in a row: the row itself, but of a conversation each turn (the first one is said in ``audio1``)."""
    if "turns" not in row:
        yield row
        return
    turns, references = (
        [found] if isinstance(found, str) else found or [] for found in (row["turns"], row["reference"])
    )
    for number, words in enumerate(turns):
        answer = (references[number] if number < len(references) else None) or ""
        yield {**row, "turn": number + 1, "audio": row["audio1"], "prompt": words, "reference": answer}


def _family(subset: str, split: str, row: Mapping[str, Any]) -> str:
    if subset == "mtbench":
        return f"{subset}-{row['category']}"
    return subset if len(SPLITS[subset]) == 1 else f"{subset}-{split}"


def _expected(subset: str, row: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(response, extra) of a row."""
    if subset == "ifeval":
        return "", {"key": row["key"], **read_constraints(row)}
    if subset == "mtbench":
        return row["reference"], {key: row[key] for key in ("question_id", "category")}
    if "reference" not in row:
        return "", {}
    response, _ = split_answers([row["reference"]])
    if subset == "bbh":
        return response, {"id": row["id"]}
    if subset == "sd-qa":
        return response, {}
    if response not in LETTERS:
        raise Unusable("reference is no option", repr(response))
    options = _OPTION.findall(row["prompt"])
    if tuple(letter for letter, _ in options) != LETTERS:
        return response, {"options": [f"option {letter}" for letter in LETTERS]}
    return response, {"options": [text.strip() for _, text in options]}


class SpeechIFEval:
    """One file of Speech-IFEval: speech with a typed instruction that says what to do with it, and in which form.

    Source: github.com/kehanlu/Speech-IFEval, README (folders ``eval_data`` and ``audios``) and
    ``data/eval_data/*.jsonl`` (``audio_filepath``, ``textual_audio``, ``instruction``, ``dataset``, ``metric``;
    ``label`` in the closed-ended files; ``instruction_id_list`` and ``kwargs`` where the form can be checked).
    ``textual_audio`` is what the authors give to a model that only reads, as ``Speech Input: [00:00:00 - 00:00:05] the
    words(Gender: Male, Emotion: sad)``; it becomes ``typed``, and the words in it ``text``. They were recognised by a
    machine. The tasks are the sources of the speech.

    Args:
        folder: the repository's ``data``, with ``audios.tar`` unpacked in it.
        subset: closed_ended_questions, closed_ended_questions-woprompt, creative_writing or chain-of-thought.
        sampling_rate: Hz of the utterances.

    Raises:
        ValueError: an unknown subset, missing files, the sound files included, or damaged ones.
    """

    name = "speech_ifeval"
    measure: ClassVar = {"evaluation": "ifeval"}
    subsets = ("closed_ended_questions", "closed_ended_questions-woprompt", "creative_writing", "chain-of-thought")
    _columns = ("audio_filepath", "textual_audio", "instruction", "dataset", "metric")

    def __init__(self, *, folder: str, subset: str, sampling_rate: int):
        require_choice(self.name, "subset", subset, self.subsets)
        self._subset, self._sampling_rate = subset, sampling_rate
        index, self._audios = Path(folder) / "eval_data" / f"{subset}.jsonl", Path(folder) / "audios"
        origin = "data/ of github.com/kehanlu/Speech-IFEval with audios.tar unpacked"
        require_files(self.name, Path(folder), [index], origin)
        self._items = tables.read_json_rows(self.name, index, self._columns)
        require_files(self.name, Path(folder), [self._audios / row["audio_filepath"] for row in self._items], origin)
        self.counts: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Utterance]:
        return usable(numbered(f"{self.name}-{self._subset}", self._items), self._utterance, self.counts)

    def _utterance(self, identity: str, row: Mapping[str, Any]) -> Utterance:
        kept = {key: row[key] for key in ("dataset", "metric", "audio_filepath", "id", "key") if key in row}
        if "instruction_id_list" in row:
            kept |= read_constraints(row)
        return Utterance(
            instruction=Instruction(
                id=identity,
                text=require_words(_TRAITS.sub("", _SPAN.sub("", row["textual_audio"]))),
                response=row.get("label", ""),
                task=row["dataset"],
                typed=f"Speech Input: {row['textual_audio']}",
                context=require_words(row["instruction"]),
                extra=kept,
            ),
            audio=read_file(self._audios / row["audio_filepath"], self._sampling_rate),
            sampling_rate=self._sampling_rate,
            speaker=UNKNOWN_SPEAKER,
        )
