# SPDX-License-Identifier: Apache-2.0
"""NeMo SALM checkpoint folders, in and out: checked to the last tensor.

A SALM keeps its word embeddings outside the language model (``embed_tokens.weight``), the rest under ``llm.`` and the
speech side under ``perception.``. NeMo itself loads such folders with ``strict=False``; here every missing or extra
tensor is an error. The folder written is the one NeMo's ``SALM.save_pretrained`` writes, with tokenizer files and
``llm_backbone/config.json`` beside it. Its ``pretrained_llm`` is the relative path ``llm_backbone``: NeMo's SALM finds
it from anywhere, NeMo's vLLM plug-in when started inside the folder.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PretrainedConfig

from nemo_rba.conversion import safetensors_file
from nemo_rba.conversion.foreign import refuse_foreign_code
from nemo_rba.conversion.hf import SafetensorsFolder, expected_tensors, load_hf_config, read_json

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_NEEDED = ("perception", "prompt_format", "audio_locator_tag")
_EMBEDDINGS, _TIED_COPY, _PERCEPTION = "embed_tokens.weight", "llm.lm_head.weight", "perception."
_FIXED = {
    "pretrained_llm": "llm_backbone",
    "pretrained_asr": "none",
    "pretrained_weights": False,
    "freeze_params": [],
    "prevent_freeze_params": [],
    "model_type": "nemo_speechlm",
    "architectures": ["NeMoSpeechLMForConditionalGeneration"],
}
Shapes = Mapping[str, tuple[int, ...]]


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
        return {key.removeprefix(_PERCEPTION): self.weights(key) for key in self._perception_names()}

    def check_perception(self, expected: Shapes) -> None:
        """Compare with the shapes of an AudioPerceptionModule's state dict, without reading a tensor.

        Raises:
            ValueError: a tensor is missing, unexpected or of another shape.
        """
        found = {key.removeprefix(_PERCEPTION): self.weights.shape(key) for key in self._perception_names()}
        _compare(found, expected, f"{self.folder}: the perception weights do not fit config.json")

    def _perception_names(self) -> list[str]:
        return [key for key in self.weights.names() if key.startswith(_PERCEPTION)]


def _salm_name(hf_name: str) -> str:
    return _EMBEDDINGS if hf_name == "model.embed_tokens.weight" else "llm." + hf_name


def open_salm(folder: str | Path) -> SALMFolder:
    """Open a SALM checkpoint folder and check it before anything is built; only tensor headers are read.

    Raises:
        ValueError: a file or key is missing, or the language model's tensors are not exactly those its config needs.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; expected a NeMo SALM checkpoint (SALM.save_pretrained)")
    config = read_json(folder / "config.json")
    missing = [key for key in _NEEDED if not config.get(key)]
    if missing:
        raise ValueError(f"{folder / 'config.json'} lacks {missing}; is it a NeMo SALM checkpoint?")
    if config.get("lora"):
        raise ValueError(f"{folder} has LoRA adapters ({config['lora']}); merge them into the weights first")
    refuse_foreign_code(config["perception"], f"{folder / 'config.json'}: perception")
    absent = [name for name in _TOKENIZER_FILES if not (folder / name).is_file()]
    if absent:
        raise ValueError(f"{folder} lacks {absent}: write the tokenizer beside the weights (save_pretrained)")
    llm_config = load_hf_config(folder / "llm_backbone")
    width = config["perception"].get("output_dim")
    if width != llm_config.hidden_size:
        raise ValueError(
            f"{folder / 'config.json'}: perception.output_dim is {width}, expected {llm_config.hidden_size}, "
            "the hidden_size of llm_backbone/config.json"
        )
    opened = SALMFolder(folder, config, llm_config, SafetensorsFolder(folder))
    _check_llm(opened)
    return opened


def _check_llm(salm: SALMFolder) -> None:
    expected = {_salm_name(name): shape for name, shape in expected_tensors(salm.llm_config).items()}
    found = {key: salm.weights.shape(key) for key in salm.weights.names() if not key.startswith(_PERCEPTION)}
    copied = salm.llm_config.tie_word_embeddings and found.pop(_TIED_COPY, None) and _EMBEDDINGS in found
    if copied and not torch.equal(salm.weights(_TIED_COPY), salm.weights(_EMBEDDINGS)):
        raise ValueError(
            f"{salm.folder}: {_TIED_COPY} differs from {_EMBEDDINGS}, but llm_backbone/config.json has "
            "tie_word_embeddings: true; set it to false"
        )
    _compare(found, expected, f"{salm.folder}: the weights do not fit llm_backbone/config.json")


def _compare(found: Shapes, expected: Shapes, what: str) -> None:
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or extra:
        raise ValueError(f"{what}: {len(missing)} missing {missing[:5]}, {len(extra)} unexpected {extra[:5]}")
    wrong = [f"{name} {found[name]}, expected {shape}" for name, shape in expected.items() if found[name] != shape]
    if wrong:
        raise ValueError(f"{what}: {len(wrong)} tensors have another shape: {'; '.join(wrong[:5])}")


@torch.no_grad()
def write_salm(
    folder: Path, *, settings: dict, llm_config: PretrainedConfig, dtype: torch.dtype, tokenizer: dict[str, bytes],
    perception: dict[str, Tensor] | None, llm_tensors: Iterable[tuple[str, Tensor]], is_writer: bool,
) -> None:  # fmt: skip
    """Write a SALM checkpoint folder; it appears under its name when it is complete. Collective.

    ``settings`` holds perception, prompt_format and audio_locator_tag; ``perception`` is the state dict, on global rank
    0 at least; ``llm_tensors`` are this process's Hugging Face tensors, which it writes when ``is_writer``.

    Raises:
        ValueError: the folder exists, or the tensors are not those of ``llm_config``.
    """
    rank, partial = dist.get_rank(), folder.with_name(folder.name + ".partial")
    if folder.exists():
        raise ValueError(f"{folder} exists already; name a new folder or remove it")
    dist.barrier()
    speech = {_PERCEPTION + name: tensor for name, tensor in (perception or {}).items()}
    layout = {_salm_name(name): (dtype, shape) for name, shape in expected_tensors(llm_config).items()}
    layout |= {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in speech.items()}
    if rank == 0:
        _write_small_files(partial, settings, llm_config, dtype, tokenizer)
        safetensors_file.create(partial / "model.safetensors", layout)
    dist.barrier()
    renamed = ((_salm_name(name), tensor) for name, tensor in llm_tensors)
    written = _write_or_follow(partial / "model.safetensors", renamed, is_writer)
    if rank == 0:
        written |= safetensors_file.fill(partial / "model.safetensors", speech.items())
    everyone: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(everyone, written)
    missing = sorted(layout.keys() - set().union(*everyone))
    if missing:
        raise ValueError(f"{partial}: {len(missing)} tensors were not written: {missing[:5]}")
    if rank == 0:
        partial.rename(folder)
    dist.barrier()


def _write_or_follow(path: Path, tensors: Iterator[tuple[str, Tensor]], is_writer: bool) -> set[str]:
    """Gathering is collective, so processes that write nothing take part in it all the same."""
    if is_writer:
        return safetensors_file.fill(path, tensors)
    for _ in tensors:
        pass
    return set()


def _write_small_files(
    folder: Path, settings: dict, llm_config: PretrainedConfig, dtype: torch.dtype, tokenizer: dict[str, bytes]
) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # left by an interrupted export
    (folder / "llm_backbone").mkdir(parents=True)
    backbone = llm_config.to_diff_dict() | {"dtype": str(dtype).removeprefix("torch.")}
    backbone.pop("_name_or_path", None)
    for name, values in {"config.json": _FIXED | settings, "llm_backbone/config.json": backbone}.items():
        (folder / name).write_text(json.dumps(values, indent=2) + "\n")
    for name, content in tokenizer.items():
        (folder / name).write_bytes(content)
