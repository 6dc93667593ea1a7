# SPDX-License-Identifier: Apache-2.0
"""Work laid out as files, for any process that sees the folder: ranks of torchrun, tasks of a SLURM array, threads.

One process, the foreman, knows what is to be done next. It places orders; whoever is free takes one, does it and puts
the result where the order says; the foreman works too, so a job of one process needs nobody else, and others may come
late or die. Taking is a rename, which only one can win:

    open.json                     whose orders these are; touched by the foreman while alive
    <kind>.<name>.json            an order that nobody has taken
    <kind>.<name>.json.by-<who>   one that is being worked on; whoever does it touches the file while alive
    closed.json                   no more will come, and why

An order that is done is gone. One whose worker has shown no sign of life for ``LOST_SECONDS`` is placed again. It may
then be done twice: results must follow from the order alone and be put in place whole.
"""

import contextlib
import json
import os
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from nemo.utils import logging

SCRATCH = "scratch"  # in the folder: what is not finished; it goes when the folder is opened, or closed for good
ALIVE_SECONDS = 5.0  # between two signs of life
LOST_SECONDS = 60.0  # without one
FOREMAN_LOST_SECONDS = 600.0  # of the first rank, without whom nothing goes on
POLL_SECONDS = 0.1  # how often one who has nothing to do looks
WARN_SECONDS = 60.0  # between two lines of one who waits for the foreman

Place = Callable[[], None]  # puts a finished result in place
Handler = Callable[[dict], Place]


class Closed(Exception):
    """The job has ended while this order was being worked on; what was done of it is void."""


class Orders:
    """The folder, as one process sees it.

    Args:
        folder: on a disk that all share.
        rank: 0 for the foreman; another number for each of the others.
        identity: what the work depends on; processes of different identity do not work together.
    """

    def __init__(self, folder: Path, *, rank: int, identity: str):
        self._folder, self._rank, self._identity = folder, rank, identity
        self._held: set[Path] = set()
        self._life = threading.Thread(target=self._show_life, daemon=True)
        self._seen: dict[Path, tuple[float, float]] = {}  # of others' orders: last sign of life, and when it was noted
        self._problem: BaseException | None = None
        self._ended = threading.Event()

    def open(self) -> None:
        """Foreman: forget what an earlier job left, and begin. Signs of life are given from now on."""
        if self._folder.exists():  # renamed first, so that nobody writes into what is being deleted
            old = self._folder.rename(self._folder.with_name(f".{self._folder.name}.{os.getpid()}.old"))
            shutil.rmtree(old, ignore_errors=True)
        self._folder.mkdir(parents=True, exist_ok=True)  # one who has not noticed may have made it for his scratch
        self._write("open.json", {"identity": self._identity})
        self._held.add(self._folder / "open.json")
        self._life.start()

    def close(self, problem: BaseException | None) -> None:
        """Foreman: no more orders; ``problem`` is why, where the work was not finished."""
        if self._folder.exists():
            told = "" if problem is None else str(problem) or type(problem).__name__
            self._write("closed.json", {"identity": self._identity, "problem": told})
            if problem is None:  # of one who was taken for lost
                shutil.rmtree(self._folder / SCRATCH, ignore_errors=True)
        self._ended.set()

    def join(self) -> bool:
        """Others: wait for the foreman. False where everything is done already.

        Raises:
            ValueError: the foreman works with another configuration.
        """
        begin, warned = time.monotonic(), 0
        while True:
            closed, opened = self._read("closed.json"), self._read("open.json")
            if closed and closed["identity"] == self._identity and not closed["problem"]:
                return False
            if opened and not closed:  # a job that failed is closed until its foreman comes back
                if opened["identity"] != self._identity:
                    raise ValueError(
                        f"rank {self._rank} was started with other settings than the first rank, whose orders are in "
                        f"{self._folder}; start all ranks with the same command"
                    )
                if not self._life.is_alive():
                    self._life.start()
                return True
            time.sleep(POLL_SECONDS)
            if time.monotonic() - begin > (warned + 1) * WARN_SECONDS:
                warned += 1
                logging.warning(f"rank {self._rank} waits for the first rank to open {self._folder}")

    def place(self, kind: str, name: str, content: Mapping) -> None:
        """Foreman: an order. Of a kind, names are taken in alphabetical order."""
        self._write(f"{kind}.{name}.json", content)

    def wait(self, done: Callable[[], bool], handlers: Mapping[str, Handler]) -> None:
        """Foreman: until ``done()``, work on orders that ``handlers`` know.

        What is done is told by results, not by orders that are gone: a listing may miss what is being renamed.

        Raises:
            BaseException: what went wrong in this process, as it was; ``ValueError`` for what went wrong elsewhere.
        """
        while not done():
            self.check()
            if not self._work_once(handlers):
                self._place_lost_again()
                time.sleep(POLL_SECONDS)
        self.check()

    def work(self, handlers: Mapping[str, Handler]) -> None:
        """Take orders until the folder is closed, or opened anew.

        Raises:
            ValueError: the foreman gave up; with its reason. Or he has shown no sign of life for a long time.
        """
        while not self.has_ended():
            if self._seconds_silent(self._folder / "open.json") > FOREMAN_LOST_SECONDS:
                raise ValueError(
                    f"the first rank has shown no sign of life for {FOREMAN_LOST_SECONDS:g} s; start the job again, it "
                    "goes on where it was"
                )
            if self._problem is not None:  # of the thread beside
                raise self._problem
            if not self._work_once(handlers):
                time.sleep(POLL_SECONDS)
        closed = self._read("closed.json")
        if self._rank > 0 and closed and closed["problem"]:
            raise ValueError(f"the first rank has given up: {closed['problem']}")

    def work_beside(self, handlers: Mapping[str, Handler]) -> threading.Thread:
        """As ``work``, in a thread of its own; what goes wrong there is raised by ``check``."""

        def run() -> None:
            try:
                self.work(handlers)
            except BaseException as problem:  # told, and raised again in the main thread
                self._problem = self._problem or problem

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    def check(self) -> None:
        """Raise what went wrong with an order, here or elsewhere."""
        if self._problem is not None:
            raise self._problem
        for path in self._folder.glob("*.failed"):
            found = json.loads(path.read_text(encoding="utf-8"))
            raise ValueError(f"rank {found['rank']}: {found['problem']}\n{found['trace']}")

    def has_ended(self) -> bool:
        """Whether to stop, also in the middle of an order."""
        return self._ended.is_set() or (self._folder / "closed.json").exists() or not self._folder.exists()

    def _work_once(self, handlers: Mapping[str, Handler]) -> bool:
        taken = self._take(handlers)
        if taken is None:
            return False
        kind, path, order = taken
        try:
            place = handlers[kind](order)
            if path.exists():  # else it was placed again, or the foreman has begun anew
                place()
        except Closed:
            pass
        except BaseException as problem:
            if self._rank > 0 and not path.exists():  # its place may have gone with it
                logging.warning(f"{path.name} is void, as another has done it: {problem}")
                return True
            if self._rank > 0 and isinstance(problem, Exception) and not self.has_ended():
                told = {"rank": self._rank, "problem": str(problem), "trace": traceback.format_exc()}
                self._write(f"{path.name}.failed", told)
            elif self._rank > 0:  # one who is called away leaves the order to others
                self._give_back(path)
            raise
        finally:
            self._held.discard(path)
        path.unlink(missing_ok=True)
        return True

    def _take(self, kinds: Collection[str]) -> tuple[str, Path, dict] | None:
        for kind in kinds:
            for path in sorted(self._folder.glob(f"{kind}.*.json")):
                mine = path.with_name(f"{path.name}.by-{self._rank}-{os.getpid()}")
                try:
                    path.rename(mine)
                    order = json.loads(mine.read_text(encoding="utf-8"))
                except FileNotFoundError:  # another was faster
                    continue
                self._held.add(mine)
                self._touch(mine)
                return kind, mine, order
        return None

    def _place_lost_again(self) -> None:
        found = {path for path in self._folder.glob("*.json.by-*") if path not in self._held}
        self._seen = {path: sign for path, sign in self._seen.items() if path in found}
        for path in found:
            if self._seconds_silent(path) > LOST_SECONDS:
                logging.warning(f"no sign of life of {path.name}: it is placed again")
                self._give_back(path)

    def _seconds_silent(self, path: Path) -> float:
        """Since the last sign of life was seen, by our own clock; 0 where the file is gone."""
        now = time.monotonic()
        try:
            alive = path.stat().st_mtime
        except FileNotFoundError:
            return 0.0
        known, since = self._seen.get(path, (None, now))
        self._seen[path] = (alive, since if alive == known else now)
        return now - self._seen[path][1]

    def _give_back(self, path: Path) -> None:
        with contextlib.suppress(FileNotFoundError):  # done in this moment
            path.rename(path.with_name(path.name.partition(".by-")[0]))

    def _show_life(self) -> None:
        while not self._ended.wait(ALIVE_SECONDS):
            for path in list(self._held):
                self._touch(path)

    def _touch(self, path: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)

    def _read(self, name: str) -> dict | None:
        try:
            return json.loads((self._folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def _write(self, name: str, content: Mapping) -> None:
        draft = self._folder / f".{name}.{os.getpid()}-{threading.get_ident()}"
        draft.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        draft.rename(self._folder / name)
