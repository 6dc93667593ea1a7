# SPDX-License-Identifier: Apache-2.0
"""What a benchmark is, and what all adapters share.

An adapter reads a local copy of a public set in the layout its authors publish and gives ``Utterance``s one after the
other, or ``Instruction``s where the set is text only (``spoken.Spoken`` makes utterances of those). Nothing is
downloaded. Files that are not there are an error at construction, which names them; an item that cannot be used is
skipped, counted by its reason and named in the log, so that a score is never over fewer items than one thinks.

How the items are written, so that a task can score them without knowing the set:

    question answering      response = the answer, aliases = other right ones
    multiple choice         response = the letter, extra["options"] = the options in the order of their letters
    checkable constraints   extra["instruction_id_list"] and extra["kwargs"], as IFEval has them; response ""
    translation             context asks for it, response = the translation, extra["target_language"]
    open instructions       response ""; another system's answer to compare with is in extra["baseline"]
"""

import random
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from nemo.utils import logging

from nemo_rba.types import Instruction, Utterance

UNKNOWN_SPEAKER = "unknown"  # where a set does not tell its speakers apart
NAMED_FILES = 10  # how many missing files an error names

Item = TypeVar("Item")
Row = TypeVar("Row")


class Benchmark(Protocol):
    """A spoken set: iterate over it as often as you like, always the same items in the same order."""

    name: str
    counts: Counter[str]  # reason -> items skipped by the last iteration
    measure: Mapping[str, Any]  # how it is scored: "evaluation", a name of conf/evaluation, and what its "task" changes

    def __iter__(self) -> Iterator[Utterance]:
        """The usable items, read one by one."""


class TextBenchmark(Protocol):
    """The same, typed."""

    name: str
    counts: Counter[str]
    measure: Mapping[str, Any]

    def __iter__(self) -> Iterator[Instruction]:
        """The usable items, read one by one."""


class Unusable(Exception):
    """An item that is skipped: ``reason`` is one of a few phrases to count by, ``detail`` is for a human."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def usable(rows: Iterable[tuple[str, Row]], make: Callable[[str, Row], Item], counts: Counter[str]) -> Iterator[Item]:
    """``make(id, row)`` of every row that does not raise ``Unusable``; ``counts`` is emptied first."""
    counts.clear()
    for identity, row in rows:
        try:
            item = make(identity, row)
        except Unusable as problem:
            skip(identity, problem, counts)
            continue
        yield item


def skip(identity: str, problem: Unusable, counts: Counter[str]) -> None:
    """Count an item that cannot be used, and name it in the log."""
    counts[problem.reason] += 1
    logging.warning(f"skipping {identity}: {problem}")


def numbered(prefix: str, rows: Iterable[Row]) -> Iterator[tuple[str, Row]]:
    """Rows with ids that say where they stand in their set: ``<prefix>-000000``, ``<prefix>-000001``, ..."""
    for number, row in enumerate(rows):
        yield f"{prefix}-{number:06d}", row


def require_files(name: str, folder: Path, files: Sequence[Path], origin: str) -> None:
    """Raise one ValueError that names what is missing of ``files``; ``origin`` says where the set comes from."""
    missing = [path for path in files if not path.is_file()]
    if not missing:
        return
    names = [path.relative_to(folder).as_posix() for path in missing[:NAMED_FILES]]
    more = "" if len(missing) == len(names) else f" and {len(missing) - len(names)} more"
    raise ValueError(
        f"{name}: {folder} lacks {len(missing)} of {len(files)} files: {', '.join(names)}{more}. Give source= the "
        f"folder of {origin}, with the names it has there"
    )


def require_choice(name: str, key: str, value: str, choices: Iterable[str]) -> None:
    """Raise a ValueError unless ``value`` is one of ``choices``."""
    if value not in (known := list(choices)):
        raise ValueError(f"{name}: {key} is {value!r}; expected one of {', '.join(known)}")


def require_words(text: Any) -> str:
    """``text`` without white space around it. Raises Unusable where nothing is left, or it is no text at all."""
    if not isinstance(text, str) or not text.strip():
        raise Unusable("no words", repr(text))
    return text.strip()


def split_answers(answers: Iterable[Any]) -> tuple[str, tuple[str, ...]]:
    """(response, aliases): the first answer, and the others, each once. Raises Unusable where there is none."""
    texts = dict.fromkeys(a.strip() for a in answers if isinstance(a, str) and a.strip())
    if not texts:
        raise Unusable("no answer", repr(answers))
    response, *aliases = texts
    return response, tuple(aliases)


def read_constraints(row: Mapping[str, Any]) -> dict[str, Any]:
    """IFEval's ``instruction_id_list`` and ``kwargs`` (arXiv 2311.07911) for ``extra``, one dict for each constraint.

    In a table every dict has every argument, None where it was not given, so None is left out.
    """
    names = list(row["instruction_id_list"])
    arguments = [{key: value for key, value in given.items() if value is not None} for given in row["kwargs"]]
    if not names or len(names) != len(arguments):
        raise Unusable("constraints and their arguments differ in number", f"{names}, {arguments}")
    return {"instruction_id_list": names, "kwargs": arguments}


def draw_numbers(name: str, total: int, num_items: int | None, seed: int) -> Container[int]:
    """``num_items`` of the numbers below ``total``, always the same ones for a seed; all where it is None.

    Raises:
        ValueError: fewer than 1, or more than there are.
    """
    if num_items is None:
        return range(total)
    if not 0 < num_items <= total:
        raise ValueError(f"{name}: num_items is {num_items}; expected 1 to {total}, which the set has, or null for all")
    return frozenset(random.Random(seed).sample(range(total), num_items))
