# SPDX-License-Identifier: Apache-2.0
"""A word-level ChatML tokenizer folder, small wav files and their cuts."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import soundfile
import torch
from lhotse import CutSet, Recording, SupervisionSegment
from lhotse.cut import Cut

from nemo_rba.data.dataset import SpeechInstructionDataset
from nemo_rba.data.loader import SpeechLoader
from nemo_rba.manifest import utterance_to_cut
from nemo_rba.types import Instruction, Utterance

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|audio|>"]
WORDS = ["user", "assistant", "hello", "what", "is", "two", "plus", "four", "six", "it", "say", "in", "french", ":"]


def write_tokenizer(folder: Path, specials: list[str]) -> Path:
    """A word-level tokenizer in Hugging Face's format; "\\n" is a token of its own."""
    vocabulary = {token: i for i, token in enumerate([*specials, "<unk>", "\n", *WORDS])}
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, "special": True, **dict.fromkeys(flags, False)}
            for i, token in enumerate(specials)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"String": "\n"}, "behavior": "Isolated", "invert": False},
                {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False},
            ],
        },
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<unk>",
        "additional_special_tokens": specials[1:],
        "clean_up_tokenization_spaces": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), SPECIALS)


RATE = 16000


class WordPrompt:
    """``PromptEncoder`` of one id per letter: 0 pads, 1 locates, 2 ends the turn."""

    pad_id = 0

    def encode_prompt(self, instruction: Instruction) -> list[int]:
        if "<|audio|>" in instruction.context:
            raise ValueError(f"context of '{instruction.id}' holds <|audio|>")
        return [ord(letter) for letter in instruction.context] + [1]

    def encode_response(self, response: str) -> list[int]:
        return [*(ord(letter) for letter in response), 2]


@pytest.fixture(scope="session")
def word_prompt() -> WordPrompt:
    return WordPrompt()


def make_cut(folder: Path, name: str, audio: torch.Tensor, rate: int = RATE, **custom: str) -> Cut:
    """A cut naming a wav file of ``audio``, (A,) or (channels, A)."""
    path = folder / f"{name}.wav"
    soundfile.write(path, audio.T.numpy(), rate, subtype="FLOAT")
    instruction = Instruction(id=name, text=f"say {name}", response=f"it is {name}", task="echo", context="")
    spoken = Utterance(instruction=instruction, audio=torch.zeros(8), sampling_rate=rate, speaker="tester")
    fields = utterance_to_cut(spoken, teacher="nobody").custom | custom
    cut = Recording.from_file(path, recording_id=name).to_cut()
    cut.id, cut.custom = name, fields
    channels = list(range(audio.dim())) if audio.dim() > 1 else 0
    cut.supervisions = [
        SupervisionSegment(
            id=name, recording_id=name, start=0.0, duration=cut.duration, channel=channels, text=instruction.text
        )
    ]
    return cut


def tone(level: float, num_samples: int = 800) -> torch.Tensor:
    """Constant audio (A,), recognizable by its level."""
    return torch.full((num_samples,), level)


@pytest.fixture
def cut_of(tmp_path: Path) -> Callable[..., Cut]:
    """``cut_of(name, audio, rate=..., **custom)``, its wav in ``tmp_path``."""
    return partial(make_cut, tmp_path)


def write_items(folder: Path, num_items: int, unusable: Sequence[int] = ()) -> Path:
    """A JSONL of ``num_items`` cuts named item-00, item-01, ...; the audio of the ``unusable`` ones is missing."""
    cuts = [make_cut(folder, f"item-{i:02d}", tone(i / 100)) for i in range(num_items)]
    for i in unusable:
        (folder / f"item-{i:02d}.wav").unlink()
    CutSet.from_cuts(cuts).to_jsonl(folder / "cuts.jsonl")
    return folder / "cuts.jsonl"


@pytest.fixture
def items(tmp_path: Path) -> Callable[..., Path]:
    """``items(num_items, unusable=[...])`` writes a manifest."""
    return partial(write_items, tmp_path)


@pytest.fixture
def make_loader(tmp_path: Path, word_prompt: WordPrompt) -> Callable[..., SpeechLoader]:
    """A loader with small defaults; anything may be overridden."""

    def make(manifest: Path, **changes) -> SpeechLoader:
        dataset = SpeechInstructionDataset(
            prompt=word_prompt,
            sampling_rate=RATE,
            max_duration_seconds=1.0,
            max_response_tokens=50,
            quarantine=tmp_path / "quarantine.jsonl",
        )
        settings = {"batch_size": 2, "shuffle": True, "seed": 1, "rank": 0, "world_size": 1, "drop_last": True}
        return SpeechLoader(manifest=manifest, dataset=dataset, **settings | changes)

    return make
