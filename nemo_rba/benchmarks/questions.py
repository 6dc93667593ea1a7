# SPDX-License-Identifier: Apache-2.0
"""Questions with known answers, spoken (LLaMA questions, OpenAudioBench) and typed (TriviaQA, WebQuestions)."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from nemo_rba.benchmarks import tables
from nemo_rba.benchmarks.audio import read_file
from nemo_rba.benchmarks.benchmark import (
    UNKNOWN_SPEAKER,
    numbered,
    require_choice,
    require_files,
    require_words,
    split_answers,
    usable,
)
from nemo_rba.types import Instruction, Utterance


class LlamaQuestions:
    """The 300 LLaMA questions of Spectron (arXiv 2305.15255), as their authors publish them.

    Source: github.com/google-research-datasets/LLAMA1-Test-Set: ``llama_questions_300.tsv`` with the columns
    ``Questions``, ``Answer`` and ``Wav Filename``, in which quotation marks mean nothing, beside the sound files.

    Args:
        folder: the repository's folder.
        sampling_rate: Hz of the utterances.

    Raises:
        ValueError: missing files, the sound files included, or missing columns.
    """

    name = "llama_questions"
    measure: ClassVar = {"evaluation": "spoken_qa"}

    def __init__(self, *, folder: str, sampling_rate: int):
        self._folder, self._sampling_rate = Path(folder), sampling_rate
        index, origin = self._folder / "llama_questions_300.tsv", "google-research-datasets/LLAMA1-Test-Set"
        require_files(self.name, self._folder, [index], origin)
        self._items = list(tables.tsv_rows(self.name, index, ("Questions", "Answer", "Wav Filename")))
        require_files(self.name, self._folder, [self._folder / row["Wav Filename"] for row in self._items], origin)
        self.counts: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Utterance]:
        return usable(numbered(self.name, self._items), self._utterance, self.counts)

    def _utterance(self, identity: str, row: Mapping[str, str]) -> Utterance:
        response, aliases = split_answers([row["Answer"]])
        return Utterance(
            instruction=Instruction(
                id=identity,
                text=require_words(row["Questions"]),
                response=response,
                task=self.name,
                aliases=aliases,
                extra={"file": row["Wav Filename"]},
            ),
            audio=read_file(self._folder / row["Wav Filename"], self._sampling_rate),
            sampling_rate=self._sampling_rate,
            speaker=UNKNOWN_SPEAKER,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Columns:
    """Where OpenAudioBench keeps a subset's words."""

    question: str
    answers: tuple[str, ...]  # the first one holds the response; none where the set has no reference
    separator: str  # between the answers in one field; "" where it holds one
    baseline: str = ""  # another system's answer


class OpenAudioBench:
    """The English sets of OpenAudioBench (arXiv 2502.17239), spoken by a synthesizer.

    Sources: the file tree of the Hugging Face data set ``baichuan-inc/OpenAudioBench``
    (``eval_datas/<subset>/<subset>.csv``, sound files in ``eval_datas/<subset>/audios``); the columns as
    github.com/MoonshotAI/Kimi-Audio-Evalkit reads them (``data/download_benchmark.py``): ``audio_filename`` in all,
    ``Questions`` and ``Answer`` of llama_questions, ``question`` and ``answers`` of web_questions, ``question``,
    ``answer_normalized_value`` and ``answer_normalized_aliases`` of trivia_qa, ``instruction`` and ``output`` of
    alpaca_eval. ``answers`` are separated by semicolons and aliases, which have no punctuation, by commas.
    reasoning_qa (Chinese, answers judged step by step) is left out.

    Args:
        folder: the data set's own folder.
        subset: llama_questions, web_questions, trivia_qa or alpaca_eval.
        sampling_rate: Hz of the utterances.

    Raises:
        ValueError: an unknown subset, missing files, the sound files included, or missing columns.
    """

    name = "openaudiobench"
    subsets: Mapping[str, _Columns] = {
        "llama_questions": _Columns(question="Questions", answers=("Answer",), separator=""),
        "web_questions": _Columns(question="question", answers=("answers",), separator=";"),
        "trivia_qa": _Columns(
            question="question", answers=("answer_normalized_value", "answer_normalized_aliases"), separator=","
        ),
        "alpaca_eval": _Columns(question="instruction", answers=(), separator="", baseline="output"),
    }

    def __init__(self, *, folder: str, subset: str, sampling_rate: int):
        require_choice(self.name, "subset", subset, self.subsets)
        self._subset, self._sampling_rate, self._columns = subset, sampling_rate, self.subsets[subset]
        self.measure = {"evaluation": "win_rate" if self._columns.baseline else "spoken_qa"}
        place, origin = Path(folder) / "eval_datas" / subset, "baichuan-inc/OpenAudioBench"
        index, self._audios = place / f"{subset}.csv", place / "audios"
        require_files(self.name, Path(folder), [index], origin)
        named = [name for name in (self._columns.question, *self._columns.answers, self._columns.baseline) if name]
        self._items = list(tables.csv_rows(self.name, index, ("audio_filename", *named)))
        require_files(self.name, Path(folder), [self._audios / row["audio_filename"] for row in self._items], origin)
        self.counts: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Utterance]:
        return usable(numbered(f"{self.name}-{self._subset}", self._items), self._utterance, self.counts)

    def _utterance(self, identity: str, row: Mapping[str, str]) -> Utterance:
        columns, response, aliases = self._columns, "", ()
        extra = {"file": row["audio_filename"]}
        if columns.baseline:
            extra["baseline"] = row[columns.baseline]
        if columns.answers:
            fields = [row[name] or "" for name in columns.answers]
            separator = columns.separator
            answers = [answer for field in fields for answer in (field.split(separator) if separator else [field])]
            response, aliases = split_answers(answers)
        return Utterance(
            instruction=Instruction(
                id=identity,
                text=require_words(row[columns.question]),
                response=response,
                task=self._subset,
                aliases=aliases,
                extra=extra,
            ),
            audio=read_file(self._audios / row["audio_filename"], self._sampling_rate),
            sampling_rate=self._sampling_rate,
            speaker=UNKNOWN_SPEAKER,
        )


class _TypedQuestions:
    """What sets of typed questions in parquet files share: ``<folder>/<_part>/<split>-*.parquet``."""

    name: str
    measure: ClassVar = {"evaluation": "spoken_qa"}
    _origin: str
    _part: str
    _splits: tuple[str, ...]
    _columns: tuple[str, ...]

    def __init__(self, *, folder: str, split: str):
        require_choice(self.name, "split", split, self._splits)
        self._split = split
        self._shards = tables.find_shards(Path(folder) / self._part, split, ".parquet")
        require_files(self.name, Path(folder), self._shards, self._origin)
        for path in self._shards:
            tables.require_columns(self.name, path, self._columns)
        self.counts: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Instruction]:
        rows = tables.parquet_rows(self._shards, self._columns)
        return usable(numbered(f"{self.name}-{self._split}", rows), self._instruction, self.counts)

    def _instruction(self, identity: str, row: Mapping[str, Any]) -> Instruction:
        response, aliases = split_answers(self._answers(row))
        return Instruction(
            id=identity,
            text=require_words(row["question"]),
            response=response,
            task=self.name,
            aliases=aliases,
            extra={self._columns[0]: row[self._columns[0]]},
        )

    def _answers(self, row: Mapping[str, Any]) -> list[str]:
        raise NotImplementedError


class TriviaQA(_TypedQuestions):
    """TriviaQA (arXiv 1705.03551) without its documents, text only: ``mandarjoshi/trivia_qa``, ``rc.nocontext``.

    Source: the data set's card: ``question``, ``question_id`` and ``answer``, a struct with ``value`` and ``aliases``
    among others, in ``rc.nocontext/<split>-00000-of-00001.parquet``. The answers of its test split are not public. A
    question stands there once for each of its documents' sources, so some come twice, as published.

    Args:
        folder: the data set's own folder.
        split: validation or train.

    Raises:
        ValueError: another split, missing shards or columns.
    """

    name = "trivia_qa"
    _origin = "mandarjoshi/trivia_qa"
    _part = "rc.nocontext"
    _splits = ("validation", "train")
    _columns = ("question_id", "question", "answer")

    def _answers(self, row: Mapping[str, Any]) -> list[str]:
        return [row["answer"]["value"], *row["answer"]["aliases"]]


class WebQuestions(_TypedQuestions):
    """WebQuestions (Berant et al., EMNLP 2013), text only: ``stanfordnlp/web_questions``.

    Source: the data set's card: ``url``, ``question`` and ``answers``, a list, in ``data/<split>-*.parquet``. The set
    asks for all answers of the list; a single one is commonly counted as right.

    Args:
        folder: the data set's own folder.
        split: test or train.

    Raises:
        ValueError: another split, missing shards or columns.
    """

    name = "web_questions"
    _origin = "stanfordnlp/web_questions"
    _part = "data"
    _splits = ("test", "train")
    _columns = ("url", "question", "answers")

    def _answers(self, row: Mapping[str, Any]) -> list[str]:
        return row["answers"]
