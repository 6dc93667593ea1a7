# SPDX-License-Identifier: Apache-2.0
"""The pipeline with checks: what is dropped is told, and interruptions change nothing."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nemo_rba.manifest import check_manifest, read_manifest
from nemo_rba.synthesis import speech as speech_module
from nemo_rba.synthesis.quality import FiniteCheck, QualityControl, SilenceCheck
from nemo_rba.synthesis.quality_asr import AsrRoundTrip

from .conftest import FakeTTS
from .test_pipeline import CONFIG, build, contents, failing, make_splits, rows_of


class FaultyTTS(FakeTTS):
    """Falls silent at "dog", speaks half of "cat", and gives what is no number at "red"; begins with its letters."""

    def synthesize(self, texts, speakers):
        clips = super().synthesize(texts, speakers)
        for text, clip in zip(texts, clips, strict=True):
            words = text.split()
            clip[: len(text)] = torch.tensor([ord(letter) / 128 for letter in text])
            if "cat" in words:
                clip[len(clip) // 2 :] = 0
            if "dog" in words:
                clip[:] = 0
            if "red" in words:
                clip[3] = torch.nan
        return clips


def listen(audio, sampling_rate: int) -> list[str]:
    """Reads the letters at the beginning of a clip, but takes "tell" for "sell", and "two" takes its breath away."""
    texts = ["".join(chr(round(float(x) * 128)) for x in waveform[: len(waveform) // 100]) for waveform in audio]
    return ["" if "two" in text else text.replace("tell", "sell") for text in texts]


CHECKED = CONFIG | {"quality": {"max_dropped_share": 0.9, "checks": ["finite", "silence"]}}


def checked(output: Path, *, tts: FakeTTS | None = None, share: float = 0.9, asr: Callable | None = None):
    """A pipeline with checks; with somebody who listens, all voices are faulty ones."""
    tts, checks = tts or FaultyTTS(["a", "b"]), {}
    checks["finite"] = FiniteCheck()
    checks["silence"] = SilenceCheck(level_db=-40, borderline=0.3, maximum=0.7)
    others = {}
    if asr is not None:
        checks["round trip"] = AsrRoundTrip(asr=asr, metric="wer", borderline=0.2, maximum=0.7)
        others = {name: {"tts": FaultyTTS(["c", "d"])} for name in ("dev", "test")}
    quality = QualityControl(checks=checks, max_dropped_share=share)
    return build(output, splits=make_splits(tts, **others), quality=quality, max_failed_share=1.0, language=None)


@pytest.fixture(scope="module")
def inspected(tmp_path_factory) -> Path:
    """A finished run with faulty voices, checked by samples and by ear."""
    folder = tmp_path_factory.mktemp("inspected") / "data"
    checked(folder, asr=listen).run(CHECKED)
    return folder


def test_bad_clips_are_dropped_counted_and_listed_with_what_was_heard(inspected):
    listed = rows_of(inspected, "quality.jsonl")
    dropped = {row["id"]: row["reason"] for row in rows_of(inspected, "dropped.jsonl") if row["id"][0] == "t"}
    words = {row["id"]: set(row["text"].split()) for row in listed}
    assert all(set(row) == {"id", "verdict", "reason", "value", "text", "heard"} for row in listed)
    assert {row["id"]: row["reason"] for row in listed if row["verdict"] == "drop" and row["id"][0] == "t"} == dropped
    by_reason = {reason: [i for i in dropped if dropped[i] == reason] for reason in set(dropped.values())}
    assert set(by_reason) == {
        "finite: samples are NaN or infinite",
        "silence: more than 0.7 of it silent",
        "round trip: wer above 0.7",
    }
    assert all("red" in words[i] for i in by_reason["finite: samples are NaN or infinite"])
    assert all("dog" in words[i] for i in by_reason["silence: more than 0.7 of it silent"])
    halves = [row for row in listed if row["reason"] == "silence: more than 0.3 of it silent"]
    assert halves
    assert all(row["verdict"] == "borderline" and "cat" in row["text"].split() for row in halves)
    misheard = [row for row in listed if row["reason"] == "round trip: wer above 0.2"]
    assert misheard
    assert all(row["value"] == 0.5 and row["heard"] == row["text"].replace("tell", "sell") for row in misheard)
    lost = [row for row in listed if row["reason"] == "round trip: wer above 0.7"]
    assert all("two" in words[row["id"]] and (row["value"], row["heard"]) == (1.0, "") for row in lost)


def test_what_was_lost_is_told_and_nothing_else_is_missing(inspected):
    card = json.loads((inspected / "card.json").read_text())
    for name, size in {"train": 50, "dev": 8, "test": 10, "test_seen": 10}.items():
        found = card["quality"][name]
        kept = [cut.id for cut in read_manifest(inspected / name)] if found["kept"] else []
        lost = {row["id"] for row in rows_of(inspected, "dropped.jsonl") if row["id"].startswith(f"{name}-")}
        assert found["spoken"] == size == found["kept"] + found["dropped"]
        assert sorted([*kept, *lost]) == [f"{name}-{i:06d}" for i in range(size)]
    assert card["quality"]["train"]["borderline"]["silence: more than 0.3 of it silent"] > 0
    assert sum(card["dropped"].values()) == len(rows_of(inspected, "dropped.jsonl"))
    assert f"| train | 50 | {card['quality']['train']['kept']} |" in (inspected / "card.md").read_text()
    assert json.loads((inspected / "counts.json").read_text())["quality"] == card["quality"]


@pytest.mark.parametrize(("part", "at"), [("tts", 2), ("asr", 1), ("asr", 3), ("write", 15), ("rename", 14)])
def test_an_interrupted_run_with_checks_goes_on_to_the_same_end(inspected, tmp_path, monkeypatch, part, at):
    tts, asr = FaultyTTS(["a", "b"]), listen
    with monkeypatch.context() as patch:
        if part == "tts":
            tts.synthesize = failing(tts.synthesize, at=at)
        elif part == "asr":
            asr = failing(asr, at=at)
        elif part == "write":
            patch.setattr(speech_module.ManifestWriter, "write", failing(speech_module.ManifestWriter.write, at=at))
        else:
            patch.setattr("os.replace", failing(__import__("os").replace, at=at))
        with pytest.raises(KeyboardInterrupt):
            checked(tmp_path / "data", tts=tts, asr=asr).run(CHECKED)
    checked(tmp_path / "data", asr=listen).run(CHECKED)
    assert contents(tmp_path / "data") == contents(inspected)


@pytest.mark.parametrize(("value", "reason"), [(0.0, "silence: more than 0.7 of it silent"),
                                               (torch.nan, "finite: samples are NaN or infinite")])  # fmt: skip
def test_a_synthesizer_that_fails_is_named_and_stopped_early(tmp_path, value, reason):
    class BrokenTTS(FakeTTS):
        def synthesize(self, texts, speakers):
            time.sleep(0.3)  # more than it takes to look at the first shard
            return [torch.full_like(clip, value) for clip in super().synthesize(texts, speakers)]

    tts = BrokenTTS(["a", "b"])
    message = (
        rf"split train: 20 of 50 clips dropped so far, more than quality.max_dropped_share=0.3 allows, for {reason}"
    )
    with pytest.raises(ValueError, match=message):
        checked(tmp_path, tts=tts, share=0.3).run(CHECKED)
    assert tts.calls < 6, "not all of the shards"
    calls = tts.calls
    assert [row["reason"] for row in rows_of(tmp_path, "quality.jsonl")] == [reason] * 20
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert counts["dropped"][reason] == 20
    assert not (tmp_path / "card.json").exists()
    with pytest.raises(ValueError, match=message):
        checked(tmp_path, tts=tts, share=0.3).run(CHECKED)
    assert tts.calls == calls, "what is known is not tried again"


def test_a_run_that_was_stopped_goes_on_when_more_may_be_lost(tmp_path):
    with pytest.raises(ValueError, match=r"more than quality.max_dropped_share=0.02 allows"):
        checked(tmp_path / "data", share=0.02).run(CHECKED)
    more = CHECKED | {"quality": CHECKED["quality"] | {"max_dropped_share": 0.5}}
    checked(tmp_path / "data", share=0.5).run(more)
    checked(tmp_path / "other", share=0.9).run(CHECKED)
    assert contents(tmp_path / "data") == contents(tmp_path / "other")
    with pytest.raises(ValueError, match=r"other settings \(quality.checks\)"):
        checked(tmp_path / "data").run(CHECKED | {"quality": {"max_dropped_share": 0.5, "checks": []}})


def test_a_sound_synthesizer_gives_the_same_clips_with_checks_as_without(tmp_path):
    build(tmp_path / "plain", max_failed_share=1.0, language=None).run(CONFIG)
    checked(tmp_path / "checked", tts=FakeTTS(["a", "b"]), share=0.0).run(CHECKED)
    clips = {name: hashed for name, hashed in contents(tmp_path / "checked").items() if "-" in name and "/" not in name}
    assert len(clips) == 78
    assert clips.items() <= contents(tmp_path / "plain").items()
    assert (tmp_path / "checked" / "quality.jsonl").read_text() == ""
    assert not (tmp_path / "plain" / "quality.jsonl").exists()


def test_a_shard_that_lost_all_its_clips_leaves_no_gap(tmp_path):
    class BeginsLate(FakeTTS):
        def synthesize(self, texts, speakers):
            self.late = self.calls >= 1
            return [clip * self.late for clip in super().synthesize(texts, speakers)]

    card = checked(tmp_path, tts=BeginsLate(["a", "b"])).run(CHECKED)
    assert card["quality"]["train"]["kept"] == 30
    assert len(list(read_manifest(tmp_path / "train"))) == 30
    assert check_manifest(tmp_path / "train").problems == []
