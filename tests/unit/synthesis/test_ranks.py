# SPDX-License-Identifier: Apache-2.0
"""Many ranks make what one makes, whoever comes late, dies, or is killed."""

import multiprocessing
import os
import signal
import time

import pytest

from nemo_rba.manifest import check_manifest, read_manifest
from nemo_rba.synthesis import orders as orders_module

from .conftest import FakeTeacher, FakeTTS
from .test_pipeline import CONFIG, build, contents, make_splits

FORK = multiprocessing.get_context("fork")  # a new interpreter would import everything again


def noting(fake: type, folder, method: str, seconds: float = 0.08):
    """The fake, which takes its time and leaves a file that names the process."""

    class Noting(fake):
        pass

    def call(self, *arguments):
        (folder / f"{method}-{os.getpid()}").touch()
        time.sleep(seconds)
        return getattr(super(Noting, self), method)(*arguments)

    setattr(Noting, method, call)
    return Noting


def make(output, notes, rank: int, batches_at_once: int = 3) -> None:
    teacher = noting(FakeTeacher, notes, "generate")()
    tts = noting(FakeTTS, notes, "synthesize")
    splits = make_splits(tts(["a", "b"]), dev={"tts": tts(["c", "d"])}, test={"tts": tts(["c", "d"])})
    build(output, teacher=teacher, splits=splits, batches_at_once=batches_at_once, shard_size=4).run(CONFIG, rank)


@pytest.fixture
def start(tmp_path):
    """``start(rank)`` begins a process; what is still alive at the end is ended."""
    (tmp_path / "notes").mkdir()
    processes = []

    def begin(rank: int):
        process = FORK.Process(target=make, args=(tmp_path / "data", tmp_path / "notes", rank))
        process.start()
        processes.append(process)
        return process

    yield begin
    for process in processes:
        process.kill()
        process.join()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    (folder / "notes").mkdir()
    make(folder / "data", folder / "notes", 0)
    return contents(folder / "data")


def workers(folder, method: str) -> int:
    return len(list((folder / "notes").glob(f"{method}-*")))


def wait_for(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_three_ranks_make_what_one_makes(alone, start, tmp_path):
    ranks = [start(rank) for rank in (2, 1, 0)]
    for process in ranks:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert contents(tmp_path / "data") == alone
    assert min(workers(tmp_path, "generate"), workers(tmp_path, "synthesize")) > 1, "work was shared"
    late = start(1)
    late.join(timeout=60)
    assert late.exitcode == 0, "all was done"


def test_a_rank_that_is_killed_is_done_without(alone, start, tmp_path, monkeypatch):
    monkeypatch.setattr(orders_module, "LOST_SECONDS", 0.5)
    first, second = start(0), start(1)
    wait_for(lambda: (tmp_path / "notes" / f"synthesize-{second.pid}").exists())
    os.kill(second.pid, signal.SIGKILL)
    first.join(timeout=60)
    assert first.exitcode == 0
    assert contents(tmp_path / "data") == alone


@pytest.mark.parametrize("shards", [0, 1, 5])
def test_a_first_rank_that_is_killed_goes_on_where_it_was(alone, start, tmp_path, shards):
    first = start(0)
    wait_for(lambda: len(list((tmp_path / "data" / "speech").glob("*.json"))) >= shards)
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "data" / "speech").glob("*.json")}
    helper, again = start(1), start(0)
    again.join(timeout=60)
    helper.join(timeout=60)
    assert (again.exitcode, helper.exitcode) == (0, 0)
    assert contents(tmp_path / "data") == alone
    assert all(path.stat().st_mtime_ns == written for path, written in done.items()), "no shard is made twice"


def test_a_shard_that_loses_all_its_clips_keeps_its_number(tmp_path):
    mute = FakeTTS(["a", "b"], mute=["cat", "dog", "red", "blue", "one", "two", "three", "say", "tell", "hello"])
    card = build(tmp_path, tts=mute, shard_size=1).run(CONFIG)
    kept = [cut.id for cut in read_manifest(tmp_path / "train")]
    assert 0 < len(kept) == card["splits"]["train"]["clips"] < 50
    assert check_manifest(tmp_path / "train").problems == []
    assert len(list((tmp_path / "train").glob("cuts.*"))) == 50
