# SPDX-License-Identifier: Apache-2.0
"""Rows of the files that sets are published in: Parquet and Arrow shards, TSV, CSV, JSON and JSONL; one by one."""

import csv
import json
import re
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ROWS_AT_ONCE = 16  # rows of a table in memory; a row may hold a minute of sound


def find_shards(folder: Path, stem: str, suffix: str) -> list[Path]:
    """The shards ``<stem>-00000-of-00003<suffix>`` of a folder, present or not, as the names of those present tell.

    Where there is none, one shard is taken to be missing.
    """
    pattern = re.compile(rf"{re.escape(stem)}-\d{{5}}-of-(\d{{5}}){re.escape(suffix)}")
    totals = [int(found[1]) for path in sorted(folder.glob(f"{stem}-*")) if (found := pattern.fullmatch(path.name))]
    total = totals[0] if totals else 1
    return [folder / f"{stem}-{number:05d}-of-{total:05d}{suffix}" for number in range(total)]


def require_columns(name: str, path: Path, columns: Sequence[str]) -> None:
    """Raise a ValueError naming the columns that a Parquet file lacks, or saying that it is none."""
    try:
        found = pq.read_schema(path).names
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{name}: {path} is no Parquet file ({error}); download it again") from error
    _require(name, path, columns, found)


def parquet_rows(paths: Sequence[Path], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows of Parquet files, read row group by row group."""
    for path in paths:
        with pq.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=ROWS_AT_ONCE, columns=list(columns)):
                yield from batch.to_pylist()


def count_arrow_rows(name: str, paths: Sequence[Path], columns: Sequence[str]) -> int:
    """How many rows there are in the Arrow streams that ``datasets.Dataset.save_to_disk`` writes.

    Raises:
        ValueError: a file that is no such stream, or lacks one of ``columns``.
    """
    total = 0
    for path in paths:
        try:
            with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
                _require(name, path, columns, stream.schema.names)
                total += sum(batch.num_rows for batch in stream)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{name}: {path} is no Arrow stream ({error}); download it again") from error
    return total


def arrow_rows(
    paths: Sequence[Path], columns: Sequence[str], numbers: Container[int]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, row) of those rows of Arrow streams whose numbers are in ``numbers``; of the others nothing is read."""
    first = 0
    for path in paths:
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
            for batch in stream:
                chosen = batch.select(list(columns))
                for place in range(batch.num_rows):
                    if first + place in numbers:
                        yield first + place, chosen.slice(place, 1).to_pylist()[0]
                first += batch.num_rows


def tsv_rows(name: str, path: Path, columns: Sequence[str], escape: str | None = None) -> Iterator[dict[str, str]]:
    """Rows of a tab-separated file with a header in which quotation marks mean nothing."""
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE, escapechar=escape)
        _require(name, path, columns, reader.fieldnames or ())
        yield from _whole(name, path, columns, reader)


def csv_rows(name: str, path: Path, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """Rows of a comma-separated file with a header."""
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        _require(name, path, columns, reader.fieldnames or ())
        yield from _whole(name, path, columns, reader)


def read_json_rows(name: str, path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The objects of a ``.json`` with a list of them, or of a ``.jsonl`` with one a line.

    Raises:
        ValueError: a file that is damaged, or an object without one of ``columns``.
    """
    try:
        if path.suffix == ".json":
            rows = json.loads(path.read_text(encoding="utf-8"))
        else:
            with path.open(encoding="utf-8") as lines:
                rows = [json.loads(line) for line in lines if line.strip()]
    except ValueError as error:
        raise ValueError(f"{name}: {path} is damaged ({error}); download it again") from error
    for number, row in enumerate(rows, start=1):
        _require(name, f"{path} object {number}", columns, row if isinstance(row, dict) else ())
    return rows


def _whole(name: str, path: Path, columns: Sequence[str], reader: csv.DictReader) -> Iterator[dict[str, str]]:
    for row in reader:
        if any(row[column] is None for column in columns):
            raise ValueError(f"{name}: {path} line {reader.line_num} is cut off; download it again")
        yield row


def _require(name: str, where: Path | str, columns: Sequence[str], found) -> None:
    missing = [column for column in columns if column not in found]
    if missing:
        raise ValueError(
            f"{name}: {where} has no {', '.join(missing)}; it has {', '.join(found) or 'nothing'}. Is it another "
            "version of the set?"
        )
