# SPDX-License-Identifier: Apache-2.0
"""Miniatures of the published files: tones for speech, told apart by their pitch, in the columns of the real tables."""

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import torch
from torch import Tensor

from nemo_rba.benchmarks.benchmark import Benchmark
from nemo_rba.benchmarks.writing import write_benchmark
from nemo_rba.manifest import cut_to_utterance, read_manifest
from nemo_rba.types import Utterance

RATE = 16000
AUDIO = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # a Hugging Face Audio feature as it is stored
NO_SOUND = b"RIFF, but no sound"


def tone(hertz: float, seconds: float = 0.2, rate: int = 22050) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def pitch(audio: Tensor, rate: int = RATE) -> int:
    """Frequency of the strongest component, to 10 Hz."""
    power = torch.fft.rfft(audio).abs()
    return 10 * round(float(power.argmax()) * rate / len(audio) / 10)


def write_sound(path: Path, hertz: float = 400.0, seconds: float = 0.2, rate: int = 22050) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(hertz, seconds, rate), rate)


def embedded(hertz: float = 400.0, seconds: float = 0.2, rate: int = 22050) -> dict:
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(hertz, seconds, rate), rate, format="WAV")
    return {"bytes": buffer.getvalue(), "path": f"{hertz:g}.wav"}


def as_table(rows: Sequence[Mapping], sounds: Sequence[str] = ("audio",)) -> pa.Table:
    """Rows as one table; the columns ``sounds`` are Audio features."""
    columns = {name: pa.array([row[name] for row in rows], type=AUDIO if name in sounds else None) for name in rows[0]}
    return pa.table(columns)


def write_parquet(path: Path, rows: Sequence[Mapping], row_group_size: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(as_table(rows), path, row_group_size=row_group_size)


def write_arrow(path: Path, rows: Sequence[Mapping], sounds: Sequence[str]) -> None:
    """As ``datasets.Dataset.save_to_disk``: an Arrow stream in several batches."""
    table = as_table(rows, sounds)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table, max_chunksize=2)


def write_lines(path: Path, lines: Iterable[str], end: str = "\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + end for line in lines), encoding="utf-8", newline="")


def check_round_trip(benchmark: Benchmark, folder: Path) -> list[Utterance]:
    """The items; asserts that ids differ, that a second pass is the same, and that a manifest keeps everything."""
    first, second = list(benchmark), list(benchmark)
    folder.mkdir(parents=True)
    write_benchmark(benchmark, folder, shard_size=2, audio_format="flac")
    kept = [cut_to_utterance(cut) for cut in read_manifest(folder)]
    assert len({item.instruction.id for item in first}) == len(first)
    assert [item.instruction for item in first] == [item.instruction for item in second]
    assert [item.instruction for item in first] == [item.instruction for item in kept]
    for item, other in zip(first, kept, strict=True):
        assert (item.speaker, item.sampling_rate) == (other.speaker, other.sampling_rate)
        assert (item.audio - other.audio).abs().max() < 1e-4  # 16 bits
    return first
