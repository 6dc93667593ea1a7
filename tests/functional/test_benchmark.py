# SPDX-License-Identifier: Apache-2.0
"""The command on miniatures of two sets: one that is spoken, and one that our own synthesizer speaks."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rba_benchmark
import soundfile
from hydra import compose, initialize_config_dir

from nemo_rba.manifest import cut_to_utterance, read_manifest

CONF = Path(__file__).parents[2] / "conf"


def convert(*overrides: str) -> str:
    with initialize_config_dir(str(CONF), version_base=None):
        return rba_benchmark.convert(compose("rba_benchmark", overrides=list(overrides)))


def test_voicebench_becomes_a_manifest_once(tmp_path):
    sound = io.BytesIO()
    soundfile.write(sound, np.full(22050, 0.1), 22050, format="WAV")
    audio = [{"bytes": data, "path": "x.wav"} for data in (sound.getvalue(), b"no sound", sound.getvalue())]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"audio": pa.array(audio, type=kind), "prompt": ["a?"] * 3, "reference": ["b"] * 3})
    (tmp_path / "source" / "sd-qa").mkdir(parents=True)
    pq.write_table(table, tmp_path / "source" / "sd-qa" / "usa-00000-of-00001.parquet")
    target = tmp_path / "manifest"
    asked = [f"source={tmp_path / 'source'}", "subset=sd-qa", "benchmark.splits=[usa]", f"target={target}"]
    table = convert(*asked)
    rows = [line.split() for line in table.splitlines()]
    assert rows[1:] == [
        ["items", "2"], ["hours", "0.00"], ["skipped", "1"], ["skipped:", "unreadable", "audio", "1"],
        ["task", "sd-qa-usa", "2"], ["written", "to", str(target)],
    ]  # fmt: skip
    items = [cut_to_utterance(cut) for cut in read_manifest(target)]
    assert [(len(item.audio), item.sampling_rate, item.instruction.response) for item in items] == [
        (16000, 16000, "b")
    ] * 2
    shard = next(target.glob("recording.*"))
    written = shard.stat().st_mtime_ns
    assert convert(*asked) == table
    assert shard.stat().st_mtime_ns == written, "made once for a configuration"
    convert(*asked, "sampling_rate=8000")
    assert len(list(tmp_path.glob("manifest.stale-*"))) == 1, "another configuration sets it aside"
    assert next(iter(read_manifest(target))).sampling_rate == 8000


def test_web_questions_are_spoken(tmp_path):
    rows = {
        "url": ["u"] * 3,
        "question": ["what is red?", "who is it?", "where?"],
        "answers": [["a", "b"], ["c"], ["d"]],
    }
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "data" / "test-00000-of-00001.parquet")
    source = ["benchmark=web_questions", f"source={tmp_path}"]
    convert(*source, "benchmark.num_items=2", "spoken_form=null", f"target={tmp_path / 'manifest'}")
    items = [cut_to_utterance(cut) for cut in read_manifest(tmp_path / "manifest")]
    assert len(items) == 2
    assert all(len(item.audio) > 4000 and item.speaker.startswith("en") for item in items)
    with pytest.raises(ValueError, match="subset=x: this benchmark has no subsets"):
        convert(*source, f"target={tmp_path / 'manifest'}", "subset=x")


def test_a_key_that_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"benchmark=VoiceBench: .*subset"):
        convert(f"source={tmp_path}", f"target={tmp_path / 'manifest'}")
    with pytest.raises(ValueError, match=r"benchmark=MustC: .*target_language"):
        convert("benchmark=must_c", f"source={tmp_path}", f"target={tmp_path / 'manifest'}")
