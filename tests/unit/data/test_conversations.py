# SPDX-License-Identifier: Apache-2.0
"""A manifest written for NeMo is read by NeMo: its dataloader, its dataset, its ids."""

import json
from pathlib import Path

import pytest
import torch
from nemo.collections.common.data.lhotse import get_lhotse_dataloader_from_config
from nemo.collections.speechlm2.data.salm_dataset import SALMDataset

from nemo_rba.data.conversations import JSONL, write_conversations
from nemo_rba.data.prompt import SALMPrompt
from nemo_rba.manifest import write_shar
from nemo_rba.types import Instruction, Utterance

ITEMS = [
    Instruction(id="a/1", text="what is two", response="it is six", task="sum"),
    Instruction(id="a/2", text="hello", response="hello it is", task="greet", context="say in french :"),
    Instruction(id="a/3", text="say six", response="six", task="say"),
]


@pytest.fixture
def manifest(tmp_path) -> Path:
    generator = torch.Generator().manual_seed(0)
    utterances = [
        Utterance(instruction=item, audio=0.3 * torch.randn(8000 + 1600 * n, generator=generator), sampling_rate=16000,
                  speaker="noise")
        for n, item in enumerate(ITEMS)
    ]  # fmt: skip
    write_shar(utterances, tmp_path / "shar", shard_size=2, audio_format="flac", teacher="T")
    return tmp_path / "shar"


def test_nemos_dataloader_reads_what_we_see(manifest, tokenizer_folder, tmp_path):
    counts = write_conversations(manifest, tmp_path / "out", audio_format="flac")
    assert counts == {"written": 3}
    moved = (tmp_path / "out").rename(tmp_path / "elsewhere")
    prompt = SALMPrompt.from_folder(folder=tokenizer_folder, prompt_format="qwen", audio_locator_tag="<|audio|>")
    source = {
        "type": "multimodal_conversation", "manifest_filepath": str(moved / JSONL), "audio_locator_tag": "<|audio|>",
        "token_equivalent_duration": 0.08,
    }  # fmt: skip
    settings = {
        "sample_rate": 16000, "shuffle": False, "seed": 0, "shard_seed": 0, "batch_size": 3, "input_cfg": [source],
        "prompt_format": "qwen", "use_multimodal_sampling": True, "token_equivalent_duration": 0.08, "num_workers": 0,
        "shuffle_buffer_size": 1, "force_finite": True,
    }  # fmt: skip
    dataset = SALMDataset(prompt.tokenizer)
    (batch,) = list(get_lhotse_dataloader_from_config(settings, 0, 1, dataset, prompt.tokenizer))
    newline = prompt.tokenizer.text_to_ids("\n")
    expected = {tuple(prompt.encode_prompt(i) + prompt.encode_response(i.response) + newline): n
                for n, i in enumerate(ITEMS)}  # fmt: skip
    pad = prompt.tokenizer.pad_id
    found = [expected[tuple(token for token in row.tolist() if token != pad)] for row in batch["input_ids"]]
    assert sorted(found) == [0, 1, 2]
    assert batch["audio_lens"].tolist() == [8000 + 1600 * n for n in found]


def test_what_cannot_be_used_is_counted_and_nothing_is_overwritten(manifest, tmp_path):
    write_conversations(manifest, tmp_path / "out", audio_format="wav")
    lines = [json.loads(line) for line in (tmp_path / "out" / JSONL).read_text().splitlines()]
    assert [line["id"] for line in lines] == ["a/1", "a/2", "a/3"]
    assert [turn["type"] for turn in lines[1]["conversations"]] == ["text", "audio", "text"]
    assert {path.suffix for path in (tmp_path / "out" / "audio").iterdir()} == {".wav"}
    with pytest.raises(ValueError, match="exists already"):
        write_conversations(manifest, tmp_path / "out", audio_format="wav")
    with pytest.raises(ValueError, match="audio_format is 'mp3'"):
        write_conversations(manifest, tmp_path / "new", audio_format="mp3")
    silent = Utterance(instruction=Instruction(id="x", text="x", response=" ", task="t"), audio=torch.zeros(800),
                       sampling_rate=16000, speaker="s")  # fmt: skip
    write_shar([silent], tmp_path / "bad", shard_size=1, audio_format="wav", teacher="T")
    with pytest.raises(ValueError, match=r"nothing in .* can be written: {'has an empty response': 1}"):
        write_conversations(tmp_path / "bad", tmp_path / "new", audio_format="wav")
    assert not (tmp_path / "new").exists()
