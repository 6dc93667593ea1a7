# SPDX-License-Identifier: Apache-2.0
"""What was heard, for a page that needs no other file: the sound as 16-bit FLAC and its spectrogram as PNG, in base64.

FLAC, because every browser since 2017 plays it (Chrome 56, Firefox 51, Safari 11), at two thirds of the size of WAV.
"""

import base64
import io
from dataclasses import dataclass

import matplotlib
import soundfile
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from nemo_rba.evaluation.plots import SETTINGS

WINDOW_SECONDS, HOP_SECONDS = 0.025, 0.010
RANGE_DB = 75.0  # what lies so far below the loudest point is white
NUM_GREYS = 15  # steps of 5 dB; more would only make the file larger


@dataclass(frozen=True, slots=True, kw_only=True)
class Sound:
    """What the systems of one condition heard of one item, after any augmentation.

    Raises:
        ValueError: it is no mono sound with samples.
    """

    waveform: Tensor  # (A,), float in [-1, 1]
    sampling_rate: int  # Hz

    def __post_init__(self) -> None:
        if self.waveform.ndim != 1 or not len(self.waveform) or self.sampling_rate <= 0:
            raise ValueError(
                f"a sound has shape {tuple(self.waveform.shape)} at {self.sampling_rate} Hz, expected (A,) with A > 0 "
                "and a positive rate"
            )

    @property
    def seconds(self) -> float:
        return len(self.waveform) / self.sampling_rate


def audio_uri(sound: Sound) -> str:
    """``data:audio/flac;base64,...``; samples beyond full scale are clipped."""
    buffer = io.BytesIO()
    samples = sound.waveform.detach().cpu().float().numpy()
    soundfile.write(buffer, samples, sound.sampling_rate, format="FLAC", subtype="PCM_16")
    return f"data:audio/flac;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def spectrogram_uri(sound: Sound) -> str:
    """``data:image/png;base64,...``: level in dB below the loudest point, over time and frequency."""
    length, hop = (max(1, round(seconds * sound.sampling_rate)) for seconds in (WINDOW_SECONDS, HOP_SECONDS))
    waveform = sound.waveform.detach().cpu().float()
    spectrum = torch.stft(
        waveform, n_fft=2 * length, hop_length=hop, win_length=length, window=torch.hann_window(length),
        pad_mode="constant", return_complex=True,
    )  # fmt: skip
    level = 20 * spectrum.abs().clamp_min(1e-6).log10()  # (frequencies, frames)
    with matplotlib.rc_context(SETTINGS | {"font.size": 8, "axes.labelsize": 8}):
        figure = Figure(figsize=(4.4, 1.6), layout="constrained")
        axes = figure.subplots()
        axes.imshow(
            level.numpy(), origin="lower", aspect="auto", cmap=matplotlib.colormaps["Greys"].resampled(NUM_GREYS),
            extent=(0, sound.seconds, 0, sound.sampling_rate / 2000),
            vmin=float(level.max()) - RANGE_DB, vmax=float(level.max()), interpolation="bilinear",
        )  # fmt: skip
        axes.set_xlabel("time, s")
        axes.set_ylabel("frequency, kHz")
        axes.tick_params(axis="y", left=True, colors="#57606a")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110, facecolor="white")
    return f"data:image/png;base64,{base64.b64encode(_in_grey(buffer.getvalue())).decode()}"


def _in_grey(png: bytes) -> bytes:
    """The same picture without its colour channels, which hold nothing."""
    with Image.open(io.BytesIO(png)) as picture:
        picture.convert("L").save(buffer := io.BytesIO(), format="PNG", optimize=True)
    return buffer.getvalue()
