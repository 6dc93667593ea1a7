# SPDX-License-Identifier: Apache-2.0
"""Making clean synthetic speech sound recorded: noise at a drawn signal-to-noise ratio, then a drawn level.

An augmentation is a callable ``(audio (A,), sampling_rate, key) -> audio (A,)`` whose draws depend on its seed and on
``key`` (the id of the utterance) alone, so the order of work, a restart or the number of workers changes nothing. The
words stay; the length may change. It may offer ``check_rate``, see there. Here are noise, and ``Chain`` and ``OneOf``,
which put augmentations together; rooms, telephones, codecs, speed and level are in ``augment_effects.py``.
"""

import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch
from lhotse import CutSet, MonoCut, Recording
from torch import Tensor

Augmentation = Callable[[Tensor, int, str], Tensor]
PINK_FLOOR_HZ = 20.0  # below this pink noise is flat, as it would otherwise be mostly inaudible rumble


class NoiseAugmentation:
    """Generated noise, then a peak level. Signal-to-noise ratio = mean power of the clip over that of the noise.

    Args:
        snr_db_min, snr_db_max: decibels, drawn uniformly between the two.
        color: ``white`` (flat spectrum) or ``pink`` (power falls as 1/f, nearer to a room).
        peak_min, peak_max: the loudest sample of the result, drawn uniformly; 1.0 is full scale.
        seed: with ``key`` it decides every draw.

    Raises:
        ValueError: a range upside down or out of bounds, or an unknown colour.
    """

    def __init__(
        self, *, snr_db_min: float, snr_db_max: float, color: str, peak_min: float, peak_max: float, seed: int
    ):
        _check_ranges(snr_db_min, snr_db_max, peak_min, peak_max)
        if color not in ("white", "pink"):
            raise ValueError(f"augment.color is {color!r}; expected 'white' or 'pink'")
        self._snr_db, self._peak = (snr_db_min, snr_db_max), (peak_min, peak_max)
        self._color, self._seed = color, seed

    def __call__(self, audio: Tensor, sampling_rate: int, key: str) -> Tensor:
        """audio (A,) -> (A,), float32 in [-1, 1]. ``key`` names the utterance."""
        rng = keyed_rng(self._seed, key)
        snr_db = rng.uniform(*self._snr_db)
        noise = generate_noise(rng, len(audio), sampling_rate, self._color)
        noise = noise * (_power(audio) / _power(noise) / 10 ** (snr_db / 10)).sqrt()
        return set_peak(audio + noise, rng.uniform(*self._peak))


class RecordedNoiseAugmentation:
    """Noise recordings mixed in by Lhotse's ``CutSet.mix``, then a peak level.

    Args:
        noise_files: audio files; a clip takes a random stretch of a random one, repeated where it is too short.
        snr_db_min, snr_db_max, peak_min, peak_max, seed: as in ``NoiseAugmentation``.

    Raises:
        ValueError: no files, a missing file, or a range upside down or out of bounds.
    """

    def __init__(self, *, noise_files: Sequence[str], snr_db_min: float, snr_db_max: float, peak_min: float,
                 peak_max: float, seed: int):  # fmt: skip
        _check_ranges(snr_db_min, snr_db_max, peak_min, peak_max)
        if not noise_files:
            raise ValueError("augment.noise_files is empty; give noise recordings, or use NoiseAugmentation")
        missing = [path for path in noise_files if not Path(path).is_file()]
        if missing:
            raise ValueError(f"augment.noise_files: {len(missing)} of {len(noise_files)} do not exist: {missing[:5]}")
        self._noise = CutSet.from_cuts(Recording.from_file(path).to_cut() for path in noise_files).to_eager()
        self._snr_db, self._peak, self._seed = (snr_db_min, snr_db_max), (peak_min, peak_max), seed

    def __call__(self, audio: Tensor, sampling_rate: int, key: str) -> Tensor:
        """audio (A,) -> (A,), float32 in [-1, 1]. ``key`` names the utterance."""
        rng = keyed_rng(self._seed, key)
        clip = _as_cut(audio, sampling_rate, key)
        noise = self._noise.resample(sampling_rate)
        seed = int(rng.integers(2**31))
        mixed = CutSet.from_cuts([clip]).mix(noise, snr=self._snr_db, seed=seed, random_mix_offset=True)
        samples = next(iter(mixed)).load_audio()[0]  # (A,)
        return set_peak(torch.from_numpy(samples[: len(audio)].copy()), rng.uniform(*self._peak))


class Chain:
    """One augmentation after another: a room, noise in it, then the telephone.

    Each draws for itself, also where two have the same seed.

    Raises:
        ValueError: no augmentations.
    """

    def __init__(self, *, augmentations: Sequence[Augmentation]):
        if not augmentations:
            raise ValueError("augment.augmentations of a Chain is empty; give at least one, or set augment to null")
        self._augmentations = list(augmentations)

    def __call__(self, audio: Tensor, sampling_rate: int, key: str) -> Tensor:
        """audio (A,) -> (A',). ``key`` names the utterance."""
        for place, augmentation in enumerate(self._augmentations):
            audio = augmentation(audio, sampling_rate, f"{key}/{place}")
        return audio

    def check_rate(self, sampling_rate: int) -> None:
        """See the function ``check_rate``."""
        for augmentation in self._augmentations:
            check_rate(augmentation, sampling_rate)


class OneOf:
    """One of several augmentations, drawn for each utterance.

    Args:
        augmentations: to choose from; None leaves the speech as it is.
        probabilities: of each; they add up to 1.
        seed: with ``key`` it decides the choice.

    Raises:
        ValueError: probabilities that do not fit the augmentations, are negative or do not add up to 1.
    """

    def __init__(self, *, augmentations: Sequence[Augmentation | None], probabilities: Sequence[float], seed: int):
        probabilities = [float(probability) for probability in probabilities]
        unfit = len(probabilities) != len(augmentations) or any(p < 0 for p in probabilities)
        if unfit or abs(sum(probabilities) - 1) > 1e-6:
            raise ValueError(f"augment.probabilities of OneOf are {probabilities} for {len(augmentations)} "
                             "augmentations; expected one for each, at least 0, adding up to 1")  # fmt: skip
        self._augmentations, self._seed = list(augmentations), seed
        self._bounds = np.cumsum(probabilities) / sum(probabilities)

    def __call__(self, audio: Tensor, sampling_rate: int, key: str) -> Tensor:
        """audio (A,) -> (A',). ``key`` names the utterance."""
        draw = keyed_rng(self._seed, f"{key}/choice").random()
        augmentation = self._augmentations[int(np.searchsorted(self._bounds, draw, side="right"))]
        return audio if augmentation is None else augmentation(audio, sampling_rate, key)

    def check_rate(self, sampling_rate: int) -> None:
        """See the function ``check_rate``."""
        for augmentation in self._augmentations:
            check_rate(augmentation, sampling_rate)


def check_rate(augmentation: Augmentation | None, sampling_rate: int) -> None:
    """Raise ValueError where an augmentation tells, by its method ``check_rate``, that it cannot work at this rate."""
    if hasattr(augmentation, "check_rate"):
        augmentation.check_rate(sampling_rate)


def keyed_seed(seed: int, key: str) -> int:
    """A 63-bit seed that depends on ``seed`` and ``key`` alone, the same in every process and on every machine."""
    digest = hashlib.sha256(f"{seed}|{key}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def keyed_rng(seed: int, key: str) -> np.random.Generator:
    """A generator seeded by ``keyed_seed``."""
    return np.random.default_rng(keyed_seed(seed, key))


def generate_noise(rng: np.random.Generator, num_samples: int, sampling_rate: int, color: str) -> Tensor:
    """White or pink noise (A,), float32, of unspecified level."""
    white = rng.standard_normal(num_samples)
    if color == "white":
        return torch.from_numpy(white.astype(np.float32))
    frequencies = np.fft.rfftfreq(num_samples, d=1 / sampling_rate)
    spectrum = np.fft.rfft(white) / np.sqrt(np.maximum(frequencies, PINK_FLOOR_HZ))
    return torch.from_numpy(np.fft.irfft(spectrum, n=num_samples).astype(np.float32))


def set_peak(audio: Tensor, peak: float) -> Tensor:
    """Scale (A,) so that its loudest sample is ``peak``; silence stays silence."""
    loudest = audio.abs().max()
    return audio if loudest == 0 else audio * (peak / loudest)


def _as_cut(audio: Tensor, sampling_rate: int, key: str) -> MonoCut:
    buffer = io.BytesIO()
    soundfile.write(buffer, audio.numpy(), sampling_rate, format="WAV", subtype="FLOAT")
    return Recording.from_bytes(buffer.getvalue(), recording_id=key).to_cut()


def _power(audio: Tensor) -> Tensor:
    return audio.square().mean().clamp_min(1e-12)


def _check_ranges(snr_db_min: float, snr_db_max: float, peak_min: float, peak_max: float) -> None:
    if snr_db_min > snr_db_max:
        raise ValueError(f"augment.snr_db_min {snr_db_min} is above augment.snr_db_max {snr_db_max}")
    if not 0 < peak_min <= peak_max <= 1:
        raise ValueError(
            f"augment.peak_min {peak_min} and augment.peak_max {peak_max}: expected 0 < peak_min <= peak_max <= 1"
        )
