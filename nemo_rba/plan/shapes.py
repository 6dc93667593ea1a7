# SPDX-License-Identifier: Apache-2.0
"""Parameter shapes of every rank of a layout, on one process without weights, GPUs or a network.

torch's fake process group lets this process be any rank of any world: megatron builds that rank's share of the model,
and the meta device gives it shapes without memory. All tensor-parallel ranks of a pipeline stage hold the same shapes,
so one rank a stage is enough.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from nemo.collections.speechlm2.modules.perception import AudioPerceptionModule
from omegaconf import OmegaConf
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from nemo_rba.distributed import cpu, parallel
from nemo_rba.modules.gpt import build_gpt
from nemo_rba.modules.lora import add_lora
from nemo_rba.modules.perception import check_perception

PARTS = ("encoder", "adapter", "LLM", "LoRA")
_EMBEDDINGS, _OUTPUT = "llm.embedding.word_embeddings.weight", "llm.output_layer.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How one job is spread over GPUs.

    Raises:
        ValueError: a size is no number of ranks, or the world does not divide by the model-parallel size.
    """

    world_size: int
    tensor_parallel_size: int
    pipeline_parallel_size: int
    sequence_parallel: bool

    def __post_init__(self) -> None:
        parallel.check_sizes(self.tensor_parallel_size, self.pipeline_parallel_size)
        size = self.tensor_parallel_size * self.pipeline_parallel_size
        if self.world_size % size:
            raise ValueError(
                f"{self.world_size} GPUs (trainer.devices x trainer.num_nodes) do not divide by {size}, the product of "
                "model.tensor_model_parallel_size and model.pipeline_model_parallel_size; change one of these keys"
            )

    @property
    def data_parallel_size(self) -> int:
        """Copies of the model."""
        return self.world_size // (self.tensor_parallel_size * self.pipeline_parallel_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One tensor of one rank."""

    name: str
    part: str  # one of PARTS
    numel: int  # elements on this rank
    itemsize: int  # bytes an element
    ways: int  # tensor-parallel ranks it is cut over, 1 where every rank has all of it
    filling: int  # elements over all ranks that only make the vocabulary divide
    is_copy: bool  # the last pipeline stage's copy of tied embeddings
    trained: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What one rank of a pipeline stage holds."""

    index: int
    num_layers: int  # of the language model
    is_first: bool
    is_last: bool
    buffer_bytes: int
    parameters: tuple[Parameter, ...]


@contextmanager
def fake_rank(rank: int, layout: Layout) -> Iterator[None]:
    """Scope in which megatron takes this process for ``rank`` of the layout's world.

    Raises:
        RuntimeError: this process has real process groups.
    """
    if dist.is_initialized():
        raise RuntimeError("this process has torch process groups already; plan in a process of its own")
    cpu.install()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor_parallel_size,
            pipeline_model_parallel_size=layout.pipeline_parallel_size,
            create_gloo_process_groups=False,
        )
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


class _EmptyOnMeta(TorchFunctionMode):
    """Makes what layers allocate (``torch.empty``) shapes only; NeMo computes with the small tensors it makes."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs = kwargs | {"device": "meta"}
        return func(*args, **kwargs)


def build_perception(config: dict, dtype: torch.dtype) -> AudioPerceptionModule:
    """NeMo's speech side of a SALM ``perception`` config, without weights.

    Raises:
        ValueError: a modality adapter that is not supported.
    """
    with _EmptyOnMeta():
        perception = AudioPerceptionModule(OmegaConf.create(config)).to(dtype)
    check_perception(perception)
    return perception


def num_frames(perception: AudioPerceptionModule, seconds: float) -> int:
    """Speech frames that ``seconds`` of audio become in the prompt."""
    featurizer = perception.preprocessor.featurizer
    lengths = featurizer.get_seq_len(torch.tensor([round(seconds * featurizer.sample_rate)]))
    lengths = -(-lengths // perception.encoder.subsampling_factor)  # every halving rounds up
    return int(-(-lengths // getattr(perception.modality_adapter, "subsampling_factor", 1)))


def build_stages(
    *, gpt_arguments: dict, perception: nn.Module, params_dtype: torch.dtype, layout: Layout, lora: Mapping | None,
    freeze: Sequence[str],
) -> list[Stage]:  # fmt: skip
    """The shapes of one rank of every pipeline stage.

    ``gpt_arguments`` as of ``conversion.families``; ``lora`` and ``freeze`` as of the policy.

    Raises:
        ValueError: a size does not divide by the layout, or ``freeze`` matches nothing or everything.
    """
    stages = []
    ranks_per_stage = layout.world_size // layout.pipeline_parallel_size
    for index in range(layout.pipeline_parallel_size):
        with fake_rank(index * ranks_per_stage, layout):
            with torch.device("meta"):
                llm = build_gpt(**gpt_arguments, params_dtype=params_dtype, sequence_parallel=layout.sequence_parallel)
            if lora is not None:
                add_lora(llm, **lora)
        modules = {"perception": perception, "llm": llm} if llm.pre_process else {"llm": llm}
        stages.append(_stage(index, nn.ModuleDict(modules), layout))
    return _freeze(stages, freeze)


def _stage(index: int, model: nn.ModuleDict, layout: Layout) -> Stage:
    llm = model["llm"]
    tied = llm.share_embeddings_and_output_weights
    return Stage(
        index=index,
        num_layers=len(llm.decoder.layers),
        is_first=llm.pre_process,
        is_last=llm.post_process,
        buffer_bytes=sum(buffer.nbytes for buffer in model.buffers()),
        parameters=tuple(
            Parameter(
                name=_EMBEDDINGS if tied and name == _OUTPUT else name,
                part=_part(name),
                numel=parameter.numel(),
                itemsize=parameter.itemsize,
                ways=layout.tensor_parallel_size if getattr(parameter, "tensor_model_parallel", False) else 1,
                filling=_filling(llm, name, parameter, layout.tensor_parallel_size),
                is_copy=tied and name == _OUTPUT,
                trained=True,
            )
            for name, parameter in model.named_parameters()
        ),
    )


def _filling(llm: nn.Module, name: str, parameter: torch.Tensor, tensor_parallel_size: int) -> int:
    if name not in (_EMBEDDINGS, _OUTPUT):
        return 0
    return (parameter.shape[0] * tensor_parallel_size - llm.num_words) * parameter.shape[1]


def _part(name: str) -> str:
    if "lora" in name.lower():
        return "LoRA"
    if name.startswith(("perception.encoder.", "perception.preprocessor.")):
        return "encoder"
    return "adapter" if name.startswith("perception.") else "LLM"


def _freeze(stages: Sequence[Stage], patterns: Sequence[str]) -> list[Stage]:
    names = list(dict.fromkeys(p.name for stage in stages for p in stage.parameters))
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            raise ValueError(f"policy.freeze: {pattern!r} matches no parameter; names look like {names[:3]}")
    trained = {name for name in names if not any(re.search(pattern, name) for pattern in patterns)}
    if not trained:
        raise ValueError(f"policy.freeze {list(patterns)} leaves nothing to train")
    return [
        replace(stage, parameters=tuple(replace(p, trained=p.name in trained) for p in stage.parameters))
        for stage in stages
    ]
