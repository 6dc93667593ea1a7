# SPDX-License-Identifier: Apache-2.0
"""Requests, spoken: clips with noise, and their mel features, made once and kept in one file."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from nemo_rba.synthesis.augment import NoiseAugmentation
from nemo_rba.synthesis.tts import EspeakTTS

from . import domain, voices

MEL_BINS = 64
PREPROCESSOR = {
    "_target_": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor",
    "sample_rate": voices.SAMPLING_RATE,
    "features": MEL_BINS,
    "window_size": 0.025,
    "window_stride": 0.01,
    "window": "hann",
    "n_fft": 512,
    "normalize": "per_feature",
    "dither": 0.0,
    "pad_to": 0,
}


@dataclass
class SpokenSet:
    """Texts and the mel features of their clips, float16, one after the other."""

    texts: list[str]
    frames: Tensor  # (sum of lengths, MEL_BINS)
    offsets: Tensor  # (clips + 1,)

    @classmethod
    def from_features(cls, texts: Sequence[str], features: Sequence[Tensor]) -> "SpokenSet":
        """From one tensor (frames, MEL_BINS) per text."""
        offsets = torch.tensor([0, *(len(clip) for clip in features)]).cumsum(0)
        return cls(list(texts), torch.cat(list(features)), offsets)

    def __len__(self) -> int:
        return len(self.texts)

    def length(self, index: int) -> int:
        """Mel frames of one clip."""
        return int(self.offsets[index + 1] - self.offsets[index])

    def batch(self, indices: Sequence[int], rng: Random | None = None) -> tuple[Tensor, Tensor]:
        """(clips, MEL_BINS, frames) right padded with zeros, and lengths; masked at random when ``rng`` is given."""
        lengths = [self.length(index) for index in indices]
        mel = torch.zeros(len(indices), MEL_BINS, max(lengths))
        for row, (index, length) in enumerate(zip(indices, lengths, strict=True)):
            mel[row, :, :length] = self.frames[self.offsets[index] : self.offsets[index + 1]].T
            if rng is not None:
                mask_spans(mel[row], length, rng)
        return mel, torch.tensor(lengths)

    def batches(self, size: int, rng: Random) -> Iterator[list[int]]:
        """Indices of one epoch's batches: clips of similar length together, batches in random order."""
        order = list(range(len(self)))
        rng.shuffle(order)
        chunks = []
        for first in range(0, len(order), size * 20):
            pool = sorted(order[first : first + size * 20], key=self.length)
            chunks += [pool[start : start + size] for start in range(0, len(pool), size)]
        rng.shuffle(chunks)
        yield from chunks


def mask_spans(mel: Tensor, length: int, rng: Random) -> None:
    """Zero two bands of mel bins and two short stretches of time, in place (SpecAugment)."""
    for _ in range(2):
        low = rng.randrange(MEL_BINS - 8)
        mel[low : low + rng.randrange(8)] = 0
        start = rng.randrange(max(1, length - 14))
        mel[:, start : start + rng.randrange(12)] = 0


def speak(texts: Sequence[str], split: str, seed: int) -> list[Tensor]:
    """A noisy clip (A,) of each text, by a random speaker of the split."""
    rng = Random(seed)
    tts = EspeakTTS(**voices.SPEAKERS[split], sampling_rate=voices.SAMPLING_RATE)
    snr = {"snr_db_min": voices.SNR_DB[0], "snr_db_max": voices.SNR_DB[1]}
    peak = {"peak_min": voices.PEAK[0], "peak_max": voices.PEAK[1]}
    noises = [NoiseAugmentation(color=color, seed=seed, **snr, **peak) for color in ("white", "pink")]
    clips = tts.synthesize(texts, [rng.choice(tts.speakers) for _ in texts])
    return [rng.choice(noises)(clip, voices.SAMPLING_RATE, f"{seed}-{i}") for i, clip in enumerate(clips)]


def pad_clips(clips: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(B, A) right padded with zeros, and lengths (B,)."""
    lengths = torch.tensor([len(clip) for clip in clips])
    return torch.nn.utils.rnn.pad_sequence(list(clips), batch_first=True), lengths


def build_preprocessor():
    """NeMo's mel front end, as in the SALM's config."""
    from nemo.core import Serialization
    from omegaconf import DictConfig

    return Serialization.from_config_dict(DictConfig(PREPROCESSOR)).eval()


@torch.no_grad()
def mel_features(preprocessor, clips: Sequence[Tensor]) -> list[Tensor]:
    """Float16 features (frames, MEL_BINS) of each clip."""
    audio, audio_lengths = pad_clips(clips)
    mel, lengths = preprocessor(input_signal=audio, length=audio_lengths)
    return [mel[row, :, :length].T.half() for row, length in enumerate(lengths.tolist())]


def make_spoken_set(path: Path, texts: Sequence[str], split: str, seed: int, batch_size: int = 50) -> SpokenSet:
    """Speak the texts and compute their features, or read them if ``path`` is there already."""
    if path.exists():
        return SpokenSet(**torch.load(path, weights_only=True))
    preprocessor = build_preprocessor()
    features = []
    for first in range(0, len(texts), batch_size):
        clips = speak(texts[first : first + batch_size], split, seed * 1_000_003 + first)
        features += mel_features(preprocessor, clips)
    spoken = SpokenSet.from_features(texts, features)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(vars(spoken), partial)
    os.replace(partial, path)
    return spoken


def draw_texts(split: str, count: int, seed: int) -> list[str]:
    """Requests of a split, as often as the domain draws them."""
    rng = Random(seed)
    return [domain.sample_split(rng, split).instruction for _ in range(count)]
