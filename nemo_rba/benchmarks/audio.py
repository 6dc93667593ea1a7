# SPDX-License-Identifier: Apache-2.0
"""The sound of one item, from a file, a stretch of a file, or bytes in a table: mono, at the rate asked for.

As ``data/audio.py`` reads a file: Lhotse decodes (libsndfile or ffmpeg) and resamples, channels are averaged. What goes
wrong is ``Unusable``, since one broken file must not end a conversion.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lhotse import Recording
from torch import Tensor

from nemo_rba.benchmarks.benchmark import Unusable


def read_file(path: Path, sampling_rate: int) -> Tensor:
    """A whole file (A,), at ``sampling_rate`` Hz."""
    return _decode(lambda: Recording.from_file(path), str(path), sampling_rate)


def read_stretch(path: Path, sampling_rate: int, *, offset: float, duration: float) -> Tensor:
    """``duration`` seconds of a file (A,) from second ``offset`` on, less where the file ends before."""
    return _decode(lambda: Recording.from_file(path), str(path), sampling_rate, offset, duration)


def read_embedded(audio: Mapping[str, Any] | None, sampling_rate: int) -> Tensor:
    """The sound (A,) of a Hugging Face ``Audio`` feature as tables hold it: struct<bytes: binary, path: string>."""
    if not audio or not audio.get("bytes"):
        raise Unusable("no audio in the table", f"{audio!r}")
    name = audio.get("path") or "bytes"
    return _decode(lambda: Recording.from_bytes(audio["bytes"], recording_id=name), name, sampling_rate)


def _decode(
    open_recording, name: str, sampling_rate: int, offset: float = 0.0, duration: float | None = None
) -> Tensor:
    try:
        recording = open_recording()
        if duration is not None:
            duration = min(duration, recording.duration - offset)
            if offset < 0 or duration <= 0:
                raise Unusable("outside its recording", f"{offset:g} s of {recording.duration:g} s in {name}")
        samples = torch.from_numpy(recording.resample(sampling_rate).load_audio(offset=offset, duration=duration))
    except Unusable:
        raise
    except Exception as error:  # whatever a decoder may raise
        message = " ".join(str(error).split())[:200]  # Lhotse's run to a page
        raise Unusable("unreadable audio", f"{name}: {type(error).__name__}: {message}") from error
    audio = samples.float().mean(0)
    if audio.numel() == 0:
        raise Unusable("empty audio", name)
    if not torch.isfinite(audio).all():
        raise Unusable("audio not finite", name)
    return audio.clamp_(-1.0, 1.0)
