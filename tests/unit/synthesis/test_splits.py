# SPDX-License-Identifier: Apache-2.0
"""Who may speak what: voices that are held out, and voices of another language."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from nemo_rba.synthesis.speech import check_setup
from nemo_rba.synthesis.splits import Split, check_splits, voices_of
from nemo_rba.synthesis.tts import EspeakTTS
from nemo_rba.types import SamplingParams

from .conftest import FakeTTS

ROOT = Path(__file__).parents[3]
SAMPLED = SamplingParams(max_new_tokens=9)


def espeak(*voices: str, rate: int = 140) -> EspeakTTS:
    return EspeakTTS(voices=voices, rates=[rate], pitches=[35], sampling_rate=16000)


def split(name: str, tts, *, seen_speakers: bool = False) -> Split:
    return Split(name=name, instructions_of=name, size=5, tts=tts, augment=None, shares={}, num_responses=1,
                 recordings=1, seen_speakers=seen_speakers)  # fmt: skip


def check(train, dev, *, language: str | None = None, seen_speakers: bool = False) -> None:
    check_splits([split("train", train), split("dev", dev, seen_speakers=seen_speakers)], "train", SAMPLED, language)


def test_a_voice_at_another_rate_is_not_held_out():
    shared = r"split dev shares 1 speakers with train \(en-us-r141-p35, which is the voice en-us, ...\)"
    with pytest.raises(ValueError, match=shared):
        check(espeak("en-us", "en"), espeak("en-us", "en+f2", rate=141))
    check(espeak("en-us", "en"), espeak("en-us", rate=141), seen_speakers=True)
    check(espeak("en-us", "en"), espeak("en-us+f2", "en+f2", rate=140))


def test_a_voice_in_another_language_is_not_held_out():
    train, dev = FakeTTS(["en-0", "en-1"]), FakeTTS(["de-0", "de-2"])
    check(train, dev)
    assert voices_of(dev) == {"de-0": "de-0", "de-2": "de-2"}, "a speaker is a voice where nothing else is told"
    train.voices, dev.voices = {"en-0": "0", "en-1": "1"}, {"de-0": "0", "de-2": "2"}
    with pytest.raises(ValueError, match=r"shares 1 speakers with train \(de-0, which is the voice 0, ...\)"):
        check(train, dev)


def test_voices_of_another_language_are_refused_and_named():
    mixed = espeak("en-us", "de", "cmn", "en-gb-x-rp")
    message = r"split train: 2 of 4 speakers do not speak synthesis.language=en, but de \(de-r140-p35\), cmn \(cmn-r140"
    with pytest.raises(ValueError, match=message):
        check(mixed, espeak("en+f2"), language="en")
    check(mixed, espeak("en+f2"), language=None)
    check(espeak("en-us", "en-gb-x-rp", "en"), espeak("en+f2"), language="en")
    with pytest.raises(ValueError, match=r"split dev: 1 of 1 speakers do not speak synthesis.language=en-us, but en "):
        check(espeak("en-us"), espeak("en"), language="en-us")
    check(FakeTTS(["a"]), FakeTTS(["b"]), language="en")  # they do not tell


def composed(*overrides: str):
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        return compose("rba_tiny", overrides=list(overrides))


@pytest.fixture
def examples(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))


def test_the_recipe_of_the_tiny_world_holds_its_voices_out(examples):
    check_setup(instantiate(composed().synthesis).keywords)
    with pytest.raises(ValueError, match=r"split dev shares .* speakers with train .* which is the voice en-us,"):
        check_setup(instantiate(composed("dev_voices.voices=[en-us]", "dev_voices.rates=[141]").synthesis).keywords)
    with pytest.raises(ValueError, match=r"speakers do not speak synthesis.language=en, but de .*, cmn "):
        check_setup(instantiate(composed("train_voices.voices=[en-us,de,cmn]").synthesis).keywords)


def test_the_large_recipe_holds_its_speakers_out():
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        large = compose("rba_8b")
    assert not set(large.train_voices.speakers) & set(large.test_voices.speakers)
    assert large.synthesis.language == "en"
