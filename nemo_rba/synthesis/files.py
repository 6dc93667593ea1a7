# SPDX-License-Identifier: Apache-2.0
"""Small files that are there whole or not at all."""

import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path


def read_jsonl(path: Path) -> list[dict]:
    """The objects of a JSONL file. Raises ValueError naming the line that is damaged."""
    rows = []
    lines = path.read_text(encoding="utf-8").split("\n")  # splitlines() would cut a text at a U+2028 within it
    for number, line in enumerate(lines[:-1] if not lines[-1] else lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is damaged; delete the file to have it written again") from error
    return rows


def write_jsonl(path: Path, rows: Sequence[dict]) -> None:
    """Write a whole JSONL file or none at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_text(path: Path, text: str) -> None:
    """Write a whole file or none at all: under another name first, then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
