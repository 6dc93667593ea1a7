# SPDX-License-Identifier: Apache-2.0
"""Speech that fails: of one text, of the machine, of a synthesizer; and speech while the teacher still writes."""

import json
import time
from pathlib import Path

import pytest
import torch

from nemo_rba.manifest import cut_to_utterance, read_manifest
from nemo_rba.synthesis.augment_effects import Codec
from nemo_rba.synthesis.pipeline import SelfSynthesis
from nemo_rba.synthesis.quality import QualityControl, SilenceCheck
from nemo_rba.synthesis.speech import check_setup
from nemo_rba.synthesis.splits import Split
from nemo_rba.types import SamplingParams

from .conftest import FakeTeacher, FakeTTS
from .test_pipeline import CONFIG, build, rows_of

SIZE = 40


def train(tts, augment=None, size: int = SIZE) -> Split:
    return Split(name="train", instructions_of="train", size=size, tts=tts, augment=augment, shares={},
                 seen_speakers=True, num_responses=1, recordings=1)  # fmt: skip


def synthesis(output: Path, tts, *, augment=None, size: int = SIZE, **changes) -> SelfSynthesis:
    """One split, clean and unchecked unless told otherwise."""
    settings = {"splits": [train(tts, augment, size)], "split_of": lambda text: "train", "shard_size": 4}
    return build(output, **(settings | {"max_failed_share": 1.0, "language": None} | changes))


def kept(output: Path) -> dict[str, torch.Tensor]:
    return {cut.id: cut_to_utterance(cut).audio for cut in read_manifest(output / "train")}


def lost(output: Path) -> dict[str, list[dict]]:
    found = {}
    for row in rows_of(output, "dropped.jsonl"):
        if row["id"].startswith("train-"):
            found.setdefault(row["reason"], []).append(row)
    return found


class Saying(FakeTTS):
    """Passes each waveform through ``change(text, waveform)``."""

    def __init__(self, change):
        super().__init__(["a", "b"])
        self._change = change

    def synthesize(self, texts, speakers):
        return [self._change(*pair) for pair in zip(texts, super().synthesize(texts, speakers), strict=True)]


def spoilt(text: str, audio: torch.Tensor) -> torch.Tensor:
    words = text.split()
    if "cat" in words:
        audio[3] = torch.nan
    elif "dog" in words:
        audio[:] = -torch.inf
    return audio[:0] if "red" in words else audio


@pytest.mark.parametrize("checked", [False, True])
def test_what_is_no_sound_is_never_written_whatever_is_checked(tmp_path, checked):
    checks = {"silence": SilenceCheck(level_db=-90, borderline=0.5, maximum=0.99)}
    quality = QualityControl(checks=checks, max_dropped_share=1.0) if checked else None
    card = synthesis(tmp_path, Saying(spoilt), quality=quality).run(CONFIG)
    found, clips = lost(tmp_path), kept(tmp_path)
    assert set(found) == {"speech: samples are NaN or infinite", "speech: no samples"}
    assert all("red" in row["text"].split() for row in found["speech: no samples"])
    bad = found["speech: samples are NaN or infinite"]
    assert {word for row in bad for word in row["text"].split()} >= {"cat", "dog"}
    assert all(len(audio) > 0 and audio.isfinite().all() and audio.abs().max() > 0.1 for audio in clips.values())
    assert len(clips) + sum(map(len, found.values())) == SIZE
    assert sum(card["dropped"][reason] for reason in found) == SIZE - len(clips)


def test_silence_is_the_business_of_the_checks(tmp_path):
    synthesis(tmp_path, Saying(lambda text, audio: audio * 0)).run(CONFIG)
    assert len(kept(tmp_path)) == SIZE


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda audio: audio * torch.nan, "speech: samples are NaN or infinite after augmentation"),
        (lambda audio: audio[:0], "speech: no samples after augmentation"),
    ],
)
def test_what_an_augmentation_spoils_is_not_written_either(tmp_path, spoil, reason):
    def augment(audio, sampling_rate, key):
        return spoil(audio) if key.endswith("7") else audio * 0.5

    synthesis(tmp_path, FakeTTS(["a", "b"]), augment=augment).run(CONFIG)
    found, clips = lost(tmp_path), kept(tmp_path)
    assert [row["id"] for row in found.pop(reason)] == [f"train-{n:06d}" for n in (7, 17, 27, 37)]
    assert found == {}
    assert len(clips) == SIZE - 4
    assert all(0.4 < audio.abs().max() <= 0.5 for audio in clips.values())


class Failing(FakeTTS):
    """Raises ``error`` where a text has the word."""

    def __init__(self, error: BaseException, word: str):
        super().__init__(["a", "b"])
        self._error, self._word = error, word

    def synthesize(self, texts, speakers):
        clips = super().synthesize(texts, speakers)
        if any(self._word in text.split() for text in texts):
            raise self._error
        return clips


def test_a_text_that_a_synthesizer_fails_on_is_counted_and_the_others_are_spoken(tmp_path):
    kernel = RuntimeError("Calculated padded input size per channel: (2). Kernel size: (3)")
    synthesis(tmp_path / "failing", Failing(kernel, "cat")).run(CONFIG)
    synthesis(tmp_path / "sound", FakeTTS(["a", "b"])).run(CONFIG)
    found, clips, sound = lost(tmp_path / "failing"), kept(tmp_path / "failing"), kept(tmp_path / "sound")
    (failed,) = found.values()
    assert list(found) == ["speech: the synthesizer failed (RuntimeError)"]
    assert all("cat" in row["text"].split() for row in failed)
    assert len(sound) == SIZE
    assert clips.keys() == sound.keys() - {row["id"] for row in failed}
    assert all(torch.equal(clips[name], sound[name]) for name in clips)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError("no memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        TypeError("synthesize() takes 1 argument"),
    ],
)
def test_trouble_of_the_machine_and_of_the_program_is_no_fault_of_a_text(tmp_path, error):
    with pytest.raises(type(error)) as caught:
        synthesis(tmp_path, Failing(error, "cat")).run(CONFIG)
    assert caught.value is error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text, audio: audio[None], r"Saying gave audio of \(1, \d+\), torch.float32; expected mono, a float32"),
        (lambda text, audio: (audio * 9).short(), r"Saying gave audio of \(\d+,\), torch.int16; expected mono"),
        (lambda text, audio: audio.numpy(), "Saying gave audio of ndarray; expected mono"),
    ],
)
def test_what_is_not_mono_audio_is_an_error_at_once(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        synthesis(tmp_path, Saying(change)).run(CONFIG)
    assert not list((tmp_path / "speech").glob("*"))


def test_an_augmentation_must_give_mono_audio_as_well(tmp_path):
    def stereo(audio, sampling_rate, key):
        return torch.stack([audio, audio])

    with pytest.raises(ValueError, match=r"the augmentation function gave audio of \(2, \d+\)"):
        synthesis(tmp_path, FakeTTS(["a", "b"]), augment=stereo).run(CONFIG)


def test_a_synthesizer_that_forgets_a_text_is_told_of(tmp_path):
    class Forgetful(FakeTTS):
        def synthesize(self, texts, speakers):
            return super().synthesize(texts, speakers)[1:]

    with pytest.raises(ValueError, match="Forgetful gave 3 waveforms for 4 texts"):
        synthesis(tmp_path, Forgetful(["a", "b"])).run(CONFIG)


@pytest.mark.parametrize(
    ("tts", "changes", "reason"),
    [
        (Failing(ValueError("no"), "cat"), {"max_duration_seconds": 0.01}, r"speech: longer than 0.01 s \(\d+\)"),
        (Saying(lambda text, audio: audio * torch.nan), {}, r"speech: samples are NaN or infinite \(12\)"),
        (Saying(lambda text, audio: audio[:0]), {}, r"speech: no samples \(12\)"),
    ],
)
def test_a_run_that_loses_more_than_is_allowed_stops_early_without_any_checks(tmp_path, tts, changes, reason):
    message = r"split train: 12 of 40 clips dropped so far, more than synthesis.max_failed_share=0.2 allows, for .*"
    with pytest.raises(ValueError, match=message + reason):
        synthesis(tmp_path, tts, max_failed_share=0.2, **changes).run(CONFIG)
    assert sum(map(len, lost(tmp_path).values())) == 12
    assert not (tmp_path / "card.json").exists()


def test_a_run_that_was_stopped_goes_on_when_more_may_fail(tmp_path):
    tts = Failing(ValueError("no"), "cat")
    with pytest.raises(ValueError, match=r"more than synthesis.max_failed_share=0 allows"):
        synthesis(tmp_path, tts, max_failed_share=0.0).run(CONFIG | {"max_failed_share": 0.0})
    card = synthesis(tmp_path, tts, max_failed_share=0.5).run(CONFIG | {"max_failed_share": 0.5})
    assert 0 < card["dropped"]["speech: the synthesizer refused the text"] == SIZE - len(kept(tmp_path))


def test_the_share_is_of_the_clips_that_there_were_and_not_of_those_asked_for(tmp_path):
    mute = Saying(lambda text, audio: audio[:0])
    few = {"size": 1000, "max_batches": 1, "allow_fewer": True, "max_failed_share": 0.5}
    with pytest.raises(ValueError, match=r"split train: (\d+) of \1 clips dropped so far"):
        synthesis(tmp_path, mute, **few).run(CONFIG)


WRONG = [
    ({"shard_size": 0}, "synthesis.shard_size is 0; expected at least 1"),
    ({"audio_format": "ogg"}, "synthesis.audio_format is 'ogg'; expected one of flac, wav"),
    ({"max_duration_seconds": 0.0}, "synthesis.max_duration_seconds is 0.0; expected seconds above 0"),
    ({"max_failed_share": 10}, "synthesis.max_failed_share is 10; expected a share from 0 to 1"),
]


def setup(**changes) -> dict:
    """Of the keyword arguments of ``SelfSynthesis`` those about speech: there is no teacher yet."""
    settings = {"splits": [train(FakeTTS(["a"]))], "train_split": "train", "shard_size": 4, "audio_format": "flac",
                "response_params": SamplingParams(max_new_tokens=9), "language": None, "max_duration_seconds": 10.0,
                "max_failed_share": 0.1, "quality": None}  # fmt: skip
    return settings | changes


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_what_could_never_be_written_is_refused_at_setup(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        synthesis(tmp_path / "data", FakeTTS(["a"]), **changes)
    check_setup(setup())
    with pytest.raises(ValueError, match=message):
        check_setup(setup(**changes))


def test_a_rate_that_an_augmentation_lacks_is_refused_at_setup():
    low = FakeTTS(["a"])
    low.sampling_rate = 22050
    opus = Codec(codecs=["mp3", "opus"], compression_min=0.1, compression_max=0.5, seed=1)
    with pytest.raises(ValueError, match=r"cannot write opus at 22050 Hz .* or another rate"):
        check_setup(setup(splits=[train(low, opus)]))
    check_setup(setup(splits=[train(FakeTTS(["a"]), opus)]))


def test_clips_are_spoken_while_the_teacher_still_writes(tmp_path):
    class Waiting(FakeTeacher):
        """Writes its second batch only when the first clips exist; gives up waiting after a while."""

        def generate(self, prompts, params):
            deadline = time.monotonic() + (20 if self.calls >= 2 else 0)
            while time.monotonic() < deadline and not self.clips():
                time.sleep(0.01)
            self.clips_at_last_call = self.clips()
            return super().generate(prompts, params)

        def clips(self) -> int:
            return sum(json.loads(path.read_text())["clips"] for path in (tmp_path / "speech").glob("*.json"))

    teacher = Waiting()
    synthesis(tmp_path, FakeTTS(["a", "b"]), teacher=teacher).run(CONFIG)
    assert teacher.calls >= 4, "a second batch was needed"
    assert 0 < teacher.clips_at_last_call < SIZE
