# SPDX-License-Identifier: Apache-2.0
from collections import Counter
from typing import ClassVar

import pytest
import torch

from nemo_rba.benchmarks.writing import read_summary, render, write_benchmark
from nemo_rba.manifest import check_manifest, read_manifest
from nemo_rba.types import Instruction, Utterance


class Tones:
    """So many items of half a second; ``fails_at`` is where the power goes."""

    name = "tones"
    measure: ClassVar = {"evaluation": "translation", "task": {"target_language": "de"}}

    def __init__(self, size: int, fails_at: int | None = None):
        self._size, self._fails_at, self.counts = size, fails_at, Counter()

    def __iter__(self):
        self.counts.clear()
        self.counts.update({"unreadable audio": 2, "no words": 1})
        for number in range(self._size):
            if number == self._fails_at:
                raise RuntimeError("power cut")
            instruction = Instruction(id=f"tones-{number}", text="la", response="", task="ab"[number % 2])
            yield Utterance(instruction=instruction, audio=torch.full((8000,), 0.1), sampling_rate=16000, speaker="s")


def write(benchmark: Tones, folder) -> None:
    folder.mkdir(exist_ok=True)
    write_benchmark(benchmark, folder, shard_size=3, audio_format="flac")


def test_a_benchmark_is_written_with_an_account_of_it(tmp_path):
    write(Tones(5), tmp_path / "set")
    assert check_manifest(tmp_path / "set", needs_response=False).problems == []
    assert [cut.id for cut in read_manifest(tmp_path / "set")] == [f"tones-{n}" for n in range(5)]
    assert {cut.custom["teacher"] for cut in read_manifest(tmp_path / "set")} == {"tones"}
    summary = read_summary(tmp_path / "set")
    assert summary == {
        "name": "tones", "measure": Tones.measure, "items": 5, "seconds": 2.5, "tasks": {"a": 3, "b": 2},
        "skipped": {"unreadable audio": 2, "no words": 1},
    }  # fmt: skip
    rows = [line.split() for line in render(summary | {"seconds": 5400.0}).splitlines()]
    assert rows == [
        ["tones,", "evaluation=translation"], ["items", "5"], ["hours", "1.50"], ["skipped", "3"],
        ["skipped:", "unreadable", "audio", "2"],
        ["skipped:", "no", "words", "1"], ["task", "a", "3"], ["task", "b", "2"],
    ]  # fmt: skip


def test_an_interrupted_write_leaves_no_shards_and_is_begun_anew(tmp_path):
    with pytest.raises(RuntimeError, match="power cut"):
        write(Tones(5, fails_at=4), tmp_path / "set")
    assert list((tmp_path / "set").glob("cuts.*")) == []
    write(Tones(5), tmp_path / "set")
    write(Tones(2), tmp_path / "set")
    assert [cut.id for cut in read_manifest(tmp_path / "set")] == ["tones-0", "tones-1"]
    assert not (tmp_path / "set" / ".draft").exists()


def test_a_benchmark_without_usable_items_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tones: no item can be used: unreadable audio \(2\), no words \(1\)"):
        write(Tones(0), tmp_path / "set")
