# SPDX-License-Identifier: Apache-2.0
"""NeMo SALM checkpoint folders: what they hold, checked to the last tensor.

A SALM keeps its word embeddings outside the language model (``embed_tokens.weight``), the rest under ``llm.`` and the
speech side under ``perception.``. NeMo itself loads such folders with ``strict=False``; here every missing or extra
tensor is an error.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PretrainedConfig

from nemo_rba.conversion.families import rules
from nemo_rba.conversion.hf import SafetensorsFolder, load_hf_config
from nemo_rba.conversion.mapping import FusedQKV, GatedMLP

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_NEEDED = ("perception", "prompt_format", "audio_locator_tag")


@dataclass(frozen=True, slots=True)
class SALMFolder:
    """An opened SALM checkpoint."""

    folder: Path
    config: dict  # SALM's config.json
    llm_config: PretrainedConfig
    weights: SafetensorsFolder

    def read_llm(self, hf_name: str) -> Tensor:
        """A tensor of the language model by its Hugging Face name."""
        return self.weights(_salm_name(hf_name))

    def perception_state(self) -> dict[str, Tensor]:
        """State dict of NeMo's AudioPerceptionModule."""
        prefix = "perception."
        return {key[len(prefix) :]: self.weights(key) for key in self.weights.names() if key.startswith(prefix)}


def _salm_name(hf_name: str) -> str:
    return "embed_tokens.weight" if hf_name == "model.embed_tokens.weight" else "llm." + hf_name


def open_salm(folder: str | Path) -> SALMFolder:
    """Open a SALM checkpoint folder and check it before anything is built.

    Raises:
        ValueError: a file or key is missing, or the language model's tensors are not exactly those its config needs.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; expected a NeMo SALM checkpoint (SALM.save_pretrained)")
    config = json.loads((folder / "config.json").read_text())
    missing = [key for key in _NEEDED if key not in config]
    if missing:
        raise ValueError(f"{folder / 'config.json'} lacks {missing}; is it a NeMo SALM checkpoint?")
    if config.get("lora"):
        raise ValueError(f"{folder} has LoRA adapters ({config['lora']}); merge them into the weights first")
    absent = [name for name in _TOKENIZER_FILES if not (folder / name).is_file()]
    if absent:
        raise ValueError(f"{folder} lacks {absent}: write the tokenizer beside the weights (save_pretrained)")
    llm_config = load_hf_config(folder / "llm_backbone")
    opened = SALMFolder(folder, config, llm_config, SafetensorsFolder(folder))
    _check_llm_tensors(opened)
    return opened


def expected_llm_tensors(config: PretrainedConfig) -> set[str]:
    """Hugging Face names of all tensors of the language model."""
    names = set()
    for rule in rules(config).values():
        if isinstance(rule, FusedQKV):
            templates = [rule.hf.replace("{part}", part) for part in "qkv"]
        elif isinstance(rule, GatedMLP):
            templates = [rule.gate, rule.up]
        else:
            templates = [rule.hf]
        for template in templates:
            layers = range(config.num_hidden_layers) if "{}" in template else (0,)
            names.update(template.format(layer) for layer in layers)
    return names


def _check_llm_tensors(salm: SALMFolder) -> None:
    expected = {_salm_name(name) for name in expected_llm_tensors(salm.llm_config)}
    found = {key for key in salm.weights.names() if not key.startswith("perception.")}
    if salm.llm_config.tie_word_embeddings:
        found.discard("llm.lm_head.weight")  # a copy of embed_tokens.weight that save_pretrained writes
    missing, extra = sorted(expected - found), sorted(found - expected)
    if missing or extra:
        raise ValueError(
            f"{salm.folder}: the weights do not fit llm_backbone/config.json: {len(missing)} missing {missing[:5]}, "
            f"{len(extra)} unexpected {extra[:5]}"
        )
