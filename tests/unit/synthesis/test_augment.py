# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import soundfile
import torch

from nemo_rba.synthesis.augment import (
    NoiseAugmentation,
    RecordedNoiseAugmentation,
    generate_noise,
    keyed_rng,
    keyed_seed,
    set_peak,
)

RATE = 16000
TONE = torch.sin(torch.arange(2 * RATE) / 10) * 0.5
LEVELS = {"snr_db_min": 10.0, "snr_db_max": 10.0, "peak_min": 0.6, "peak_max": 0.8, "seed": 3}


def signal_to_noise_db(noisy: torch.Tensor) -> float:
    gain = (noisy @ TONE) / (TONE @ TONE)
    noise = noisy - gain * TONE
    return float(10 * torch.log10((gain * TONE).square().mean() / noise.square().mean()))


@pytest.mark.parametrize("color", ["white", "pink"])
def test_noise_has_the_level_asked_for(color):
    noisy = NoiseAugmentation(color=color, **LEVELS)(TONE, RATE, "a")
    assert noisy.shape == TONE.shape
    assert noisy.dtype == torch.float32
    assert signal_to_noise_db(noisy) == pytest.approx(10, abs=0.1)
    assert 0.6 <= noisy.abs().max() <= 0.8 + 1e-6


def test_draws_depend_on_seed_and_key_alone():
    augment = NoiseAugmentation(color="white", **(LEVELS | {"snr_db_max": 30.0}))
    first = augment(TONE, RATE, "a")
    other = augment(TONE, RATE, "b")
    assert torch.equal(augment(TONE, RATE, "a"), first)
    assert not torch.equal(other, first)
    reseeded = NoiseAugmentation(color="white", **(LEVELS | {"snr_db_max": 30.0, "seed": 4}))
    assert not torch.equal(reseeded(TONE, RATE, "a"), first)
    assert keyed_seed(3, "a") == 7683095907619629780  # frozen: data sets depend on it
    assert keyed_rng(3, "a").integers(1 << 30) == keyed_rng(3, "a").integers(1 << 30)
    levels = [signal_to_noise_db(augment(TONE, RATE, str(i))) for i in range(60)]
    assert min(levels) < 14
    assert max(levels) > 26
    assert all(9.9 < level < 30.1 for level in levels)


def test_pink_noise_falls_by_3_db_per_octave():
    power = np.abs(np.fft.rfft(generate_noise(np.random.default_rng(0), 1 << 17, RATE, "pink").numpy())) ** 2
    hertz = np.fft.rfftfreq(1 << 17, 1 / RATE)

    def band(low, high):
        return power[(hertz >= low) & (hertz < high)].mean()

    assert band(200, 400) / band(400, 800) == pytest.approx(2, rel=0.1)
    assert band(400, 800) / band(3200, 6400) == pytest.approx(8, rel=0.1)


def test_silence_stays_finite():
    noisy = NoiseAugmentation(color="white", **LEVELS)(torch.zeros(100), RATE, "a")
    assert torch.isfinite(noisy).all()
    assert torch.equal(set_peak(torch.zeros(5), 0.5), torch.zeros(5))


def test_recorded_noise_is_resampled_repeated_and_repeatable(tmp_path):
    rng = np.random.default_rng(0)
    short, long = tmp_path / "short.wav", tmp_path / "long.wav"
    soundfile.write(short, 0.1 * rng.standard_normal(8000), 8000)  # 1 s, half as long as the clip
    soundfile.write(long, 0.1 * rng.standard_normal(5 * RATE), RATE)
    for files in ([str(short)], [str(long)]):
        augment = RecordedNoiseAugmentation(noise_files=files, **LEVELS)
        noisy = augment(TONE, RATE, "a")
        assert noisy.shape == TONE.shape
        assert noisy.dtype == torch.float32
        assert signal_to_noise_db(noisy) == pytest.approx(10, abs=0.5)
        assert torch.equal(augment(TONE, RATE, "a"), noisy)
        residue = noisy - (noisy @ TONE) / (TONE @ TONE) * TONE
        assert residue[-4000:].std() > 0.5 * residue.std()
    augment = RecordedNoiseAugmentation(noise_files=[str(long)], **LEVELS)
    assert not torch.equal(augment(TONE, RATE, "b"), augment(TONE, RATE, "a"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"snr_db_min": 20.0}, "snr_db_min 20.0 is above"),
        ({"peak_max": 1.5}, "expected 0 < peak_min <= peak_max <= 1"),
        ({"peak_min": 0.0}, "expected 0 < peak_min"),
        ({"color": "brown"}, "augment.color is 'brown'"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        NoiseAugmentation(**({"color": "white"} | LEVELS | changes))


def test_missing_noise_files_are_named():
    with pytest.raises(ValueError, match=r"1 of 1 do not exist: \['/nowhere.wav'\]"):
        RecordedNoiseAugmentation(noise_files=["/nowhere.wav"], **LEVELS)
    with pytest.raises(ValueError, match=r"noise_files is empty"):
        RecordedNoiseAugmentation(noise_files=[], **LEVELS)
