# SPDX-License-Identifier: Apache-2.0
import io
import os
import signal

import numpy as np
import pytest
import soundfile

from nemo_rba.interruption import raise_on
from nemo_rba.synthesis import tts

# What a callback drops is reported here.
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
SOUND = np.random.default_rng(0).uniform(-0.5, 0.5, 50_000)


class Disturbing(io.BytesIO):
    """A sound file that sends a signal while it is being read."""

    def __init__(self, content: bytes, num_calls: int):
        super().__init__(content)
        self.num_calls = num_calls

    def readinto(self, buffer) -> int:
        self.num_calls -= 1
        if self.num_calls == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().readinto(buffer)


@pytest.fixture
def stopped_by_sigterm():
    before = {sig: signal.getsignal(sig) for sig in (signal.SIGTERM, signal.SIGALRM)}
    raise_on(signal.SIGTERM, lambda: SystemExit("stopped"))
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    for sig, handler in before.items():
        signal.signal(sig, handler)


def wait() -> None:
    signal.sigtimedwait([], 10)  # until a handler has run


def test_outside_of_callbacks_it_is_raised_at_once(stopped_by_sigterm):
    with pytest.raises(SystemExit, match="stopped"):
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("call", [1, 2, 5])
def test_a_sound_is_read_to_its_end(call, stopped_by_sigterm):
    soundfile.write(whole := io.BytesIO(), SOUND, 16000, format="FLAC")
    expected, _ = soundfile.read(io.BytesIO(whole.getvalue()))
    found = []

    def read() -> None:
        found.append(soundfile.read(file)[0])
        wait()

    file = Disturbing(whole.getvalue(), call)
    with pytest.raises(SystemExit, match="stopped"):
        read()
    assert file.num_calls <= 0
    for sound in found:  # it may have been raised after the last callback, before the sound was there
        np.testing.assert_array_equal(sound, expected)


def test_a_clip_is_spoken_to_its_end(stopped_by_sigterm, monkeypatch):
    voice = tts.EspeakTTS(voices=["en"], rates=[160], pitches=[50], sampling_rate=16000)
    (expected,) = voice.synthesize(["good morning"], voice.speakers)
    chunks, copy, found = [], tts.np.frombuffer, []

    def disturb(*arguments, **keywords):
        chunks.append(1)
        if len(chunks) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return copy(*arguments, **keywords)

    def speak() -> None:
        found.append(voice.synthesize(["good morning"], voice.speakers)[0])
        wait()

    monkeypatch.setattr(tts.np, "frombuffer", disturb)
    with pytest.raises(SystemExit, match="stopped"):
        speak()
    assert len(chunks) >= 2
    assert all(clip.equal(expected) for clip in found)
