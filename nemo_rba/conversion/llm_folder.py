# SPDX-License-Identifier: Apache-2.0
"""The language model alone, as Hugging Face keeps it: out of a SALM folder, and into a model that has its shape.

So the words of a SpeechLM can be trained, measured or served by whatever reads Hugging Face folders, and come back.
"""

import shutil
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, PretrainedConfig

from nemo_rba.conversion import safetensors_file
from nemo_rba.conversion.families import gpt_arguments
from nemo_rba.conversion.hf import (
    SafetensorsFolder,
    compare_shapes,
    config_values,
    expected_tensors,
    load_hf_config,
    load_weights,
    write_json,
)
from nemo_rba.conversion.salm import SALMFolder
from nemo_rba.conversion.tokenizer_files import TOKENIZER_FILES, read_tokenizer

_EMBEDDINGS, _TIED_COPY = "model.embed_tokens.weight", "lm_head.weight"
_COMPUTED = "rotary_emb.inv_freq"  # stored in early Llama folders; follows from the config


def write_llm(salm: SALMFolder, folder: str | Path) -> None:
    """Write the language model of a SALM folder as a Hugging Face folder, tensor by tensor, LoRA merged, types kept.

    The folder appears under its name when it is complete.

    Raises:
        ValueError: the folder exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists already; name a new folder or remove it")
    draft = folder.with_name(folder.name + ".partial")
    shutil.rmtree(draft, ignore_errors=True)  # left by an interrupted export
    draft.mkdir(parents=True)
    layout = {name: (salm.llm_dtype(name), shape) for name, shape in expected_tensors(salm.llm_config).items()}
    safetensors_file.create(draft / "model.safetensors", layout)
    safetensors_file.fill(draft / "model.safetensors", ((name, salm.read_llm(name)) for name in layout))
    write_json(draft / "config.json", config_values(salm.llm_config, layout[_EMBEDDINGS][0]))
    for name, content in read_tokenizer(salm.folder).items():
        (draft / name).write_bytes(content)
    draft.rename(folder)


def load_llm(
    gpt: nn.Module, config: PretrainedConfig, vocabulary: dict[str, int], folder: str | Path, *, tp_size: int,
    tp_rank: int,
) -> None:  # fmt: skip
    """Give ``gpt``, which was built for ``config``, the weights of a Hugging Face folder.

    ``vocabulary`` (token -> id) is the one that the model is prompted with; the folder's may lack some of it.

    Raises:
        ValueError: another architecture or vocabulary, or tensors that are missing, unexpected or of another shape.
    """
    folder, other = Path(folder), load_hf_config(folder)
    ours, theirs = (_flat(gpt_arguments(each)) for each in (config, other))
    different = {key: (theirs[key], value) for key, value in ours.items() if theirs[key] != value}
    if different:
        raise ValueError(f"{folder / 'config.json'} is no language model of this shape; (found, expected): {different}")
    absent = [name for name in TOKENIZER_FILES if not (folder / name).is_file()]
    if absent:
        raise ValueError(f"{folder} lacks {absent}: without them nobody knows which word a row of the weights is")
    words = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True).get_vocab()
    moved = sorted(word for word, number in words.items() if vocabulary.get(word) != number)
    if moved:
        raise ValueError(f"{folder}: {len(moved)} tokens have another id than in the SpeechLM, as {moved[:5]}")
    read = SafetensorsFolder(folder)
    _check_tensors(read, other)
    load_weights(gpt, read, other, tp_size=tp_size, tp_rank=tp_rank)


def _flat(arguments: dict) -> dict:
    """Of ``gpt_arguments``; the longest sequence is no part of the shape, because no tensor has it."""
    return {key: value for key, value in (arguments | arguments["transformer"]).items()
            if key not in ("transformer", "max_sequence_length")}  # fmt: skip


def _check_tensors(read: SafetensorsFolder, config: PretrainedConfig) -> None:
    found = {name: read.shape(name) for name in read.names() if not name.endswith(_COMPUTED)}
    copied = config.tie_word_embeddings and found.pop(_TIED_COPY, None) and _EMBEDDINGS in found
    if copied and not torch.equal(read(_TIED_COPY), read(_EMBEDDINGS)):
        raise ValueError(
            f"{read.folder}: {_TIED_COPY} differs from {_EMBEDDINGS}, but config.json has tie_word_embeddings: true"
        )
    compare_shapes(found, expected_tensors(config), f"{read.folder}: the weights do not fit config.json")
