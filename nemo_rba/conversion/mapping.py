# SPDX-License-Identifier: Apache-2.0
"""How one megatron tensor relates to Hugging Face tensors: three shapes cover the dense decoder families.

All tensors here are full (not sharded), named by global layer. ``{}`` in a name stands for the layer number.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Read = Callable[[str], Tensor]  # Hugging Face name -> tensor


@dataclass(frozen=True, slots=True)
class HeadLayout:
    """Heads of the attention: query heads, key-value heads, head size."""

    num_heads: int
    num_groups: int
    head_dim: int


class Rule(Protocol):
    """One megatron tensor."""

    megatron: str

    def to_megatron(self, read: Read, layer: int, heads: HeadLayout) -> Tensor:
        """Make it from Hugging Face tensors."""

    def to_hf(self, tensor: Tensor, layer: int, heads: HeadLayout) -> dict[str, Tensor]:
        """Split it into Hugging Face tensors; exact inverse."""


@dataclass(frozen=True, slots=True)
class Same:
    """The same tensor under another name."""

    megatron: str
    hf: str

    def to_megatron(self, read: Read, layer: int, heads: HeadLayout) -> Tensor:
        return read(self.hf.format(layer))

    def to_hf(self, tensor: Tensor, layer: int, heads: HeadLayout) -> dict[str, Tensor]:
        return {self.hf.format(layer): tensor}


@dataclass(frozen=True, slots=True)
class FusedQKV:
    """Per key-value head: its query heads, its key, its value, stacked."""

    megatron: str
    hf: str  # with {part} for q, k, v

    def to_megatron(self, read: Read, layer: int, heads: HeadLayout) -> Tensor:
        parts = [read(self.hf.format(layer, part=part)) for part in "qkv"]
        grouped = [part.view(heads.num_groups, -1, *part.shape[1:]) for part in parts]
        return torch.cat(grouped, 1).flatten(0, 1)

    def to_hf(self, tensor: Tensor, layer: int, heads: HeadLayout) -> dict[str, Tensor]:
        queries = heads.num_heads // heads.num_groups * heads.head_dim
        grouped = tensor.view(heads.num_groups, -1, *tensor.shape[1:])
        parts = grouped.split([queries, heads.head_dim, heads.head_dim], 1)
        names = [self.hf.format(layer, part=part) for part in "qkv"]
        return {name: part.flatten(0, 1).contiguous() for name, part in zip(names, parts, strict=True)}


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """Gate over up."""

    megatron: str
    gate: str
    up: str

    def to_megatron(self, read: Read, layer: int, heads: HeadLayout) -> Tensor:
        return torch.cat((read(self.gate.format(layer)), read(self.up.format(layer))))

    def to_hf(self, tensor: Tensor, layer: int, heads: HeadLayout) -> dict[str, Tensor]:
        gate, up = tensor.chunk(2)
        return {self.gate.format(layer): gate.contiguous(), self.up.format(layer): up.contiguous()}


def shard(full: Tensor, parameter: Tensor, size: int, rank: int) -> Tensor:
    """The slice of ``full`` that tensor-parallel rank ``rank`` of ``size`` holds, from megatron's own attributes."""
    if size == 1 or not parameter.tensor_model_parallel:
        return full
    dim, stride = parameter.partition_dim, parameter.partition_stride
    full = _filled_up(full, parameter.shape[dim] * size - full.shape[dim], size)
    return torch.cat([part.chunk(size, dim)[rank] for part in full.chunk(stride, dim)], dim)


def _filled_up(full: Tensor, lacking: int, size: int) -> Tensor:
    """Zeros behind a vocabulary that does not divide by the number of ranks; anything else is returned as it is."""
    return torch.cat((full, full.new_zeros(lacking, *full.shape[1:]))) if 0 < lacking < size else full


def unshard(slices: list[Tensor], parameter: Tensor) -> Tensor:
    """The full tensor from every rank's slice; inverse of ``shard``."""
    if len(slices) == 1:
        return slices[0]
    dim, stride = parameter.partition_dim, parameter.partition_stride
    chunks = [piece.chunk(stride, dim) for piece in slices]
    return torch.cat([torch.cat([chunk[i] for chunk in chunks], dim) for i in range(stride)], dim)
