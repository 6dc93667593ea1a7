# SPDX-License-Identifier: Apache-2.0
"""Low-rank adaptation (LoRA, arXiv 2106.09685) of megatron's linear layers, under every parallel layout.

    output = W x + alpha / rank * B (A x)          A (rank, in), B (out, rank), B = 0 at the start

    column-parallel (linear_qkv, linear_fc1)       A is whole on every rank, B is cut as W is, along its rows
    row-parallel (linear_proj, linear_fc2)         A is cut as W is, along its columns, B is whole on every rank

The layers keep their weights, names and state: the two factors join them as ``lora_a`` and ``lora_b``, and the layer's
class gets a subclass that adds them (as torch's ``fully_shard`` does). Between the factors rank numbers per position
are communicated, never the output. Under sequence parallelism the whole factor sees a part of the positions: it is
marked ``sequence_parallel``, so that megatron sums its gradient over tensor-parallel ranks.

peft's ``LoraParallelLinear`` is not used: it renames the weights, its start values depend on the layout, it does not
mark the whole factors, knows no layer of Transformer Engine and sets the model's ``params_dtype`` to float32.
As in NeMo, the fused matrices (query, key, value; gate, up) share one A.
"""

import functools
import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from nemo_rba.conversion.mapping import shard

TARGET_MODULES = {
    "linear_qkv": "self_attention.linear_qkv",
    "linear_proj": "self_attention.linear_proj",
    "linear_fc1": "mlp.linear_fc1",
    "linear_fc2": "mlp.linear_fc2",
}
_ROW_PARALLEL = ("linear_proj", "linear_fc2")
_FACTORS = ("lora_a", "lora_b")


class _LoRALinear:
    """Stands before a linear layer's class: its output and its sharded checkpoint gain the two factors."""

    # Set by add_lora: lora_a, lora_b, lora_scale (alpha / rank), lora_is_row (row-parallel), lora_enabled.

    def forward(self, input_: Tensor, *args, **kwargs):
        output, bias = super().forward(input_, *args, **kwargs)
        return (output + self._lora_delta(input_) if self.lora_enabled else output), bias

    def _lora_delta(self, input_: Tensor) -> Tensor:
        """What the factors add to the output, with its shape; input_ (s, b, in) as the layer gets it."""
        hidden = F.linear(self._lora_normed(input_), self.lora_a)  # (s, b, rank)
        if self.lora_is_row:  # every rank has a term of the sum over the input
            whole = mappings.reduce_from_tensor_model_parallel_region
            parts = mappings.reduce_scatter_to_sequence_parallel_region
        else:  # every rank has a part of the output, so the gradient is summed
            whole = mappings.copy_to_tensor_model_parallel_region
            parts = mappings.gather_from_sequence_parallel_region
        hidden = parts(hidden) if self.sequence_parallel else whole(hidden)
        return F.linear(self.lora_scale * hidden, self.lora_b)

    def _lora_normed(self, input_: Tensor) -> Tensor:
        """What W is multiplied with: Transformer Engine normalises inside the linear layer."""
        weight = getattr(self, "layer_norm_weight", None)
        if weight is None:
            return input_
        weight = weight + 1 if self.zero_centered_gamma else weight
        return F.rms_norm(input_, weight.shape, weight, self.eps)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """The layer's own, in which both factors are taken for whole, with the one that is cut put right."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        name, factor = ("lora_a", self.lora_a) if self.lora_is_row else ("lora_b", self.lora_b)
        groups = {"tp_group": parallel_state.get_tensor_model_parallel_group(), "dp_cp_group": metadata["dp_cp_group"]}
        cut = make_sharded_tensors_for_checkpoint(
            {name: factor}, prefix, {name: factor.partition_dim}, sharded_offsets, **groups
        )
        if factor.partition_stride == 2:  # a rank's rows are a part of gate and a part of up
            key, singleton = prefix + name, metadata.get("singleton_local_shards", False)
            cut[key] = apply_swiglu_sharded_factory(cut[key], sharded_offsets, singleton)
        return state | cut


def add_lora(gpt: GPTModel, *, rank: int, alpha: float, target_modules: Sequence[str], seed: int) -> dict[str, Tensor]:
    """Give this rank's linear layers their factors; call it after ``load_weights`` and before megatron's DDP.

    A is drawn whole from (seed, global name) and then cut, so every layout starts with the same values; B is zero, so
    the model with adapters is the model without until the first step. Nothing is frozen. There is no dropout.

    Args:
        gpt: a model of ``modules.gpt.build_gpt``.
        rank: r of the paper.
        alpha: the product of the factors is multiplied with alpha / rank.
        target_modules: names out of ``TARGET_MODULES``.
        seed: of the start values.

    Returns:
        The new parameters, as ``lora_parameters``.

    Raises:
        ValueError: an argument out of range, an unknown layer, or a model that has adapters already.
    """
    _check(gpt, rank, alpha, target_modules)
    for layer in gpt.decoder.layers:
        for target in target_modules:
            path = TARGET_MODULES[target]
            linear, name = layer.get_submodule(path), f"decoder.layers.{layer.layer_number - 1}.{path}"
            linear.lora_scale, linear.lora_is_row, linear.lora_enabled = alpha / rank, target in _ROW_PARALLEL, True
            _add_factors(linear, f"{seed}:{name}.lora_a", rank)
            linear.__class__ = _with_lora(type(linear))
    return lora_parameters(gpt)


def _check(gpt: GPTModel, rank: int, alpha: float, target_modules: Sequence[str]) -> None:
    if rank < 1 or alpha <= 0:
        raise ValueError(f"lora.rank is {rank} and lora.alpha is {alpha}; expected rank of at least 1, alpha above 0")
    known = not isinstance(target_modules, str) and set(target_modules) <= TARGET_MODULES.keys()
    if not known or not target_modules or len(set(target_modules)) < len(target_modules):
        names = list(TARGET_MODULES)
        raise ValueError(f"lora.target_modules is {target_modules!r}; expected a list of different names of {names}")
    if _adapted(gpt):
        raise ValueError("this model has LoRA adapters already; merge them into the weights before adding new ones")


@functools.cache
def _with_lora(base: type) -> type:
    return type(f"LoRA{base.__name__}", (_LoRALinear, base), {})


@torch.no_grad()
def _add_factors(linear: nn.Module, random_key: str, rank: int) -> None:
    """Register this rank's factors with the attributes from which megatron and our conversion know what is cut."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    weight, is_row = linear.weight, linear.lora_is_row  # (out, in), this rank's
    a, b = nn.Parameter(weight.new_empty(rank, weight.shape[1])), nn.Parameter(weight.new_zeros(weight.shape[0], rank))
    whole, cut, dim, stride = (b, a, 1, 1) if is_row else (a, b, 0, weight.partition_stride)
    tensor_parallel.set_tensor_model_parallel_attributes(cut, True, dim, stride)
    tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(whole)
    whole.sequence_parallel = linear.sequence_parallel
    digest = hashlib.blake2b(random_key.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    full = torch.empty(rank, weight.shape[1] * (size if is_row else 1))
    nn.init.kaiming_uniform_(full, a=math.sqrt(5), generator=generator)
    a.copy_(shard(full, a, size, parallel_state.get_tensor_model_parallel_rank()))
    linear.register_parameter("lora_a", a)
    linear.register_parameter("lora_b", b)


def _adapted(gpt: nn.Module) -> list[nn.Module]:
    return [module for module in gpt.modules() if isinstance(module, _LoRALinear)]


def lora_parameters(gpt: nn.Module) -> dict[str, Tensor]:
    """The factors by their names in ``gpt.named_parameters()``; empty without adapters, and inside of ``merged``."""
    return {name: p for name, p in gpt.named_parameters() if name.rpartition(".")[2] in _FACTORS}


@contextmanager
def disabled(gpt: nn.Module) -> Iterator[None]:
    """Scope in which the adapters add nothing: the model of the base weights, at no cost.

    With frozen base weights this is the start model; so is one whose factors have their start values (B = 0).
    """
    linears = [linear for linear in _adapted(gpt) if linear.lora_enabled]
    try:
        for linear in linears:
            linear.lora_enabled = False
        yield
    finally:
        for linear in linears:
            linear.lora_enabled = True


@contextmanager
def merged(gpt: nn.Module) -> Iterator[None]:
    """Scope in which W is W + alpha / rank * B A and the model has no adapters: for export, ``.nemo`` and inference.

    Layers, parameter names and ``state_dict`` are those of a model without LoRA. Afterwards all is exactly as before:
    the original tensors are kept, which takes the memory of the adapted weights once more. Not for training.
    """
    undo = [(m, type(m), m.weight.data, {n: getattr(m, n) for n in _FACTORS}) for m in _adapted(gpt)]
    try:
        for linear, kind, weight, factors in undo:
            if linear.lora_enabled:
                product = linear.lora_b.data.float() @ linear.lora_a.data.float()
                linear.weight.data = (weight.float() + linear.lora_scale * product).to(weight.dtype)
            linear.__class__ = kind.__mro__[2]  # after kind itself and _LoRALinear
            for name in factors:
                delattr(linear, name)
        yield
    finally:
        for linear, kind, weight, factors in undo:
            linear.weight.data, linear.__class__ = weight, kind
            for name, factor in factors.items():
                linear.register_parameter(name, factor)
