# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nemo_rba import stages as stages_module
from nemo_rba.stages import Stages


class Recorder:
    """A stage function that counts its calls and fails when told to."""

    def __init__(self, fail: bool = False):
        self.calls = 0
        self.fail = fail
        self.found: list[str] = []

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        self.found = sorted(path.name for path in folder.iterdir())
        (folder / "part.txt").write_text("half")
        if self.fail:
            raise RuntimeError("power cut")
        (folder / "result.txt").write_text("whole")


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    for level in ("info", "warning", "error"):
        monkeypatch.setattr(stages_module.logging, level, seen.append)
    return seen


def test_a_stage_runs_once_per_configuration(tmp_path, lines):
    work = Recorder()
    folder = Stages(tmp_path).run("speech", {"n": 1, "voice": "en"}, work)
    again = Stages(tmp_path).run("speech", OmegaConf.create({"voice": "en", "n": 1}), work)  # order of keys is nothing
    assert folder == again == tmp_path / "speech"
    assert work.calls == 1
    assert "running" in lines[0]
    assert "done in" in lines[1]
    assert "skipped" in lines[2]


def test_done_json_names_no_host_and_no_path(tmp_path):
    Stages(tmp_path).run("speech", {"n": 1}, Recorder())
    done = json.loads((tmp_path / "speech" / "done.json").read_text())
    assert set(done) == {"stage", "fingerprint", "seconds", "finished", "continued"}
    assert str(tmp_path) not in json.dumps(done)


def test_a_changed_configuration_sets_the_old_folder_aside(tmp_path, lines):
    work = Recorder()
    for n in (1, 2, 3):
        Stages(tmp_path).run("speech", {"n": n}, work)
    assert work.calls == 3
    assert work.found == ["stage.json"]  # the new run starts in a fresh folder
    assert sorted(path.name for path in tmp_path.iterdir()) == ["speech", "speech.stale-1", "speech.stale-2"]
    assert (tmp_path / "speech.stale-1" / "result.txt").read_text() == "whole"
    assert any("kept as" in line and "speech.stale-1" in line for line in lines)


def test_an_interrupted_stage_is_continued_in_place(tmp_path, lines):
    with pytest.raises(RuntimeError, match="power cut"):
        Stages(tmp_path).run("speech", {"n": 1}, Recorder(fail=True))
    assert "interrupted" in lines[-1]
    assert not (tmp_path / "speech" / "done.json").exists()
    work = Recorder()
    Stages(tmp_path).run("speech", {"n": 1}, work)
    assert "part.txt" in work.found
    assert any("continued" in line for line in lines)
    assert json.loads((tmp_path / "speech" / "done.json").read_text())["continued"] is True


def test_an_interrupted_stage_with_another_configuration_starts_afresh(tmp_path):
    with pytest.raises(RuntimeError, match="power cut"):
        Stages(tmp_path).run("speech", {"n": 1}, Recorder(fail=True))
    work = Recorder()
    Stages(tmp_path).run("speech", {"n": 2}, work)
    assert work.found == ["stage.json"]
    assert (tmp_path / "speech.stale-1" / "part.txt").exists()


def test_a_folder_of_unknown_origin_is_set_aside(tmp_path):
    (tmp_path / "speech").mkdir()
    (tmp_path / "speech" / "mine.txt").write_text("keep")
    Stages(tmp_path).run("speech", {"n": 1}, Recorder())
    assert (tmp_path / "speech.stale-1" / "mine.txt").read_text() == "keep"


def test_a_changed_upstream_stage_reruns_what_reads_it(tmp_path):
    words, speech, other = Recorder(), Recorder(), Recorder()
    for seed in (1, 1, 2):
        stages = Stages(tmp_path)
        stages.run("words", {"seed": seed}, words)
        stages.run("speech", {"n": 1}, speech, after=["words"])
        stages.run("other", {"n": 1}, other)
    assert (words.calls, speech.calls, other.calls) == (2, 2, 1)


def test_an_unfinished_upstream_stage_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"'speech' comes after 'words', which is not finished"):
        Stages(tmp_path).run("speech", {}, Recorder(), after=["words"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"n": "???"}, "n"),
        ({"n": "${nowhere}"}, "nowhere"),
        ({"n": float("nan")}, "cannot be written down"),
        ({"n": object()}, "cannot be written down"),
    ],
)
def test_a_configuration_that_cannot_be_fingerprinted_is_refused(tmp_path, config, message):
    work = Recorder()
    with pytest.raises(ValueError, match=message):
        Stages(tmp_path).run("speech", config, work)
    assert work.calls == 0


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden"])
def test_bad_names(tmp_path, name):
    with pytest.raises(ValueError, match="plain folder name"):
        Stages(tmp_path).run(name, {}, Recorder())


def test_an_unwritable_folder_is_refused_before_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write to .*Not a directory"):
        Stages(tmp_path / "file" / "run")


def test_a_full_disk_is_refused_before_work(tmp_path, monkeypatch):
    stages, work = Stages(tmp_path), Recorder()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stages_module.os, "fsync", full)
    with pytest.raises(ValueError, match=r"cannot write to .*No space left on device"):
        stages.run("speech", {"n": 1}, work)
    assert work.calls == 0
    monkeypatch.undo()
    stages.run("speech", {"n": 1}, work)
    assert work.calls == 1
    assert not list(tmp_path.rglob(".probe*"))


def test_a_broken_done_file_is_named(tmp_path):
    Stages(tmp_path).run("speech", {"n": 1}, Recorder())
    (tmp_path / "speech" / "done.json").write_text("{")
    with pytest.raises(ValueError, match=r"done\.json' is not valid JSON"):
        Stages(tmp_path).run("speech", {"n": 1}, Recorder())
