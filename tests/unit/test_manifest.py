# SPDX-License-Identifier: Apache-2.0
import gzip
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lhotse import CutSet

from nemo_rba.manifest import (
    ManifestWriter,
    check_manifest,
    cut_to_instruction,
    cut_to_utterance,
    read_manifest,
    utterance_to_cut,
    validate_cut,
    write_shar,
)
from nemo_rba.types import Instruction, Utterance

RATE = 16000
STEP = 1 / 32768  # of 16-bit sound


def make_utterance(number: int, seconds: float = 0.1) -> Utterance:
    generator = torch.Generator().manual_seed(number)
    return Utterance(
        instruction=Instruction(
            id=f"train-{number:06d}",
            text=f"wie heißt nummer {number} 中文",
            response=f'so: "{number}"\n\tund | mehr',
            task="names",
            context="Antworte kurz:" if number % 2 else "",
            typed=f"wie heißt nr. {number} 中文" if number % 2 else "",
            aliases=("eins", "1") if number % 2 else (),
            extra={"options": ["A", "B"], "limit": 3} if number % 2 else {},
        ),
        audio=torch.rand(int(seconds * RATE) + number, generator=generator) * 2 - 1,
        sampling_rate=RATE,
        speaker="en-us+m3-r170-p50",
    )


@pytest.fixture
def shar(tmp_path: Path) -> Path:
    folder = tmp_path / "train"
    write_shar([make_utterance(i) for i in range(5)], folder, shard_size=2, audio_format="flac", teacher="T")
    return folder


def check(cut, **changes) -> str | None:
    return validate_cut(cut, **({"sampling_rate": RATE, "max_duration_seconds": 1.0} | changes))


@pytest.mark.parametrize("audio_format", ["flac", "wav"])
def test_a_written_folder_reads_back_the_same(tmp_path, audio_format):
    written = [make_utterance(i) for i in range(5)]
    write_shar(written, tmp_path / "a" / "b", shard_size=2, audio_format=audio_format, teacher="T")
    cuts = list(read_manifest(tmp_path / "a" / "b"))
    assert len(cuts) == 5
    assert len(list((tmp_path / "a" / "b").iterdir())) == 6  # 3 shards of cuts and recordings
    for utterance, cut in zip(written, cuts, strict=True):
        found = cut_to_utterance(cut)
        assert found.instruction == utterance.instruction == cut_to_instruction(cut)
        assert found.speaker == utterance.speaker == cut.supervisions[0].speaker
        assert (found.sampling_rate, found.audio.dtype) == (RATE, torch.float32)
        assert found.audio.shape == utterance.audio.shape
        assert (found.audio - utterance.audio).abs().max() <= 1.01 * STEP
        assert cut.custom["teacher"] == "T"
        assert cut.custom["rba_manifest"] == 1
        assert check(cut) is None


def test_a_cut_in_memory_is_an_utterance():
    utterance = make_utterance(3)
    found = cut_to_utterance(utterance_to_cut(utterance, teacher="T"))
    assert found.instruction == utterance.instruction
    assert (found.audio - utterance.audio).abs().max() <= 1.01 * STEP


def test_shards_can_be_written_one_at_a_time(tmp_path):
    for shard in (1, 0):
        with ManifestWriter(folder=tmp_path, shard_size=2, audio_format="flac", teacher="T", first_shard=shard) as w:
            for number in (2 * shard, 2 * shard + 1):
                w.write(make_utterance(number))
    assert [cut.id for cut in read_manifest(tmp_path)] == [f"train-{i:06d}" for i in range(4)]


def test_a_jsonl_of_files_is_read_lazily(tmp_path):
    cut = utterance_to_cut(make_utterance(1), teacher="T").save_audio(tmp_path / "a.wav")
    CutSet.from_cuts([cut]).to_file(tmp_path / "cuts.jsonl.gz")
    (found,) = read_manifest(tmp_path / "cuts.jsonl.gz")
    assert cut_to_instruction(found) == make_utterance(1).instruction
    assert check_manifest(tmp_path / "cuts.jsonl.gz").problems == []


def test_validate_cut_gives_the_reason():
    good = utterance_to_cut(make_utterance(0), teacher="T")
    assert check(good) is None

    def changed(**custom):
        cut = utterance_to_cut(make_utterance(0), teacher="T")
        cut.custom = {k: v for k, v in {**cut.custom, **custom}.items() if v is not None}
        return cut

    silent = utterance_to_cut(make_utterance(0), teacher="T")
    silent.supervisions = []
    wordless = utterance_to_cut(make_utterance(0), teacher="T")
    wordless.supervisions[0].text = " "
    bare = utterance_to_cut(make_utterance(0), teacher="T")
    bare.custom = None
    assert "no supervision" in check(silent)
    assert "empty supervisions[0].text" in check(wordless)
    assert "no custom field rba_manifest" in check(bare)
    assert "no custom field rba_manifest" in check(changed(rba_manifest=None))
    assert check(changed(rba_manifest=2)) == "has rba_manifest 2, this version of nemo_rba reads 1"
    assert check(changed(response="")) == "has an empty response"
    assert check(changed(response=""), needs_response=False) is None
    assert check(changed(extra=["a"])) == "has a custom field extra that is not an object"
    assert check(changed(response=None)) == "has no custom field response"
    assert check(changed(task=3)) == "has a custom field task that is not text"
    assert check(changed(aliases=["four", "4"])) is None
    assert check(changed(typed=["4"])) == "has a custom field typed that is not text"
    for wrong in ("four", ["four", ""], [4]):
        assert check(changed(aliases=wrong)) == "has a custom field aliases that is not a list of answers"
    assert check(good, sampling_rate=8000) == "is sampled at 16000 Hz, expected 8000 Hz"
    assert check(good, max_duration_seconds=0.05) == "is longer than 0.05 s"
    assert "expected a MonoCut" in check(good.pad(duration=1.0))
    good.recording = None
    assert check(good) == "has no recording"


def test_a_sound_manifest_is_counted(shar):
    report = check_manifest(shar)
    assert report.problems == []
    assert (report.num_cuts, report.num_broken) == (5, 0)
    assert report.tasks == {"names": 5}
    assert report.speakers == {"en-us+m3-r170-p50": 5}
    assert report.seconds == pytest.approx(5 * 0.1 + 10 / RATE)


def test_missing_things_are_named(tmp_path, shar):
    with pytest.raises(ValueError, match="no manifest at"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no cuts"):
        read_manifest(tmp_path)
    (tmp_path / "cuts.txt").write_text("")
    with pytest.raises(ValueError, match=r"ending in .jsonl"):
        read_manifest(tmp_path / "cuts.txt")
    (shar / "recording.000001.tar").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 shard files: recording.000001.tar"):
        read_manifest(shar)
    (shar / "cuts.000001.jsonl.gz").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 shard files: cuts.000001"):
        check_manifest(shar)


def test_a_line_cut_off_is_found_and_named(tmp_path, shar):
    lines = b"".join(gzip.decompress(path.read_bytes()) for path in sorted(shar.glob("cuts*")))
    (tmp_path / "cuts.jsonl").write_bytes(lines[:-40])
    report = check_manifest(tmp_path / "cuts.jsonl")
    assert (report.num_cuts, report.num_broken) == (4, 1)
    assert "line 5 (item 'train-000004') is cut off" in report.problems[0]


def test_damaged_shards_are_found(shar):
    cuts = shar / "cuts.000000.jsonl.gz"
    cuts.write_bytes(cuts.read_bytes()[:-30])
    archive = shar / "recording.000001.tar"
    archive.write_bytes(archive.read_bytes()[:5000])
    problems = "\n".join(check_manifest(shar).problems)
    assert "cuts.000000.jsonl.gz ends early" in problems
    assert "recording.000001.tar is damaged" in problems
    assert "recording.000002" not in problems


def test_a_foreign_archive_is_found(shar):
    (shar / "recording.000000.tar").write_bytes((shar / "recording.000001.tar").read_bytes())
    (problem,) = check_manifest(shar).problems
    assert "does not match its cuts (first at cut 'train-000000')" in problem


def test_unusable_cuts_are_counted_by_reason(tmp_path):
    utterance = make_utterance(0)
    silent = replace(utterance, instruction=replace(utterance.instruction, response=""))
    write_shar([silent], tmp_path / "x", shard_size=1, audio_format="wav", teacher="T")
    report = check_manifest(tmp_path / "x")
    assert report.reasons == {"has an empty response": 1}
    assert "1 cuts of" in report.problems[0]


def test_writer_refuses_what_it_cannot_write(tmp_path):
    with pytest.raises(ValueError, match="audio_format is 'mp3'"):
        ManifestWriter(folder=tmp_path, shard_size=1, audio_format="mp3", teacher="T", first_shard=0)
    with pytest.raises(ValueError, match="shard_size is 0"):
        ManifestWriter(folder=tmp_path, shard_size=0, audio_format="wav", teacher="T", first_shard=0)
