# SPDX-License-Identifier: Apache-2.0
"""What a language model with LoRA does, measured under one layout after the other.

``main`` runs in two processes: each process of each layout leaves in FOLDER what it measured. The first layout also
leaves a sharded checkpoint, which all of them then load.
"""

from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from transformers import AutoConfig, AutoModelForCausalLM

from nemo_rba.conversion.families import gpt_arguments
from nemo_rba.conversion.hf import load_weights
from nemo_rba.conversion.mapping import shard, unshard
from nemo_rba.distributed import cpu, parallel, pipeline
from nemo_rba.modules.generation import generate
from nemo_rba.modules.gpt import answer_logits, build_gpt, embed, whole_sequences
from nemo_rba.modules.lora import TARGET_MODULES, add_lora, lora_parameters, merged
from nemo_rba.types import SamplingParams

LAYOUTS = {"tp2": (2, 1, False), "tp2_sp": (2, 1, True), "pp2": (1, 2, False), "one": (1, 1, False)}
GROUP_SIZE, NUM_TOKENS, VOCABULARY = 3, 5, 64
HF_CONFIG = AutoConfig.for_model(
    "llama", vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.1,
)  # fmt: skip


def make_batch() -> dict[str, torch.Tensor]:
    """Two microbatches of 2 prompts with 3 answers each; left padding and answers of different lengths."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, NUM_TOKENS + 1, (2, 2 * GROUP_SIZE), generator=generator)
    return {
        "prompt_ids": torch.randint(0, VOCABULARY, (2, 2, 7), generator=generator),
        "valid": torch.arange(7) >= torch.tensor([[0, 3], [2, 1]])[..., None],
        "response_ids": torch.randint(0, VOCABULARY, (2, 2 * GROUP_SIZE, NUM_TOKENS), generator=generator),
        "response_mask": torch.arange(NUM_TOKENS) < lengths[..., None],
    }


def forward_step(parts, model, *, gpt, finish):
    part = next(parts)
    with cpu.plain_torch():
        prompts = embed(gpt, part["prompt_ids"]) if gpt.pre_process else None
        out = answer_logits(gpt, prompts, part["valid"], part["response_ids"], part["response_mask"], GROUP_SIZE)
    return out, partial(finish, part=part)


def gathered(out, *, part, non_loss_data):
    return tensor_parallel.gather_from_tensor_model_parallel_region(out)


def loss(out, *, part):
    """Some smooth function of all logits, large enough to be clipped."""
    with cpu.plain_torch():
        log_probs = tensor_parallel.gather_from_tensor_model_parallel_region(out).log_softmax(-1)
        return -log_probs.gather(1, part["response_ids"][part["response_mask"]][:, None]).sum() / 10, {}


def schedule(model, gpt, batch, finish, *, forward_only: bool) -> list:
    parts = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    with cpu.redirect_cuda():
        return get_forward_backward_func()(
            forward_step_func=partial(forward_step, gpt=gpt, finish=finish), data_iterator=iter(parts), model=[model],
            num_microbatches=len(parts), seq_length=1, micro_batch_size=2, forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )  # fmt: skip


@torch.no_grad()
def logits_of(gpt, batch) -> torch.Tensor:
    outputs = schedule(gpt, gpt, batch, gathered, forward_only=True)
    empty = torch.empty(int(batch["response_mask"].sum()), VOCABULARY)
    return pipeline.from_last_stage(torch.cat(outputs) if pipeline.is_last_stage() else empty).clone()


@torch.no_grad()
def answers_of(gpt, batch) -> tuple[list, list]:
    prompts = embed(gpt, batch["prompt_ids"][0]) if gpt.pre_process else None
    with whole_sequences(gpt):
        out = generate(
            gpt, prompts, batch["valid"][0], ids=["a", "b"], group_size=4, end_id=2, banned_ids=torch.tensor([0]),
            params=SamplingParams(max_new_tokens=10, temperature=1.0, top_p=0.95, seed=1),
        )  # fmt: skip
    return [row.tolist() for row in out.token_ids], out.logprobs


def factors(gpt) -> dict[str, torch.nn.Parameter]:
    """This rank's factors by global name."""
    own = lora_parameters(gpt)
    numbers = {f"decoder.layers.{i}.": layer.layer_number - 1 for i, layer in enumerate(gpt.decoder.layers)}
    return {
        f"decoder.layers.{number}.{name.removeprefix(prefix)}": parameter
        for prefix, number in numbers.items()
        for name, parameter in own.items()
        if name.startswith(prefix)
    }


def whole(gpt, tensor_of=lambda p: p) -> dict[str, torch.Tensor]:
    """Full factors of all stages; every rank contributes its own copy of what is not cut."""
    tp, found = parallel_state.get_tensor_model_parallel_world_size(), {}
    for name, parameter in factors(gpt).items():
        slices = [tensor_of(parameter).detach().contiguous()]
        if tp > 1 and parameter.tensor_model_parallel:
            slices = [torch.empty_like(slices[0]) for _ in range(tp)]
            group = parallel_state.get_tensor_model_parallel_group()
            dist.all_gather(slices, tensor_of(parameter).detach().contiguous(), group=group)
        found[name] = unshard(slices, parameter).clone()
    stages = [None] * pipeline.num_stages()
    dist.all_gather_object(stages, found, group=parallel_state.get_pipeline_model_parallel_group())
    return {name: value for stage in stages for name, value in stage.items()}


@torch.no_grad()
def randomize(gpt) -> None:
    """B away from zero, where A has no gradient."""
    tp, rank = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    for name, parameter in factors(gpt).items():
        if name.endswith("lora_b"):
            generator = torch.Generator().manual_seed(sum(name.encode()))
            rows = parameter.shape[0] * (tp if parameter.tensor_model_parallel else 1)
            full = torch.empty(rows, parameter.shape[1]).normal_(0, 0.1, generator=generator)
            parameter.copy_(shard(full, parameter, tp, rank))


def make_gpt(layout: str):
    tp, _, sequence_parallel = LAYOUTS[layout]
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(HF_CONFIG)
    gpt = build_gpt(**gpt_arguments(HF_CONFIG), params_dtype=torch.float32, sequence_parallel=sequence_parallel).eval()
    rank = parallel_state.get_tensor_model_parallel_rank()
    load_weights(gpt, hf.state_dict().__getitem__, HF_CONFIG, tp_size=tp, tp_rank=rank)
    return gpt.requires_grad_(False)


def make_optimizer(gpt):
    with cpu.redirect_cuda():
        ddp = DistributedDataParallel(gpt.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), gpt)
        # AdamW's first step is the sign of the gradient; this epsilon makes it continuous in it
        settings = OptimizerConfig(optimizer="adam", lr=1e-2, weight_decay=0.1, clip_grad=1.0, adam_eps=1e-3)
        optimizer = get_megatron_optimizer(settings, [ddp])
    gpt.config.finalize_model_grads_func = finalize_model_grads
    gpt.config.grad_scale_func = optimizer.scale_loss
    gpt.config.no_sync_func = ddp.no_sync
    return ddp, optimizer


def update(gpt, ddp, optimizer, batch) -> dict:
    ddp.zero_grad_buffer()
    optimizer.zero_grad()
    schedule(ddp, gpt, batch, loss, forward_only=False)
    result = {"gradients": whole(gpt, lambda p: p.main_grad)}
    with cpu.redirect_cuda():
        _, result["grad_norm"], _ = optimizer.step()
    return result | {"weights": whole(gpt), "logits": logits_of(gpt, batch)}


def states(gpt, optimizer, *, loading: bool) -> dict:
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    metadata = {"dp_cp_group": group, "singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    model = gpt.sharded_state_dict(metadata=metadata)
    return {"model": model, "optimizer": optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)}


def resume(layout: str, folder: Path, batch) -> dict:
    """A fresh model and optimizer from the checkpoint, and the next update."""
    gpt = make_gpt(layout)
    for parameter in add_lora(gpt, rank=4, alpha=8, target_modules=list(TARGET_MODULES), seed=9).values():
        parameter.requires_grad_(True)
    ddp, optimizer = make_optimizer(gpt)
    with cpu.redirect_cuda():
        loaded = dist_checkpointing.load(states(gpt, optimizer, loading=True), str(folder))
        gpt.load_state_dict(loaded["model"])
        optimizer.load_state_dict(loaded["optimizer"])
    return {"weights": whole(gpt), "update": update(gpt, ddp, optimizer, batch)}


def measure(layout: str, folder: Path) -> dict:
    gpt, batch = make_gpt(layout), make_batch()
    result = {"base": logits_of(gpt, batch)}
    for parameter in add_lora(gpt, rank=4, alpha=8, target_modules=list(TARGET_MODULES), seed=5).values():
        parameter.requires_grad_(True)
    result |= {"start": logits_of(gpt, batch), "start_factors": whole(gpt)}
    randomize(gpt)
    result |= {"adapted": logits_of(gpt, batch), "answers": answers_of(gpt, batch)}
    ddp, optimizer = make_optimizer(gpt)
    result["first"] = update(gpt, ddp, optimizer, batch)
    with merged(gpt):
        result["merged"] = {"logits": logits_of(gpt, batch), "answers": answers_of(gpt, batch)}
    result["unmerged"] = logits_of(gpt, batch)
    if layout == next(iter(LAYOUTS)):
        (folder / "checkpoint").mkdir(exist_ok=True)
        dist.barrier()
        with cpu.redirect_cuda():
            dist_checkpointing.save(states(gpt, optimizer, loading=False), str(folder / "checkpoint"))
    result["second"] = update(gpt, ddp, optimizer, batch)
    return result | {"resumed": resume(layout, folder / "checkpoint", batch)}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    store, rank, _ = next(dist.rendezvous("env://"))
    for layout, (tp, pp, _) in LAYOUTS.items():
        if rank < tp * pp:
            dist.init_process_group(
                "gloo", store=dist.PrefixStore(layout, store), rank=rank, world_size=tp * pp,
                timeout=timedelta(minutes=5),
            )  # fmt: skip
            parallel.initialize(tensor_parallel_size=tp, pipeline_parallel_size=pp, seed=0)
            torch.save(measure(layout, folder), folder / f"{layout}.{rank}.pt")
            dist.barrier()
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
