# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from nemo_rba.synthesis.augment import Chain, OneOf, check_rate
from nemo_rba.synthesis.augment_effects import (
    Codec,
    GeneratedReverberation,
    RecordedReverberation,
    Speed,
    Telephone,
    Tempo,
    Volume,
    generate_rir,
)

RATE = 16000
SECONDS = torch.arange(2 * RATE) / RATE
TONE = 0.5 * torch.sin(2 * torch.pi * 440 * SECONDS)
SPEECH = TONE * (SECONDS * 4 % 1 < 0.5)  # bursts of 125 ms
CONFIGS = sorted((Path(__file__).parents[3] / "conf" / "augmentation").glob("*.yaml"))


def hertz(audio: torch.Tensor, rate: int = RATE) -> float:
    """The strongest frequency."""
    return float(torch.fft.rfft(audio).abs().argmax()) * rate / len(audio)


def power(audio: torch.Tensor) -> float:
    return float(audio.square().mean())


@pytest.fixture(scope="module")
def rirs(tmp_path_factory) -> list[str]:
    """An echo after 100 ms at 8 kHz, and two channels: an echo after 50 ms, and one after 200 ms."""
    folder = tmp_path_factory.mktemp("rirs")
    echo, stereo = np.zeros(2000), np.zeros((8000, 2))
    echo[40], echo[840] = 1.0, 0.5
    stereo[0], stereo[800, 0], stereo[3200, 1] = 1.0, 0.5, 0.5
    soundfile.write(folder / "echo.wav", echo, 8000, subtype="FLOAT")
    soundfile.write(folder / "stereo.wav", stereo, RATE, subtype="FLOAT")
    return [str(folder / "echo.wav"), str(folder / "stereo.wav")]


def every_effect(rirs: list[str], seed: int = 1) -> dict:
    return {
        "recorded room": RecordedReverberation(rir_files=rirs, seed=seed),
        "generated room": GeneratedReverberation(t60_min=0.2, t60_max=0.5, drr_db_min=0, drr_db_max=9, seed=seed),
        "speed": Speed(factors=[0.8, 0.9, 1.1, 1.2], seed=seed),
        "tempo": Tempo(factors=[0.8, 0.9, 1.1, 1.2], seed=seed),
        "volume": Volume(gain_db_min=-20, gain_db_max=3, seed=seed),
        "telephone": Telephone(codecs=["mulaw", "alaw", "gsm"], seed=seed),
        "codec": Codec(codecs=["mp3", "opus", "vorbis"], compression_min=0.2, compression_max=0.9, seed=seed),
    }


def test_every_effect_depends_on_seed_and_key_alone(rirs):
    others = every_effect(rirs)
    for name, effect in every_effect(rirs).items():
        before = SPEECH.clone()
        outcomes = [effect(SPEECH, RATE, f"utterance {i}") for i in range(12)]
        again = [others[name](SPEECH, RATE, f"utterance {i}") for i in reversed(range(12))][::-1]
        assert torch.equal(SPEECH, before), f"{name} changed what it was given"
        for one, two in zip(outcomes, again, strict=True):
            assert torch.equal(one, two), name
            assert one.dtype == torch.float32
            assert one.dim() == 1
            assert one.abs().max() <= 1
        assert len({tuple(one.tolist()) for one in outcomes}) > 1, f"{name} draws nothing"
        reseeded = every_effect(rirs, seed=2)[name]
        assert any(not torch.equal(reseeded(SPEECH, RATE, f"utterance {i}"), outcomes[i]) for i in range(6)), name
        if name not in ("speed", "tempo"):
            assert {len(one) for one in outcomes} == {len(SPEECH)}


def test_a_recorded_room_adds_its_echo_and_keeps_place_length_and_power(rirs):
    click = torch.zeros(RATE)
    click[4000] = 0.9
    heard = RecordedReverberation(rir_files=rirs[:1], seed=1)(click, RATE, "a")
    assert heard.shape == click.shape
    loudest = heard.abs().topk(40).indices
    assert int(heard.abs().argmax()) == 4000, "the direct sound stays where it was"
    assert all(abs(int(i) - 4000) < 20 or abs(int(i) - 5600) < 20 for i in loudest), "its echo, 100 ms later"
    assert power(heard) == pytest.approx(power(click), rel=1e-3)
    echoes = {
        int(RecordedReverberation(rir_files=rirs[1:], seed=1)(click, RATE, str(i)).abs().topk(2).indices.max())
        for i in range(12)
    }
    assert echoes == {4800, 7200}, "any channel of the file"


def test_a_generated_room_has_the_decay_and_the_ratio_asked_for():
    rir = generate_rir(np.random.default_rng(0), 0.5, 6.0, RATE)
    assert len(rir) == 8000
    assert rir[0] == 1
    assert 10 * np.log10(1 / np.square(rir[1:]).sum()) == pytest.approx(6, abs=1e-3)
    early, late = (np.square(rir[a : a + 800]).mean() for a in (800, 4800))  # 0.25 s apart: 30 dB of 60 in 0.5 s
    assert 10 * np.log10(early / late) == pytest.approx(30, abs=1.5)
    heard = GeneratedReverberation(t60_min=0.5, t60_max=0.5, drr_db_min=0, drr_db_max=0, seed=1)(SPEECH, RATE, "a")
    assert power(heard) == pytest.approx(power(SPEECH), rel=1e-3)
    gap = slice(2100, 3900)  # between the first two bursts
    assert SPEECH[gap].abs().max() == 0
    assert power(heard[gap]) > 0.02 * power(SPEECH)


def test_speed_moves_the_pitch_and_tempo_does_not():
    faster, slower = Speed(factors=[1.25], seed=1)(TONE, RATE, "a"), Speed(factors=[0.8], seed=1)(TONE, RATE, "a")
    assert (len(faster), len(slower)) == (25600, 40000)
    assert hertz(faster) == pytest.approx(550, abs=1)
    assert hertz(slower) == pytest.approx(352, abs=1)
    faster, slower = Tempo(factors=[1.25], seed=1)(TONE, RATE, "a"), Tempo(factors=[0.8], seed=1)(TONE, RATE, "a")
    assert (len(faster), len(slower)) == (25600, 40000)
    assert hertz(faster) == pytest.approx(440, abs=1)
    assert hertz(slower) == pytest.approx(440, abs=1)
    assert torch.equal(Speed(factors=[1.0], seed=1)(TONE, RATE, "a"), TONE)
    assert torch.equal(Tempo(factors=[1], seed=1)(TONE, RATE, "a"), TONE)


def test_volume_is_in_decibels_and_clips_at_full_scale():
    softer = Volume(gain_db_min=-20, gain_db_max=-20, seed=1)(TONE, RATE, "a")
    torch.testing.assert_close(softer, TONE / 10)
    louder = Volume(gain_db_min=20, gain_db_max=20, seed=1)(TONE, RATE, "a")
    assert louder.abs().max() == 1
    assert (louder.abs() == 1).float().mean() > 0.8


@pytest.mark.parametrize("codec", ["mulaw", "alaw", "gsm"])
def test_a_telephone_keeps_what_is_below_4_khz(codec):
    low, high = (0.4 * torch.sin(2 * torch.pi * f * SECONDS) for f in (1000, 6000))
    telephone = Telephone(codecs=[codec], seed=1)
    heard = telephone(low + high, RATE, "a")
    assert len(heard) == len(low)
    assert power(telephone(high, RATE, "a")) < 0.001 * power(high)
    noise = heard - low
    assert 10 * np.log10(power(low) / power(noise[200:-200])) > (20 if codec != "gsm" else 3)
    assert not torch.equal(heard, low)
    at_8k = telephone(low[::2], 8000, "a")
    assert len(at_8k) == len(low[::2])
    assert len(telephone(low[:777], 22050, "a")) == 777


@pytest.mark.parametrize("codec", ["mp3", "opus", "vorbis"])
def test_a_codec_loses_more_the_more_it_compresses(codec):
    rng = np.random.default_rng(0)
    audio = SPEECH + torch.from_numpy(0.02 * rng.standard_normal(len(SPEECH))).float()

    def loss(level: float) -> float:
        coded = Codec(codecs=[codec], compression_min=level, compression_max=level, seed=1)(audio, RATE, "a")
        return power(coded - audio)

    assert 0 < loss(0.1) < loss(0.95) < 2 * power(audio)


def test_silence_and_very_short_clips_pass(rirs):
    for name, effect in every_effect(rirs).items():
        assert effect(torch.zeros(RATE), RATE, "a").abs().max() < 1e-3, name
        assert torch.isfinite(effect(TONE[:50], RATE, "a")).all(), name


def test_a_chain_is_one_after_the_other_with_draws_of_their_own():
    halve = Volume(gain_db_min=-6, gain_db_max=-6, seed=1)
    tempo = Speed(factors=[2.0], seed=1)
    heard = Chain(augmentations=[halve, tempo])(TONE, RATE, "a")
    assert len(heard) == len(TONE) // 2
    torch.testing.assert_close(heard, tempo(halve(TONE, RATE, "a"), RATE, "a"))
    gain = Volume(gain_db_min=-30, gain_db_max=0, seed=1)
    once = gain(TONE, RATE, "a")[100] / TONE[100]
    twice = Chain(augmentations=[gain, gain])(TONE, RATE, "a")[100] / TONE[100]
    assert twice != pytest.approx(float(once**2), rel=0.01), "the same seed, but not the same draw twice"
    with pytest.raises(ValueError, match="Chain is empty"):
        Chain(augmentations=[])


def test_one_of_several_is_drawn_as_often_as_asked():
    tenth, half = (Volume(gain_db_min=db, gain_db_max=db, seed=1) for db in (-20, -6))
    choice = OneOf(augmentations=[None, tenth, half], probabilities=[0.5, 0.3, 0.2], seed=1)
    levels = [
        round(float(choice(TONE[:100], RATE, str(i)).abs().max() / TONE[:100].abs().max()), 1) for i in range(400)
    ]
    counts = {level: levels.count(level) for level in (1.0, 0.1, 0.5)}
    assert sum(counts.values()) == 400
    assert counts[1.0] == pytest.approx(200, abs=40)
    assert counts[0.1] == pytest.approx(120, abs=35)
    assert choice(TONE, RATE, "7").equal(choice(TONE, RATE, "7"))
    for probabilities in ([0.5, 0.5], [0.5, 0.3, 0.3], [1.5, -0.5, 0.0]):
        with pytest.raises(ValueError, match="expected one for each, at least 0, adding up to 1"):
            OneOf(augmentations=[None, tenth, half], probabilities=probabilities, seed=1)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RecordedReverberation(rir_files=["/nowhere.wav"], seed=1), r"1 of 1 do not exist: \['/nowhere.wav'\]"),
        (lambda: RecordedReverberation(rir_files=[], seed=1), "0 of 0 do not exist"),
        (lambda: GeneratedReverberation(t60_min=0, t60_max=1, drr_db_min=0, drr_db_max=1, seed=1), "t60_min 0"),
        (
            lambda: GeneratedReverberation(t60_min=1, t60_max=1, drr_db_min=2, drr_db_max=1, seed=1),
            "drr_db_min 2 is ab",
        ),
        (lambda: Speed(factors=[1.0, 3.0], seed=1), r"each from 0.5 to 2"),
        (lambda: Tempo(factors=[], seed=1), "expected at least one"),
        (lambda: Volume(gain_db_min=3, gain_db_max=1, seed=1), "gain_db_min 3 is above"),
        (lambda: Telephone(codecs=["mp3"], seed=1), "expected some of mulaw, alaw, gsm"),
        (lambda: Codec(codecs=["gsm"], compression_min=0, compression_max=0.5, seed=1), "expected some of mp3, opus"),
        (lambda: Codec(codecs=["opus"], compression_min=0, compression_max=1.5, seed=1), "compression 1.5"),
    ],
)
def test_impossible_settings_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_rate_that_a_codec_lacks_and_a_silent_room_are_named(tmp_path):
    with pytest.raises(ValueError, match="cannot write opus at 22050 Hz"):
        Codec(codecs=["opus"], compression_min=0, compression_max=0.5, seed=1)(TONE, 22050, "a")
    codec = Codec(codecs=["mp3", "opus", "vorbis"], compression_min=0, compression_max=0.5, seed=1)
    speed = Speed(factors=[1.1], seed=1)
    for augmentation in (codec, Chain(augmentations=[speed, codec]),
                         OneOf(augmentations=[None, codec], probabilities=[1.0, 0.0], seed=1)):  # fmt: skip
        check_rate(augmentation, 24000)
        with pytest.raises(ValueError, match="cannot write opus at 22050 Hz"):
            check_rate(augmentation, 22050)
    for harmless in (None, speed, OneOf(augmentations=[None, speed], probabilities=[0.5, 0.5], seed=1)):
        check_rate(harmless, 22050)
    soundfile.write(tmp_path / "silent.wav", np.zeros(100), RATE)
    with pytest.raises(ValueError, match=r"channel 0 of .*silent.wav is silent"):
        RecordedReverberation(rir_files=[str(tmp_path / "silent.wav")], seed=1)(TONE, RATE, "a")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_choices_in_conf_can_be_built_and_heard(path):
    augmentation = instantiate(OmegaConf.merge({"seed": 1}, {"it": OmegaConf.load(path)}).it)
    for key in "abc":
        heard = augmentation(SPEECH, RATE, key)
        assert 0.05 < heard.abs().max() <= 1
        assert not torch.equal(heard, SPEECH)
