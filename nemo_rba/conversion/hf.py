# SPDX-License-Identifier: Apache-2.0
"""Language-model weights between Hugging Face folders and a megatron GPTModel, one tensor at a time."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from nemo_rba.conversion.families import FAMILIES, family_of, head_layout, old_rope_keys, rules, with_rope
from nemo_rba.conversion.mapping import Read, shard, unshard
from nemo_rba.conversion.safetensors_file import DTYPES

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TYPES = {name: dtype for dtype, name in DTYPES.items()}
Shapes = Mapping[str, tuple[int, ...]]


class SafetensorsFolder:
    """The tensors of ``model.safetensors``, or of the shards its index names, read on demand.

    Raises:
        ValueError: the folder, the weights or a shard is missing or unreadable.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder} is not a folder; expected one with config.json and {_WEIGHTS}")
        if (self.folder / _INDEX).is_file():
            self._files = self._read_index()
        elif (self.folder / _WEIGHTS).is_file():
            self._files = dict.fromkeys(self._open(_WEIGHTS).keys(), _WEIGHTS)
        else:
            raise ValueError(f"{self.folder} has neither {_WEIGHTS} nor {_INDEX}; is the download complete?")
        self._handles = {file: self._open(file) for file in sorted(set(self._files.values()))}
        held = {file: set(handle.keys()) for file, handle in self._handles.items()}
        lost = sorted(name for name, file in self._files.items() if name not in held[file])
        if lost:
            raise ValueError(f"{self.folder / _INDEX} names {len(lost)} tensors that its files lack: {lost[:5]}")

    def _read_index(self) -> dict[str, str]:
        try:
            files = dict(json.loads((self.folder / _INDEX).read_text())["weight_map"])
            lost = sorted(
                {file for file in files.values() if Path(file).name != file or not (self.folder / file).is_file()}
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.folder / _INDEX} is no safetensors index with a weight_map: {error!r}") from error
        if lost:
            raise ValueError(f"{self.folder / _INDEX} names {lost}, not in this folder; is the download complete?")
        return files

    def _open(self, name: str):
        try:
            return safe_open(self.folder / name, framework="pt")
        except Exception as error:  # safetensors raises its own type, FileNotFoundError or OSError
            raise ValueError(f"cannot read {self.folder / name}: {error}") from error

    def _handle(self, name: str):
        if name not in self._files:
            raise ValueError(f"{self.folder} has no tensor {name!r}; its weights do not fit its config.json")
        return self._handles[self._files[name]]

    def names(self) -> set[str]:
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from its file's header."""
        return tuple(self._handle(name).get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor, from its file's header.

        Raises:
            ValueError: a type that weights are not stored in, as those of quantized models.
        """
        stored = self._handle(name).get_slice(name).get_dtype()
        if stored not in _TYPES:
            raise ValueError(f"{self.folder}: tensor {name!r} is {stored}, expected one of {sorted(_TYPES)}")
        return _TYPES[stored]

    def __call__(self, name: str) -> Tensor:
        return self._handle(name).get_tensor(name)


def read_json(path: Path) -> dict:
    """A JSON object.

    Raises:
        ValueError: the file is missing, or holds something else.
    """
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{path.parent} has no {path.name}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, expected a JSON object")
    return values


def write_json(path: Path, values: dict) -> None:
    """Write a JSON object as Hugging Face does, to be read by people too."""
    path.write_text(json.dumps(values, indent=2) + "\n")


def load_hf_config(folder: str | Path) -> PretrainedConfig:
    """``config.json`` of a Hugging Face folder; code in the folder is never run.

    Raises:
        ValueError: no config.json there, or one of an architecture or option that is not supported.
    """
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; expected a Hugging Face language-model folder")
    name = read_json(Path(folder) / "config.json").get("model_type")
    if name not in FAMILIES:
        raise ValueError(f"{folder}: architecture {name!r} is not supported; expected one of {sorted(FAMILIES)}")
    config = with_rope(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    family_of(config)
    return config


def expected_tensors(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face names and shapes of all tensors of the language model, tied ones once; takes no memory."""
    family_of(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def compare_shapes(found: Shapes, expected: Shapes, what: str) -> None:
    """Compare the tensors of a checkpoint with those that its config asks for.

    Raises:
        ValueError: ``what``, and which are missing, unexpected or of another shape.
    """
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or extra:
        raise ValueError(f"{what}: {len(missing)} missing {missing[:5]}, {len(extra)} unexpected {extra[:5]}")
    wrong = [f"{name} {found[name]}, expected {shape}" for name, shape in expected.items() if found[name] != shape]
    if wrong:
        raise ValueError(f"{what}: {len(wrong)} tensors have another shape: {'; '.join(wrong[:5])}")


def config_values(config: PretrainedConfig, dtype: torch.dtype) -> dict:
    """``config.json`` of a language model, as transformers 4 and 5 read it; vLLM's plug-in wants ``architectures``."""
    values = config.to_diff_dict() | old_rope_keys(config) | {"dtype": str(dtype).removeprefix("torch.")}
    values.pop("_name_or_path", None)
    return values | {"architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]}


def global_name(gpt: nn.Module, name: str) -> tuple[str, int]:
    """Parameter name -> (name with {} for the layer, global layer number)."""
    if not name.startswith("decoder.layers."):
        return name, -1
    _, _, local, rest = name.split(".", 3)
    return "decoder.layers.{}." + rest, gpt.decoder.layers[int(local)].layer_number - 1


@torch.no_grad()
def load_weights(gpt: nn.Module, read: Read, config: PretrainedConfig, *, tp_size: int, tp_rank: int) -> None:
    """Fill this rank's parameters, reading only what it needs.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    table, heads = rules(config), head_layout(config)
    for name, parameter in gpt.named_parameters():
        template, layer = global_name(gpt, name)
        value = shard(table[template].to_megatron(read, layer, heads), parameter, tp_size, tp_rank)
        if value.shape != parameter.shape:
            raise ValueError(
                f"{template.format(layer)} has shape {tuple(value.shape)} in the checkpoint, expected "
                f"{tuple(parameter.shape)}; its weights do not fit its config.json"
            )
        parameter.copy_(value)


@torch.no_grad()
def export_weights(gpt: nn.Module, config: PretrainedConfig, *, tp_group) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face tensors of this pipeline stage, gathered over tensor-parallel ranks one by one. Collective."""
    table, heads = rules(config), head_layout(config)
    size = dist.get_world_size(tp_group)
    for name, parameter in gpt.named_parameters():
        template, layer = global_name(gpt, name)
        if template == "output_layer.weight" and config.tie_word_embeddings:
            continue
        slices = [parameter.detach()]
        if size > 1 and parameter.tensor_model_parallel:
            slices = [torch.empty_like(parameter) for _ in range(size)]
            dist.all_gather(slices, parameter.detach().contiguous(), group=tp_group)
        yield from table[template].to_hf(words_only(gpt, name, unshard(slices, parameter)), layer, heads).items()


def words_only(gpt: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A whole tensor without the rows that only make the vocabulary divide by the number of ranks."""
    return tensor[: gpt.num_words] if name in ("embedding.word_embeddings.weight", "output_layer.weight") else tensor


def config_from_dict(values: dict) -> PretrainedConfig:
    """The config object of a dictionary that ``config.to_diff_dict()`` gave, under any version of transformers."""
    values = dict(values)
    return with_rope(AutoConfig.for_model(values.pop("model_type"), **values))
