# SPDX-License-Identifier: Apache-2.0
"""A model's state dict as one process would have it, from any layout and into any layout: what a ``.nemo`` holds.

Names and shapes are those of one process: layers by their global number, tensors unsharded, tied embeddings once.
Transformer Engine keeps two norms of a layer elsewhere than megatron's own layers do; both write the latter's names.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from nemo_rba.conversion.hf import global_name, words_only
from nemo_rba.conversion.mapping import shard, unshard
from nemo_rba.distributed import parallel, pipeline

_EMBEDDINGS, _OUTPUT = "llm.embedding.word_embeddings.weight", "llm.output_layer.weight"
_PLAIN_NAMES = {  # Transformer Engine has a norm inside the linear layer that follows it
    "decoder.layers.{}.self_attention.linear_qkv.layer_norm_weight": "decoder.layers.{}.input_layernorm.weight",
    "decoder.layers.{}.mlp.linear_fc1.layer_norm_weight": "decoder.layers.{}.pre_mlp_layernorm.weight",
}


def _local_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Global name -> this rank's tensor or parameter.

    Extra states are left out: None in megatron's layers, a tensor without elements in Transformer Engine's.
    """
    parameters = dict(model.named_parameters())
    found = {}
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor) and not name.endswith("_extra_state"):
            found[_whole_name(model, name)] = parameters.get(name, value)
    if model.share_embeddings_and_output_weights:
        found.pop(_OUTPUT, None)
    return found


def _whole_name(model: nn.Module, name: str) -> str:
    if not name.startswith("llm."):
        return name
    template, layer = global_name(model.llm, name.removeprefix("llm."))
    return "llm." + _PLAIN_NAMES.get(template, template).format(layer)


@torch.no_grad()
def gather_state(model: nn.Module) -> dict[str, Tensor]:
    """The whole state dict on the CPU of global rank 0, {} elsewhere, tensor by tensor. Collective.

    Other ranks never hold more than one whole tensor beside their share.
    """
    tensors, whole = _local_tensors(model), {}
    tp_group = parallel_state.get_tensor_model_parallel_group()
    tp_size, here = dist.get_world_size(tp_group), parallel_state.get_pipeline_model_parallel_rank()
    for stage, names in enumerate(pipeline.gather_over_stages(list(tensors))):
        for name in names:
            full = None
            if stage == here:
                value, slices = tensors[name].detach().to(parallel.device()).contiguous(), None  # NCCL has no CPU
                if tp_size > 1 and getattr(tensors[name], "tensor_model_parallel", False):
                    slices = [torch.empty_like(value) for _ in range(tp_size)]
                    dist.all_gather(slices, value, group=tp_group)
                full = value if slices is None else unshard(slices, tensors[name])
                full = words_only(model.llm, name.removeprefix("llm."), full)
            full = pipeline.to_first_stage(full, stage)
            if parallel.rank() == 0:
                whole[name] = full.cpu()
    return whole


@torch.no_grad()
def load_state(model: nn.Module, whole: Mapping[str, Tensor]) -> None:
    """Fill this rank's share of the model from a whole state dict, which may be memory-mapped. Collective.

    Raises:
        ValueError: a tensor is missing, unexpected or of another shape.
    """
    tensors = _local_tensors(model)
    if model.share_embeddings_and_output_weights and not model.pre_process:
        tensors[_EMBEDDINGS] = model.llm.shared_embedding_or_output_weight()
    found = {name for name, value in whole.items() if isinstance(value, Tensor)}
    expected = {name for names in pipeline.gather_over_stages(list(tensors)) for name in names}
    if found != expected:
        missing, extra = sorted(expected - found), sorted(found - expected)
        raise ValueError(f"{len(missing)} missing tensors {missing[:5]}, {len(extra)} unexpected {extra[:5]}")
    size = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    for name, tensor in tensors.items():
        value = whole[name]
        if getattr(tensor, "tensor_model_parallel", False):
            value = shard(value, tensor, size, rank)
        if value.shape != tensor.shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {tuple(tensor.shape)}")
        tensor.copy_(value)
