# SPDX-License-Identifier: Apache-2.0
"""NeMo SALM checkpoint folders, in and out: checked to the last tensor.

A SALM keeps its word embeddings outside the language model (``embed_tokens.weight``), the rest under ``llm.`` and the
speech side under ``perception.``. NeMo itself loads such folders with ``strict=False``; here every missing or extra
tensor is an error. LoRA adapters, which NeMo installs with peft, are merged into the weights as these are read. The
folder written is the one NeMo's ``SALM.save_pretrained`` writes, with tokenizer files and
``llm_backbone/config.json`` beside it. Its ``pretrained_llm`` is the relative path ``llm_backbone``: NeMo's SALM finds
it from anywhere, NeMo's vLLM plug-in and the SALM of NeMo 2.7.3 when started inside the folder. The last reads with
transformers 4 and looks for the tokenizer in ``llm_backbone``: rotary names of both kinds and a second copy are there.
"""

import math
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PretrainedConfig

from nemo_rba.conversion import safetensors_file
from nemo_rba.conversion.foreign import refuse_foreign_code
from nemo_rba.conversion.hf import (
    SafetensorsFolder,
    Shapes,
    compare_shapes,
    config_values,
    expected_tensors,
    load_hf_config,
    read_json,
    write_json,
)
from nemo_rba.conversion.tokenizer_files import TOKENIZER_FILES, for_both_versions

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
# Keys of peft's LoraConfig with which an adapter, once trained, is what it is in arXiv 2106.09685: two factors a weight
_PLAIN_LORA = frozenset(
    ("r", "lora_alpha", "use_rslora", "lora_dropout", "init_lora_weights", "target_modules", "exclude_modules",
     "layers_to_transform", "layers_pattern", "fan_in_fan_out", "task_type", "inference_mode", "peft_type",
     "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "megatron_core")
)  # fmt: skip
_LORA_DEFAULTS = {"bias": "none", "qalora_group_size": 16, "runtime_config": {"ephemeral_gpu_offload": False}}
_PEFT, _FACTOR = "llm.base_model.model.", re.compile(r".+(\.lora_([AB])\.default)\.weight")


class MergedLoRA:
    """The tensors of a SALM trained with peft's LoRA, with the names and values they have once it is merged.

    It stands where a ``SafetensorsFolder`` stands: a weight is base + scale * B A, computed in float32 at every read.

    Raises:
        ValueError: an adapter that is more than two factors per weight, or factors that do not fit ``options``.
    """

    def __init__(self, stored: SafetensorsFolder, options: dict):
        self._stored, self._where = stored, f"{stored.folder / 'config.json'}: lora"
        rank = self._read_options(options)
        self._base: dict[str, str] = {}  # name after merging -> stored name
        self._factors: dict[str, dict[str, str]] = {}  # name after merging -> stored names of A and B
        for name in sorted(stored.names()):
            factor = _FACTOR.fullmatch(name)
            merged = name.replace(_PEFT, "llm.", 1).replace(".base_layer.", ".")
            if factor is None:
                self._base[merged] = name
            else:
                self._factors.setdefault(merged.replace(factor[1], "", 1), {})[factor[2]] = name
        self._check_tensors(rank)

    def _read_options(self, options: dict) -> int:
        if not isinstance(options, dict):
            raise ValueError(f"{self._where} is {options!r}; expected the keys of peft's LoraConfig")
        more = [f"{k}={v!r}" for k, v in options.items() if k not in _PLAIN_LORA and v and v != _LORA_DEFAULTS.get(k)]
        if more:
            raise ValueError(f"{self._where} has {', '.join(more)}; expected plain LoRA; merge these with peft")
        rank, alpha = options.get("r", 8), options.get("lora_alpha", 8)  # peft's own defaults
        if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
            raise ValueError(f"{self._where} has r={rank!r} and lora_alpha={alpha!r}; expected r above 0 and a number")
        self._scale = alpha / (math.sqrt(rank) if options.get("use_rslora") else rank)
        return rank

    def _check_tensors(self, rank: int) -> None:
        odd = [name for name in self._base.values() if "lora_" in name or "modules_to_save" in name]
        taken = {*self._base.values(), *(name for factors in self._factors.values() for name in factors.values())}
        odd += sorted(self._stored.names() - taken)  # they would merge to a name that another tensor has
        if odd:
            raise ValueError(f"{self.folder} has tensors of adapters that are not plain LoRA: {odd[:5]}")
        if not self._factors:
            raise ValueError(f"{self._where} is set, but no tensor is a LoRA factor; remove the key if it is merged")
        for name, factors in self._factors.items():
            if name not in self._base or len(factors) < 2:
                raise ValueError(f"{self.folder}: {name} lacks base_layer, lora_A or lora_B; found {factors}")
            found = [self._stored.shape(factors["A"]), self._stored.shape(factors["B"])]
            num_out, num_in = self.shape(name)
            if found != [(rank, num_in), (num_out, rank)]:
                raise ValueError(
                    f"{self.folder}: lora_A and lora_B of {name} have shapes {found}, expected "
                    f"{[(rank, num_in), (num_out, rank)]} with lora.r = {rank}"
                )

    @property
    def folder(self) -> Path:
        """Where the tensors lie."""
        return self._stored.folder

    def names(self) -> set[str]:
        """Names after merging."""
        return set(self._base)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from its file's header."""
        return self._stored.shape(self._base.get(name, name))

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor, from its file's header."""
        return self._stored.dtype(self._base.get(name, name))

    def __call__(self, name: str) -> Tensor:
        base = self._stored(self._base.get(name, name))
        if name not in self._factors:
            return base
        a, b = (self._stored(self._factors[name][factor]).float() for factor in "AB")
        return (base.float() + self._scale * (b @ a)).to(base.dtype)


@dataclass(frozen=True, slots=True)
class SALMFolder:
    """An opened SALM checkpoint."""

    folder: Path
    config: dict  # SALM's config.json
    llm_config: PretrainedConfig
    weights: SafetensorsFolder | MergedLoRA

    def read_llm(self, hf_name: str) -> Tensor:
        """A tensor of the language model by its Hugging Face name."""
        return self.weights(_salm_name(hf_name))

    def llm_dtype(self, hf_name: str) -> torch.dtype:
        """Type of a tensor of the language model, without reading it."""
        return self.weights.dtype(_salm_name(hf_name))

    def perception_state(self) -> dict[str, Tensor]:
        """State dict of NeMo's AudioPerceptionModule."""
        return {key.removeprefix(_PERCEPTION): self.weights(key) for key in self._perception_names()}

    def check_perception(self, expected: Shapes) -> None:
        """Compare with the shapes of an AudioPerceptionModule's state dict, without reading a tensor.

        Raises:
            ValueError: a tensor is missing, unexpected or of another shape.
        """
        found = {key.removeprefix(_PERCEPTION): self.weights.shape(key) for key in self._perception_names()}
        compare_shapes(found, expected, f"{self.folder}: the perception weights do not fit config.json")

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
    if seconds := config.get("encoder_chunk_size_seconds"):
        raise ValueError(
            f"{folder / 'config.json'} has encoder_chunk_size_seconds = {seconds}, but here a clip is "
            "encoded whole. Remove the key if no clip is longer than that"
        )
    refuse_foreign_code(config["perception"], f"{folder / 'config.json'}: perception")
    absent = [name for name in TOKENIZER_FILES if not (folder / name).is_file()]
    if absent:
        raise ValueError(f"{folder} lacks {absent}: write the tokenizer beside the weights (save_pretrained)")
    llm_config = load_hf_config(folder / "llm_backbone")
    width = config["perception"].get("output_dim")
    if width != llm_config.hidden_size:
        raise ValueError(
            f"{folder / 'config.json'}: perception.output_dim is {width}, expected {llm_config.hidden_size}, "
            "the hidden_size of llm_backbone/config.json"
        )
    weights = SafetensorsFolder(folder)
    if config.get("lora"):
        weights = MergedLoRA(weights, config["lora"])
    opened = SALMFolder(folder, config, llm_config, weights)
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
    compare_shapes(found, expected, f"{salm.folder}: the weights do not fit llm_backbone/config.json")


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
    write_json(folder / "config.json", _FIXED | settings)
    write_json(folder / "llm_backbone" / "config.json", config_values(llm_config, dtype))
    for name, content in for_both_versions(tokenizer).items():
        for place in (folder, folder / "llm_backbone"):
            (place / name).write_bytes(content)
