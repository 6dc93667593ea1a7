# SPDX-License-Identifier: Apache-2.0
"""What was paid for once is kept: answers of a server, votes of a judge, scores of a model, by their content.

A JSONL file that grows by whole lines, so that it can be cut off anywhere: a first line says whose values these are,
every further line is a key and a value. A file of another owner is refused, so values never mix.
"""

import hashlib
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Memory:
    """Key -> plain JSON value. Threads may share it. Processes may share its file: each adds what it paid for itself.

    Args:
        path: of the file, made when something is first kept; "" keeps everything in this process only.
        owner: plain JSON that says what the values depend on besides their keys, e.g. the model and its prompt.

    Raises:
        ValueError: at the first use, if the file has another owner, or a line in its middle is damaged.
    """

    def __init__(self, *, path: str | Path, owner: Mapping[str, Any]):
        self._path = Path(path) if path else None
        self._owner = json.loads(json.dumps(dict(owner)))  # as it comes back from the file
        self._values: dict[str, Any] | None = None
        self._lock = threading.Lock()

    def __contains__(self, key: str) -> bool:
        with self._lock:
            return key in self._read()

    def __getitem__(self, key: str) -> Any:
        with self._lock:
            return self._read()[key]

    def __len__(self) -> int:
        with self._lock:
            return len(self._read())

    def keep(self, values: Mapping[str, Any]) -> None:
        """Add some values, in the file too."""
        with self._lock:
            self._read().update(values)
            if self._path is None or not values:
                return
            self._path.parent.mkdir(parents=True, exist_ok=True)
            lines = [] if self._path.exists() and self._path.stat().st_size else [{"owner": self._owner}]
            lines += [{"key": key, "value": value} for key, value in values.items()]
            text = "".join(json.dumps(line) + "\n" for line in lines)  # ASCII, as a value may hold half a character
            with self._path.open("ab", buffering=0) as file:  # one write: lines of two processes do not mix
                file.write(text.encode())

    def _read(self) -> dict[str, Any]:
        if self._values is None:
            self._values = self._read_file() if self._path is not None and self._path.exists() else {}
        return self._values

    def _read_file(self) -> dict[str, Any]:
        data = self._path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:  # killed while writing: the next line must not be glued to half of this one
            with self._path.open("r+b") as file:
                file.truncate(len(whole))
        values = {}
        for number, line in enumerate(whole.decode().split("\n")[:-1], start=1):
            try:
                row = json.loads(line)
                if number == 1 or "owner" in row:  # two processes may both have begun the file
                    self._check_owner(row["owner"])
                else:
                    values[row["key"]] = row["value"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self._path} line {number} is damaged; delete the file to pay for it again"
                ) from error
        return values

    def _check_owner(self, found: Any) -> None:
        if found != self._owner:
            raise ValueError(
                f"{self._path} belongs to {found}, expected {self._owner}: name another file, or delete it"
            )


def fingerprint(*content: Any) -> str:
    """A key for plain JSON values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
