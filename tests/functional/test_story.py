# SPDX-License-Identifier: Apache-2.0
"""The whole story on the real assets, shortened: the commands of the README, in processes of their own."""

import json
import os
import re
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from forked import ROOT, kill, start_script

SHORT = [
    "num_minibatches=1",
    "data.num_train=48", "data.num_dev=24", "data.num_test=40", "data.num_test_seen=20", "trainer.max_steps=12",
    "warmup_steps=2", "trainer.val_check_interval=3", "evaluation.num_draws=200",
    "+validation_task=${evaluation.task}",
]  # fmt: skip

TWO_PROCESSES = ["trainer.devices=2", "data.batch_size=8"]  # the same global batch
EIGHT_BILLION = "eight-billion"  # a folder that must not appear


def start(script: str, *arguments: str, log: Path) -> BaseProcess:
    return start_script(ROOT / "examples" / script, *arguments, log=log)


def finish(process: BaseProcess, log: Path) -> tuple[int, str]:
    """(exit status, output)"""
    process.join(timeout=900)
    status = process.exitcode
    kill(process)
    return status, log.read_text()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The main job: stopped by Ctrl-C in its alignment, killed in it, and started again, now as two processes."""
    folder = tmp_path_factory.mktemp("story")
    arguments = ["--config-name=rba_tiny", f"output={folder}", *SHORT]
    checkpoints = folder / "align_rba_judged" / "lightning" / "checkpoints"

    def begin(name: str, known: set[Path]) -> tuple[BaseProcess, Path]:
        """The job, as soon as it has saved something new in its alignment."""
        log = folder.parent / f"{name}.log"
        process, deadline = start("rba_align.py", *arguments, log=log), time.monotonic() + 900
        while set(checkpoints.glob("*-last")) <= known and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert process.is_alive(), log.read_text()[-3000:]
        return process, log

    process, log = begin("first", set())
    os.kill(process.pid, signal.SIGINT)
    status, output = finish(process, log)
    (stopped,) = re.findall(r"rba_judged: stopped at step (\d+) of 12; run again to go on", output)
    assert status == 1, output[-3000:]
    (last,) = checkpoints.glob("*-last")
    assert torch.load(last / "lightning.pt", weights_only=False)["global_step"] == int(stopped)
    process, log = begin("killed", {last})
    kill(process)
    log = log.with_name("second.log")
    status, output = finish(start("rba_align.py", *arguments, *TWO_PROCESSES, log=log), log)
    assert status == 0, output[-3000:]
    return folder, output


def test_it_goes_on_after_a_kill(run):
    folder, output = run
    assert "stage synthesis: skipped" in output
    assert "stage align_rba_judged: continued after an interruption" in output
    assert "Restored all states from the checkpoint" in output
    lines = (folder / "align_rba_judged" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert sorted(set(steps)) == list(range(13))


def test_reward_rises_and_logprobs_agree(run):
    lines = [json.loads(line) for line in (run[0] / "align_rba_judged" / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if "reward/mean" in line]
    dev = [line["val/reward"] for line in lines if "val/reward" in line]
    assert max(line["health/logprob_error"] for line in train) < 1e-4
    assert np.mean([line["reward/mean"] for line in train[-3:]]) > np.mean([line["reward/mean"] for line in train[:3]])
    assert max(dev[1:]) > dev[0]


def test_dev_answers_are_measured_as_in_the_report(run):
    for arm, processes in (("rba_judged", "one, then two"), ("sft", "two")):
        lines = map(json.loads, (run[0] / f"align_{arm}" / "metrics.jsonl").read_text().splitlines())
        dev = [line for line in lines if "val/obeys" in line]
        assert len(dev) >= 5
        for line in dev:
            assert line["val/task/score"] == pytest.approx(100 * line["val/obeys"]), processes
            assert line["val/typed/obeys"] > line["val/obeys"], "the start model obeys better what it reads"
            both = (line["val/typed/obeys"] + line["val/obeys"]) / 2
            assert line["val/both/obeys"] == pytest.approx(both), processes


def test_report_and_data_are_complete(run):
    folder, _ = run
    results = json.loads((folder / "report" / "results.json").read_text())
    assert [c["name"] for c in results["conditions"]] == ["held-out voices", "seen voices", "typed"]
    assert (folder / "report" / "report.html").stat().st_size > 50_000
    assert "RBA" in results["headline"][0]
    for name in ("card.json", "counts.json", "dropped.jsonl"):
        assert (folder / "synthesis" / name).is_file()
    for arm in ("rba_judged", "sft", "forward_kl"):
        assert (folder / f"align_{arm}" / f"{arm}.nemo").is_file()


@pytest.fixture(scope="module")
def commands(run):
    """name -> (exit status, output) of the commands of the README on what ``run`` left."""
    from nemo_rba.synthesis.tts import EspeakTTS

    folder, _ = run
    voice = EspeakTTS(voices=["en-us"], rates=[160], pitches=[50], sampling_rate=44100)
    audio = voice.synthesize(["what is the capital of france"], voice.speakers)[0].numpy()
    soundfile.write(folder / "question.wav", np.stack((audio, audio), 1), 44100)
    model, dev = f"model={folder / 'align_rba_judged' / 'rba_judged.nemo'}", folder / "synthesis" / "dev"
    lines = {
        "again": ("rba_align.py", "--config-name=rba_tiny", f"output={folder}", *SHORT),
        "evaluate": (
            "rba_evaluate.py", "--config-name=rba_eval", f"model={folder / 'align_sft' / 'sft.nemo'}",
            f"output={folder / 'evaluated'}", f"manifest={dev}",
            f"tasks={{read: {{manifest: {dev}, typed: true}}, translated: {{manifest: {dev}, "
            "evaluation: translation, task: {target_language: en}}}",
        ),
        "chat": ("rba_chat.py", model, f"audio={folder / 'question.wav'}"),
        "chat about nothing": ("rba_chat.py", model, f"audio={folder / 'nothing.wav'}"),
        "8b": ("rba_align.py", "--config-name=rba_8b", f"output={folder / EIGHT_BILLION}"),
    }  # fmt: skip

    def call(name: str) -> tuple[int, str]:
        log = folder.parent / f"{name}.log"
        return finish(start(*lines[name], log=log), log)

    return {name: call(name) for name in lines}


def test_a_second_run_does_nothing(commands):
    status, output = commands["again"]
    assert status == 0, output[-3000:]
    for stage in ("synthesis", "align_rba_judged", "align_sft", "align_forward_kl", "report"):
        assert f"stage {stage}: skipped" in output


def test_chat_answers_a_stereo_file_of_another_rate(commands):
    status, output = commands["chat"]
    assert status == 0, output[-3000:]
    answer = output.strip().splitlines()[-1]
    assert answer
    assert all(ord(character) < 128 for character in answer)


def test_chat_refuses_a_file_that_is_not_there(commands):
    status, output = commands["chat about nothing"]
    assert "no such file" in output
    assert "Traceback" not in output
    assert status != 0


def test_evaluation_of_any_nemo_and_manifests(run, commands):
    status, output = commands["evaluate"]
    assert status == 0, output[-3000:]
    found = json.loads((run[0] / "evaluated" / "results.json").read_text())["conditions"]
    conditions = {condition["name"]: condition for condition in found}
    assert sorted(conditions) == ["dev", "read", "translated"]
    assert list(conditions["translated"]["signatures"]) == ["BLEU", "chrF2++", "TER"]
    page = (run[0] / "evaluated" / "report.md").read_text()
    assert "## On text: read" in page
    assert "Cascade" not in page.split("## On text: read")[1].split("##")[0]


def test_eight_billion_stops_before_any_work(run, commands):
    status, output = commands["8b"]
    assert status != 0
    for expected in ("nothing was started", "model.folder", "teacher.path", "fastpitch", "GPUs"):
        assert expected in output
    assert not (run[0] / EIGHT_BILLION).exists()
