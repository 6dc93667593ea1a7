# SPDX-License-Identifier: Apache-2.0
"""What rooms, telephones, codecs and speakers do to speech; see ``augment.py`` for what an augmentation is.

Lhotse's transforms do the work wherever they run without torchaudio, which its tempo, narrow band and generated impulse
responses do not: it wants the same release of torch, and its SoX effects were removed in 2.9. In their place stand
librosa's phase vocoder (NeMo's own choice for tempo), libsndfile's G.711 and GSM, and Polack's model of a room.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch
from lhotse import Recording
from lhotse import augmentation as lhotse_augmentation
from torch import Tensor

from nemo_rba.synthesis.augment import keyed_rng, set_peak
from nemo_rba.synthesis.tts import resample

FACTORS = (0.5, 2.0)  # of speed and tempo; beyond them speech is hardly speech
STRETCH_WINDOW = 512  # samples of the phase vocoder, as in NeMo's TimeStretchPerturbation
TELEPHONE_RATE = 8000  # Hz
TELEPHONE_CODECS = {"mulaw": "ULAW", "alaw": "ALAW", "gsm": "GSM610"}  # -> libsndfile's name
CODECS = ("mp3", "opus", "vorbis")


class RecordedReverberation:
    """Rooms from files: the clip convolved with a measured impulse response, at the power it had.

    Lhotse's ``ReverbWithImpulseResponse``: the direct sound stays where it was and the length is kept.

    Args:
        rir_files: audio files of impulse responses; a clip takes a random channel of a random one.
        seed: with ``key`` it decides every draw.

    Raises:
        ValueError: no files, or a missing one; on use, an impulse response that is silent.
    """

    def __init__(self, *, rir_files: Sequence[str], seed: int):
        missing = [path for path in rir_files if not Path(path).is_file()]
        if missing or not rir_files:
            raise ValueError(f"augment.rir_files: {len(missing)} of {len(rir_files)} do not exist: {missing[:5]}; give "
                             "audio files of impulse responses, or use GeneratedReverberation")  # fmt: skip
        self._rirs = [Recording.from_file(path) for path in rir_files]
        self._seed = seed

    def __call__(self, audio: Tensor, sampling_rate: int, key: str) -> Tensor:
        """audio (A,) -> (A,), float32 in [-1, 1]. ``key`` names the utterance."""
        rng = keyed_rng(self._seed, key)
        rir = self._rirs[int(rng.integers(len(self._rirs)))]
        channel = rir.channel_ids[int(rng.integers(rir.num_channels))]
        reverb = lhotse_augmentation.ReverbWithImpulseResponse(rir=rir.resample(sampling_rate), rir_channels=[channel])
        reverberant = _apply(reverb, audio, sampling_rate)
        if audio.any() and not reverberant.any():
            raise ValueError(f"augment.rir_files: channel {channel} of {rir.sources[0].source} is silent; leave it out")
        return reverberant


class GeneratedReverberation:
    """Rooms without files: the direct sound, then white noise that decays exponentially (Polack 1988).

    h(t) = 1 at t = 0, then g n(t) 10^(-3 t / T60), with g such that direct over reverberant energy is the ratio drawn.

    Args:
        t60_min, t60_max: seconds in which the sound of the room falls by 60 dB, drawn uniformly; 0.2 a bedroom, 0.8 a
            large office.
        drr_db_min, drr_db_max: direct-to-reverberant energy ratio in decibels, drawn uniformly; it falls with the
            distance of the speaker: 10 near the microphone, 0 across the room.
        seed: with ``key`` it decides every draw.

    Raises:
        ValueError: a range upside down, or a decay outside 0 to 10 s.
    """

    def __init__(self, *, t60_min: float, t60_max: float, drr_db_min: float, drr_db_max: float, seed: int):
        if not 0 < t60_min <= t60_max <= 10:
            raise ValueError(
                f"augment.t60_min {t60_min} and augment.t60_max {t60_max}: expected 0 < t60_min <= t60_max <= 10 s"
            )
        _check_range("drr_db", drr_db_min, drr_db_max)
        self._t60, self._drr_db, self._seed = (t60_min, t60_max), (drr_db_min, drr_db_max), seed

    def __call__(self, audio: Tensor, sampling_rate: int, key: str) -> Tensor:
        """audio (A,) -> (A,), float32 in [-1, 1]. ``key`` names the utterance."""
        rng = keyed_rng(self._seed, key)
        rir = generate_rir(rng, rng.uniform(*self._t60), rng.uniform(*self._drr_db), sampling_rate)
        reverb = lhotse_augmentation.ReverbWithImpulseResponse(rir_generator=lambda nsource: rir[None])
        return _apply(reverb, audio, sampling_rate)


class Speed:
    """Faster and higher, or slower and lower, as a tape: Lhotse's ``Speed``. The length changes.

    Args:
        factors: one is drawn; 1.1 is 10 % faster. Kaldi's are 0.9, 1.0 and 1.1.
        seed: with ``key`` it decides the draw.
    """

    def __init__(self, *, factors: Sequence[float], seed: int):
        self._factors, self._seed = _check_factors(factors), seed

    def __call__(self, audio: Tensor, sampling_rate: int, key: str) -> Tensor:
        """audio (A,) -> (A / factor,), float32 in [-1, 1]. ``key`` names the utterance."""
        factor = _choose(self._factors, keyed_rng(self._seed, key))
        return audio if factor == 1 else _apply(lhotse_augmentation.Speed(factor=factor), audio, sampling_rate)


class Tempo:
    """Faster or slower at the same pitch: librosa's phase vocoder. The length changes.

    Args:
        factors: one is drawn; 1.1 is 10 % faster.
        seed: with ``key`` it decides the draw.
    """

    def __init__(self, *, factors: Sequence[float], seed: int):
        self._factors, self._seed = _check_factors(factors), seed

    def __call__(self, audio: Tensor, sampling_rate: int, key: str) -> Tensor:
        """audio (A,) -> (A / factor,), float32 in [-1, 1]. ``key`` names the utterance."""
        factor = _choose(self._factors, keyed_rng(self._seed, key))
        if factor == 1:
            return audio
        from librosa.effects import time_stretch  # seconds to import

        return _within_full_scale(time_stretch(audio.numpy(), rate=factor, n_fft=STRETCH_WINDOW))


class Volume:
    """Louder or softer, Lhotse's ``Volume``; what goes beyond full scale is clipped, as a recorder does.

    Args:
        gain_db_min, gain_db_max: decibels, drawn uniformly between the two.
        seed: with ``key`` it decides the draw.
    """

    def __init__(self, *, gain_db_min: float, gain_db_max: float, seed: int):
        _check_range("gain_db", gain_db_min, gain_db_max)
        self._gain_db, self._seed = (gain_db_min, gain_db_max), seed

    def __call__(self, audio: Tensor, sampling_rate: int, key: str) -> Tensor:
        """audio (A,) -> (A,), float32 in [-1, 1]. ``key`` names the utterance."""
        gain = 10 ** (keyed_rng(self._seed, key).uniform(*self._gain_db) / 20)
        louder = lhotse_augmentation.Volume(factor=gain)(audio[None].numpy(), sampling_rate)
        return torch.from_numpy(louder[0].astype(np.float32)).clamp(-1, 1)


class Telephone:
    """Narrow band: down to 8 kHz, through a telephone's codec, and back to the rate it had. The length is kept.

    Args:
        codecs: one is drawn: ``mulaw`` (G.711, America), ``alaw`` (G.711, elsewhere), ``gsm`` (mobile, 06.10).
        seed: with ``key`` it decides the draw.

    Raises:
        ValueError: no codecs, or an unknown one.
    """

    def __init__(self, *, codecs: Sequence[str], seed: int):
        self._codecs, self._seed = _check_codecs(codecs, tuple(TELEPHONE_CODECS)), seed

    def __call__(self, audio: Tensor, sampling_rate: int, key: str) -> Tensor:
        """audio (A,) -> (A,), float32 in [-1, 1]. ``key`` names the utterance."""
        kind = {"format": "RAW", "subtype": TELEPHONE_CODECS[_choose(self._codecs, keyed_rng(self._seed, key))]}
        narrow = resample(audio.numpy(), sampling_rate, TELEPHONE_RATE)
        line = io.BytesIO()
        soundfile.write(line, narrow, TELEPHONE_RATE, **kind)
        line.seek(0)
        heard, _ = soundfile.read(line, samplerate=TELEPHONE_RATE, channels=1, dtype="float32", **kind)
        return _fit(resample(heard[: len(narrow)], TELEPHONE_RATE, sampling_rate), len(audio))


class Codec:
    """Lossy compression, Lhotse's ``Compress``: what uploads and calls over the internet do. The length is kept.

    Args:
        codecs: one is drawn: ``mp3``, ``opus``, ``vorbis``.
        compression_min, compression_max: drawn uniformly between the two; 0 is hardly heard, 0.99 is very poor.
        seed: with ``key`` it decides every draw.

    Raises:
        ValueError: an unknown codec, a range upside down, or a codec that this libsndfile does not write; on use, or by
            ``check_rate``, a sampling rate that the codec does not have (opus: 8, 12, 16, 24 and 48 kHz).
    """

    def __init__(self, *, codecs: Sequence[str], compression_min: float, compression_max: float, seed: int):
        self._codecs, self._seed = _check_codecs(codecs, CODECS), seed
        _check_range("compression", compression_min, compression_max)
        self._compression = (compression_min, compression_max)
        self.check_rate(16000)  # which they all have

    def check_rate(self, sampling_rate: int) -> None:
        """See ``augment.check_rate``."""
        for codec in self._codecs:
            for level in self._compression:
                _compress(torch.zeros(sampling_rate // 10), sampling_rate, codec, level)

    def __call__(self, audio: Tensor, sampling_rate: int, key: str) -> Tensor:
        """audio (A,) -> (A,), float32 in [-1, 1]. ``key`` names the utterance."""
        rng = keyed_rng(self._seed, key)
        codec = _choose(self._codecs, rng)
        return _compress(audio, sampling_rate, codec, rng.uniform(*self._compression))


def generate_rir(rng: np.random.Generator, t60: float, drr_db: float, sampling_rate: int) -> np.ndarray:
    """An impulse response (R,), float32, of ``t60`` seconds: direct sound 1, then decaying noise, see above."""
    num_samples = max(2, round(t60 * sampling_rate))
    decay = 10.0 ** (-3 * np.arange(num_samples) / (t60 * sampling_rate))
    rir = rng.standard_normal(num_samples) * decay
    rir[0] = 0.0
    rir *= np.sqrt(10 ** (-drr_db / 10) / np.square(rir).sum())
    rir[0] = 1.0
    return rir.astype(np.float32)


def _compress(audio: Tensor, sampling_rate: int, codec: str, level: float) -> Tensor:
    try:
        transform = lhotse_augmentation.Compress(codec=codec, compression_level=level)
        return _fit(transform(audio[None].numpy(), sampling_rate)[0], len(audio))
    except (ValueError, soundfile.LibsndfileError) as error:
        raise ValueError(
            f"augment.codecs: libsndfile {soundfile.__libsndfile_version__} cannot write {codec} at {sampling_rate} Hz "
            f"and compression {level:g} ({error}); choose another codec, a level from 0 to 0.99, or another rate"
        ) from error


def _apply(transform: lhotse_augmentation.AudioTransform, audio: Tensor, sampling_rate: int) -> Tensor:
    """A transform of Lhotse, which works on (channels, A), on audio (A,)."""
    return _within_full_scale(transform(audio[None].numpy(), sampling_rate)[0])


def _fit(samples: np.ndarray, num_samples: int) -> Tensor:
    """Cut or zero-pad at the end by the few samples that a codec or a resampler adds or loses."""
    lacking = max(0, num_samples - len(samples))
    return _within_full_scale(np.pad(samples[:num_samples], (0, lacking)))


def _within_full_scale(samples: np.ndarray) -> Tensor:
    """Float32 (A,), made softer where it would clip."""
    audio = torch.from_numpy(np.ascontiguousarray(samples, dtype=np.float32))
    return set_peak(audio, 1.0) if len(audio) and audio.abs().max() > 1 else audio


def _choose(options: Sequence, rng: np.random.Generator):
    return options[int(rng.integers(len(options)))]


def _check_factors(factors: Sequence[float]) -> list[float]:
    low, high = FACTORS
    if not factors or not all(low <= factor <= high for factor in factors):
        raise ValueError(f"augment.factors are {list(factors)}; expected at least one, each from {low:g} to {high:g}")
    return [float(factor) for factor in factors]


def _check_codecs(codecs: Sequence[str], known: tuple[str, ...]) -> list[str]:
    if not codecs or not set(codecs) <= set(known):
        raise ValueError(f"augment.codecs are {list(codecs)}; expected some of {', '.join(known)} (Telephone has "
                         f"{', '.join(TELEPHONE_CODECS)}, Codec has {', '.join(CODECS)})")  # fmt: skip
    return list(codecs)


def _check_range(name: str, low: float, high: float) -> None:
    if not low <= high:
        raise ValueError(f"augment.{name}_min {low} is above augment.{name}_max {high}")
