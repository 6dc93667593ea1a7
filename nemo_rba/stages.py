# SPDX-License-Identifier: Apache-2.0
"""Resumable stages: a long job is a chain of folders, each made once for a given configuration.

    <folder>/<name>/stage.json    what was asked for: configuration, upstream stages, fingerprint; written before work
    <folder>/<name>/done.json     that it was finished: fingerprint, seconds; written last and atomically
    <folder>/<name>.stale-<n>/    an older answer to another configuration, set aside and never deleted

A stage whose ``done.json`` has the present fingerprint is skipped; one that was interrupted is called again on the same
folder, to resume by its own means; one whose configuration or upstream changed starts in a fresh folder.

In a job of many ranks all of them run the same stages, on one file system. Rank 0 does the bookkeeping; the others read
what it wrote, and join it in the work of a stage that is ``collective``. A rank that waits for one that died is the
launcher's to stop (torchrun does; srun with --kill-on-bad-exit).
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from nemo.utils import logging
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

_ASKED = "stage.json"
_DONE = "done.json"
_POLL_SECONDS = 0.2  # how often a waiting rank looks
_PROBE_BYTES = 1 << 20  # room that must be left on the disk before a stage is begun


class Stages:
    """Runs named stages below ``folder``, each at most once per configuration.

    Raises:
        ValueError: the folder cannot be made or written to, or its disk is full.
    """

    def __init__(self, folder: str | Path, rank: int = 0):
        self.folder, self.rank = Path(folder), rank
        if rank == 0:
            _require_writable(self.folder)

    def run(
        self,
        name: str,
        config: Mapping[str, Any] | DictConfig,
        function: Callable[[Path], Any],
        after: Sequence[str] = (),
        collective: bool = False,
    ) -> Path:
        """The folder of stage ``name``, made by ``function(folder)`` unless it is there already.

        Args:
            config: everything the result depends on, resolved; equal up to order of keys means unchanged.
            function: fills the folder; called again on what an interrupted call left there.
            after: stages of the same ``Stages`` whose result this one reads; when they change, this one runs again.
            collective: whether all ranks call ``function``; otherwise rank 0 does, and the others wait.

        Raises:
            ValueError: bad name, unresolved or unserializable config, upstream not finished, folder not writable.
        """
        if not name or name != Path(name).name or name.startswith("."):
            raise ValueError(f"stage name {name!r}: expected a plain folder name")
        asked = self._asked(name, config, after)
        folder = self.folder / name
        if self._is_done(folder, asked["fingerprint"]):
            logging.info(f"stage {name}: skipped, its configuration has not changed ({folder})")
            return folder
        if self.rank > 0:
            return self._follow(folder, asked["fingerprint"], function if collective else None)
        continued = self._prepare(folder, asked)
        logging.info(f"stage {name}: {'continued after an interruption' if continued else 'running'} ({folder})")
        begin = time.monotonic()
        try:
            function(folder)
        except BaseException:
            logging.error(
                f"stage {name}: interrupted after {time.monotonic() - begin:.0f} s; start the same job to continue it"
            )
            raise
        seconds = round(time.monotonic() - begin, 1)
        finished = datetime.now(timezone.utc).isoformat(timespec="seconds")
        done = {"stage": name, "fingerprint": asked["fingerprint"], "seconds": seconds, "finished": finished}
        _write_json(folder / _DONE, done | {"continued": continued})
        logging.info(f"stage {name}: done in {seconds:.0f} s")
        return folder

    def _follow(self, folder: Path, fingerprint: str, function: Callable[[Path], Any] | None) -> Path:
        """What a rank above 0 does while rank 0 runs a stage."""
        logging.info(f"stage {folder.name}: rank {self.rank} follows the first one ({folder})")
        if function is not None:
            while not _has_fingerprint(folder / _ASKED, fingerprint):
                time.sleep(_POLL_SECONDS)
            function(folder)
        while not self._is_done(folder, fingerprint):
            time.sleep(_POLL_SECONDS)
        return folder

    def _asked(self, name: str, config: Mapping[str, Any] | DictConfig, after: Sequence[str]) -> dict[str, Any]:
        upstream = {}
        for other in after:
            done = self.folder / other / _DONE
            if not done.is_file():
                raise ValueError(f"stage '{name}' comes after '{other}', which is not finished: {done} is missing")
            upstream[other] = _read_json(done)["fingerprint"]
        plain = _resolved(name, config)
        text = json.dumps({"config": plain, "after": upstream}, sort_keys=True, ensure_ascii=False)
        fingerprint = hashlib.sha256(text.encode()).hexdigest()
        return {"stage": name, "fingerprint": fingerprint, "after": upstream, "config": plain}

    def _is_done(self, folder: Path, fingerprint: str) -> bool:
        return _has_fingerprint(folder / _DONE, fingerprint)

    def _prepare(self, folder: Path, asked: dict[str, Any]) -> bool:
        """Leave ``folder`` ready for work; True when it holds an interrupted run of the same configuration."""
        note = folder / _ASKED
        if folder.exists() and not _has_fingerprint(note, asked["fingerprint"]):
            aside = self._set_aside(folder)
            reason = "its configuration or an upstream stage changed" if (aside / _ASKED).is_file() else "it is unknown"
            logging.warning(f"stage {folder.name}: {reason}, the old folder is kept as {aside}")
        continued = folder.exists()
        _require_writable(folder)
        if not continued:
            _write_json(note, asked)
        return continued

    def _set_aside(self, folder: Path) -> Path:
        n = 1
        while (aside := folder.with_name(f"{folder.name}.stale-{n}")).exists():
            n += 1
        return folder.rename(aside)


def _resolved(name: str, config: Mapping[str, Any] | DictConfig) -> Any:
    """Plain containers, every interpolation resolved.

    Raises:
        ValueError: a value is missing ("???"), cannot be resolved, or is neither text, number, boolean, list nor dict.
    """
    try:
        node = config if isinstance(config, DictConfig) else OmegaConf.create(dict(config))
        plain = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
        json.dumps(plain, allow_nan=False)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        raise ValueError(f"the configuration of stage '{name}' cannot be written down: {error}") from error
    return plain


def _require_writable(folder: Path) -> None:
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with probe.open("wb") as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ValueError(
            f"cannot write to '{folder}' ({error.strerror}): the output folder must be writable with at least "
            f"{_PROBE_BYTES >> 20} MiB free; free space or name another folder in the config"
        ) from error
    finally:
        if probe.parent.is_dir():
            probe.unlink(missing_ok=True)


def _has_fingerprint(path: Path, fingerprint: str) -> bool:
    return path.is_file() and _read_json(path)["fingerprint"] == fingerprint


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"'{path}' is not valid JSON ({error}); delete it to run the stage again") from error


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all: written beside ``path``, then renamed over it."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    draft.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    draft.replace(path)
