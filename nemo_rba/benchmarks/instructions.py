# SPDX-License-Identifier: Apache-2.0
"""Open and checkable instructions: AlpacaEval and IFEval, typed, and Spoken-Alpaca."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from nemo_rba.benchmarks import tables
from nemo_rba.benchmarks.audio import read_embedded
from nemo_rba.benchmarks.benchmark import (
    UNKNOWN_SPEAKER,
    draw_numbers,
    numbered,
    read_constraints,
    require_choice,
    require_files,
    require_words,
    split_answers,
    usable,
)
from nemo_rba.types import Instruction, Utterance


class AlpacaEval:
    """The 805 instructions of AlpacaEval (github.com/tatsu-lab/alpaca_eval), text only, with the baseline's outputs.

    Source: ``alpaca_eval.py`` of the Hugging Face data set ``tatsu-lab/alpaca_eval``: a list of objects with
    ``instruction``, ``output``, ``generator`` and ``dataset``. A judge compares an answer with ``output``, which is no
    reference, so the response is empty. The tasks are the sets that the instructions come from.

    Args:
        folder: the data set's own folder.
        subset: alpaca_eval (the baseline of version 1) or alpaca_eval_gpt4_baseline (of version 2).

    Raises:
        ValueError: an unknown subset, a missing or damaged file.
    """

    name = "alpaca_eval"
    measure: ClassVar = {"evaluation": "win_rate"}
    _columns = ("instruction", "output", "generator", "dataset")

    def __init__(self, *, folder: str, subset: str):
        require_choice(self.name, "subset", subset, ("alpaca_eval", "alpaca_eval_gpt4_baseline"))
        path = Path(folder) / f"{subset}.json"
        require_files(self.name, Path(folder), [path], "tatsu-lab/alpaca_eval")
        self._items = tables.read_json_rows(self.name, path, self._columns)
        self.counts: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Instruction]:
        return usable(numbered(self.name, self._items), self._instruction, self.counts)

    def _instruction(self, identity: str, row: Mapping[str, str]) -> Instruction:
        return Instruction(
            id=identity,
            text=require_words(row["instruction"]),
            response="",
            task=row["dataset"],
            extra={"baseline": row["output"], "baseline_system": row["generator"]},
        )


class IFEval:
    """Instructions whose following can be checked (arXiv 2311.07911), text only.

    Source: the card of the Hugging Face data set ``google/IFEval``: ``key``, ``prompt``, ``instruction_id_list`` and
    ``kwargs`` in ``ifeval_input_data.jsonl``.

    Args:
        folder: the data set's own folder.

    Raises:
        ValueError: a missing or damaged file.
    """

    name = "ifeval"
    measure: ClassVar = {"evaluation": "ifeval"}
    _columns = ("key", "prompt", "instruction_id_list", "kwargs")

    def __init__(self, *, folder: str):
        path = Path(folder) / "ifeval_input_data.jsonl"
        require_files(self.name, Path(folder), [path], "google/IFEval")
        self._items = tables.read_json_rows(self.name, path, self._columns)
        self.counts: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Instruction]:
        return usable(numbered(self.name, self._items), self._instruction, self.counts)

    def _instruction(self, identity: str, row: Mapping[str, Any]) -> Instruction:
        return Instruction(
            id=identity,
            text=require_words(row["prompt"]),
            response="",
            task=self.name,
            extra={"key": row["key"], **read_constraints(row)},
        )


class SpokenAlpaca:
    """Spoken-Alpaca: instructions of Alpaca in synthetic voices with GPT-4's answers, ``GSQA/spoken-alpaca-gpt4``.

    RBA (arXiv 2509.03526) takes 200 of its 51 thousand items as a test outside its training's domain; which ones is
    not published. Sources: the file tree of the data set (``data-00000-of-00035.arrow`` and so on, as
    ``datasets.Dataset.save_to_disk`` writes them), and github.com/FunAudioLLM/Fun-Audio-Chat
    (``training/process/data_process.py``), which reads it: ``input_audio`` says ``speech_input``, and ``output`` is the
    answer. Its table has no voices.

    Args:
        folder: the data set's own folder.
        num_items: how many to draw; None for all.
        sampling_rate: Hz of the utterances.
        seed: decides which are drawn; they stay in the set's order, with the numbers they have in it.

    Raises:
        ValueError: missing shards or columns, or fewer items than are to be drawn.
    """

    name = "spoken_alpaca"
    measure: ClassVar = {"evaluation": "judge"}
    _columns = ("speech_input", "output", "input_audio")

    def __init__(self, *, folder: str, num_items: int | None, sampling_rate: int, seed: int):
        self._sampling_rate = sampling_rate
        self._shards = tables.find_shards(Path(folder), "data", ".arrow")
        require_files(self.name, Path(folder), self._shards, "GSQA/spoken-alpaca-gpt4")
        total = tables.count_arrow_rows(self.name, self._shards, self._columns)
        self._drawn = draw_numbers(self.name, total, num_items, seed)
        self.counts: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Utterance]:
        rows = tables.arrow_rows(self._shards, self._columns, self._drawn)
        return usable(((f"{self.name}-{number:06d}", row) for number, row in rows), self._utterance, self.counts)

    def _utterance(self, identity: str, row: Mapping[str, Any]) -> Utterance:
        response, _ = split_answers([row["output"]])
        text = require_words(row["speech_input"])
        return Utterance(
            instruction=Instruction(id=identity, text=text, response=response, task=self.name),
            audio=read_embedded(row["input_audio"], self._sampling_rate),
            sampling_rate=self._sampling_rate,
            speaker=UNKNOWN_SPEAKER,
        )
