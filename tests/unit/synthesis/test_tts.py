# SPDX-License-Identifier: Apache-2.0
import ctypes
import gc

import numpy as np
import pytest
import torch

from nemo_rba.synthesis.tts import EspeakTTS, resample, trim_silence
from nemo_rba.synthesis.tts_fastpitch import FastPitchTTS

RATE = 16000
TEXTS = ["what is one plus two", "name three animals politely", "hello"]


def build(**changes) -> EspeakTTS:
    settings = {"voices": ["en-us+m3", "en"], "rates": [170], "pitches": [30, 70], "sampling_rate": RATE}
    return EspeakTTS(**(settings | changes))


@pytest.fixture(scope="module")
def tts() -> EspeakTTS:
    return build()


def test_speakers_are_all_combinations(tts):
    assert tts.speakers == ("en-us+m3-r170-p30", "en-us+m3-r170-p70", "en-r170-p30", "en-r170-p70")
    assert tts.sampling_rate == RATE


def test_a_voice_is_the_same_at_any_rate_and_pitch(tts):
    assert [tts.voices[speaker] for speaker in tts.speakers] == ["en-us+m3", "en-us+m3", "en", "en"]
    assert [tts.languages[speaker] for speaker in tts.speakers] == ["en-us", "en-us", "en", "en"]


def test_speech_is_mono_float_with_short_edges(tts):
    for audio, text in zip(tts.synthesize(TEXTS, tts.speakers[:3]), TEXTS, strict=True):
        assert audio.dtype == torch.float32
        assert audio.dim() == 1
        assert 0.05 < audio.abs().max() <= 1
        assert 0.04 * len(text) < len(audio) / RATE < 0.15 * len(text)  # seconds per letter
        loud = torch.nonzero(audio.abs() > 1e-3)[:, 0]
        assert loud[0] <= 0.05 * RATE + 1
        assert len(audio) - loud[-1] <= 0.05 * RATE + 2


def test_speech_depends_on_text_and_speaker_alone(tts):
    forth = tts.synthesize(TEXTS, tts.speakers[:3])
    back = tts.synthesize(TEXTS[::-1], tts.speakers[2::-1])[::-1]
    assert all(torch.equal(a, b) for a, b in zip(forth, back, strict=True))
    other = build().synthesize(TEXTS[2:], tts.speakers[2:3])
    assert torch.equal(other[0], forth[2])
    assert len(tts.synthesize(["hello"], ["en-r170-p30"])[0]) > 0
    low, high = tts.synthesize(["hello"] * 2, ["en-r170-p30", "en-r170-p70"])
    assert low.shape != high.shape or not torch.equal(low, high)


def test_rate_is_heard():
    tts = build(voices=["en"], rates=[100, 300], pitches=[50])
    slow, fast = tts.synthesize(TEXTS[:1] * 2, tts.speakers)
    assert len(slow) > 1.5 * len(fast)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"voices": ["en-gb"]}, r"no voice 'en-gb' .* it has en, en-029"),
        ({"voices": ["martian"]}, "no voice 'martian'"),
        ({"voices": ["en+zz"]}, r"no variant 'zz' .*'m3'"),
        ({"rates": [20]}, r"tts.rates has 20; expected whole numbers 80 to 450"),
        ({"rates": [170.5]}, r"tts.rates has 170.5"),
        ({"pitches": [100]}, r"tts.pitches has 100; expected whole numbers 0 to 99"),
        ({"voices": []}, "has no speakers"),
        ({"sampling_rate": 16}, r"tts.sampling_rate is 16"),
    ],
)
def test_impossible_voices_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_impossible_requests_are_refused(tts):
    with pytest.raises(ValueError, match="unknown speaker 'bob'"):
        tts.synthesize(["hello"], ["bob"])
    with pytest.raises(ValueError, match="2 texts but 1 speakers"):
        tts.synthesize(["hello"] * 2, tts.speakers[:1])
    for silent in ("", " ... "):
        with pytest.raises(ValueError, match=f"no sound came out of the text '{silent}'"):
            tts.synthesize([silent], tts.speakers[:1])


def test_resample_keeps_a_tone():
    seconds = np.arange(22050) / 22050
    tone = np.sin(2 * np.pi * 440 * seconds).astype(np.float32)
    found = resample(tone, 22050, RATE)
    assert found.shape == (RATE,)
    expected = np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)
    assert np.abs(found - expected)[200:-200].max() < 1e-3
    assert resample(tone, RATE, RATE).shape == tone.shape


def test_trim_silence_by_hand():
    audio = torch.zeros(10000)
    audio[5000:6000] = 0.5
    assert len(trim_silence(audio, 1000, "x")) == 1100  # 50 ms = 50 samples on both sides
    with pytest.raises(ValueError, match="text 'x'"):
        trim_silence(torch.zeros(100), 1000, "x")


def test_fastpitch_says_which_model_is_missing(tmp_path):
    settings = {"vocoder": "v.nemo", "speakers": [0], "pace": 1.0, "batch_size": 2, "sampling_rate": RATE}
    with pytest.raises(ValueError, match=r"tts.fastpitch: no file '.*gone.nemo' with a FastPitchModel; download it"):
        FastPitchTTS(fastpitch=str(tmp_path / "gone.nemo"), device="cpu", **settings)
    with pytest.raises(ValueError, match=r"tts.fastpitch: cannot load FastPitchModel 'no_such_model'"):
        FastPitchTTS(fastpitch="no_such_model", device="cpu", **settings)


class _Allocated(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
    ))  # fmt: skip


def test_speaking_keeps_no_memory():
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("needs glibc")
    libc.mallinfo2.restype = _Allocated
    tts = build()

    def in_use() -> int:
        for number in range(40):
            tts.synthesize([f"this is number {number}"], [tts.speakers[number % 4]])
        gc.collect()
        return libc.mallinfo2().uordblks

    in_use()
    before = in_use()
    assert in_use() - before < 40 * 500, "the library keeps 2 kB a clip of its own"
