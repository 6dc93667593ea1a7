# SPDX-License-Identifier: Apache-2.0
"""A job's memory and tokens put together: the fullest GPU, whether it fits, and which key to change if not."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from nemo_rba.plan import memory
from nemo_rba.plan.memory import Kept, Microbatch, Sizes
from nemo_rba.plan.shapes import PARTS, Layout, Stage

GIB = 2**30
SHARD = "raise model.tensor_model_parallel_size or model.pipeline_model_parallel_size"
SHORTER = "lower rollouts.group_size or rollouts.max_new_tokens, or raise model.tensor_model_parallel_size"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a recipe asks of its GPUs. Prompts are those of one data-parallel rank; sizes are the longest possible."""

    layout: Layout
    batch_size: int  # prompts a batch
    num_minibatches: int  # optimiser steps a pass over a batch
    ppo_epochs: int  # passes
    micro_batch_size: int  # prompts a forward pass
    generation_batch_size: int
    group_size: int  # answers a prompt
    answer_tokens: int
    generates: bool  # the policy answers; otherwise its teacher's answers are read
    top_p: bool
    validation_batch_size: int
    validation_tokens: int
    prompt_tokens: int  # text around the speech, with the locator
    frames: int
    adapter_width: int
    needs_reference: bool
    compared_layers: int  # whose hidden states the loss compares with a reader's, at most; 0 where it does not
    prompt_multiple: int  # of a decode of fixed shapes; 0 where answers are sampled as they are
    keeps_cache: bool  # whether that decode keeps its memory through updates
    teacher_bytes: int  # weights on this GPU, 0 where it is not asked or elsewhere
    judging_bytes: int
    recompute: bool
    distributed_optimizer: bool
    gpu_bytes: int
    reserved_bytes: int

    @property
    def prompt_positions(self) -> int:
        """Text and frames: the locator's place is taken by the speech."""
        return self.prompt_tokens - 1 + self.frames

    def update(self) -> Microbatch:
        """The largest forward pass of an update."""
        prompts = min(self.micro_batch_size, -(-self.batch_size // self.num_minibatches))
        return self._microbatch(prompts, self.group_size, self.answer_tokens)

    def generation(self) -> Microbatch:
        """The largest generation: of the rollouts or of validation."""
        size = self.generation_batch_size
        found = [self._microbatch(min(size, self.validation_batch_size), 1, self.validation_tokens)]
        if self.generates:
            found.append(self._microbatch(min(size, self.batch_size), self.group_size, self.answer_tokens))
        return max(found, key=lambda m: m.prompts * (m.prompt_positions + m.group_size * m.answer_tokens))

    def _microbatch(self, prompts: int, group_size: int, tokens: int) -> Microbatch:
        return Microbatch(
            prompts=prompts, group_size=group_size, answer_tokens=tokens, prompt_positions=self.prompt_positions
        )

    def num_microbatches(self) -> int:
        """Forward passes a minibatch."""
        prompts = -(-self.batch_size // self.num_minibatches)
        return -(-prompts // self.micro_batch_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One line of the memory table."""

    phase: str  # "always", or the phase that needs it
    name: str
    bytes: int
    advice: str  # what to change when there is too much of it


def kept(stage: Stage, sizes: Sizes) -> Kept:
    """What the layers of this stage keep; LoRA keeps the inputs of the linears it sits on."""
    layers = [p for p in stage.parameters if p.name.startswith("llm.decoder.layers.")]
    norms = [p for p in layers if "norm" in p.name]
    fused = sizes.on_gpu and all(p.itemsize == sizes.itemsize for p in norms)
    return Kept(
        norm_bytes=sizes.itemsize if fused else 4 + 4 * any(p.trained for p in norms),
        linears=any(p.trained for p in layers if "norm" not in p.name),
        adapter=any(p.part == "adapter" and p.trained for p in stage.parameters),
    )


def items(stage: Stage, sizes: Sizes, job: Job) -> list[Item]:
    """Memory of one GPU of a pipeline stage, in bytes."""
    ways = job.layout.data_parallel_size if job.distributed_optimizer else 1
    can_divide = not job.distributed_optimizer and job.layout.data_parallel_size > 1
    lines = [
        ("always", "weights", memory.weight_bytes(stage), SHARD),
        ("always", "reference weights", memory.reference_bytes(stage) * job.needs_reference,
         f"set objective.kl_coefficient=0, or {SHARD}"),
        ("always", "teacher", job.teacher_bytes, "name a smaller teacher.path, or an objective that asks no teacher"),
        ("always", "gradients", memory.gradient_bytes(stage), f"freeze more (policy.freeze), or {SHARD}"),
        ("always", "optimizer state", memory.optimizer_bytes(stage, ways=ways, on_gpu=sizes.on_gpu),
         f"set policy.distributed_optimizer=true, or {SHARD}" if can_divide else SHARD),
        ("always", "reserved", job.reserved_bytes, "lower plan.reserved_gib, an assumption"),
        *_update(stage, sizes, job),
        *_generation(stage, sizes, job),
    ]  # fmt: skip
    if job.judging_bytes:
        lines.append(("judgement", "teacher's logits", job.judging_bytes, "lower teacher.batch_size"))
    lines.sort(key=lambda line: line[0] != "always")  # a decode that keeps its memory adds to what stays
    return [Item(phase=phase, name=name, bytes=size, advice=advice) for phase, name, size, advice in lines]


def _update(stage: Stage, sizes: Sizes, job: Job) -> list[tuple[str, str, int, str]]:
    batch = job.update()
    in_flight = min(job.num_microbatches(), job.layout.pipeline_parallel_size - stage.index)
    activations = in_flight * memory.activation_bytes(
        stage, sizes, kept(stage, sizes), batch, adapter_width=job.adapter_width, recompute=job.recompute
    )
    smaller = "lower policy.micro_batch_size" if batch.prompts > 1 else SHORTER
    less = smaller if job.recompute else f"set policy.recompute=true, or {smaller}"
    lines = [
        ("update", "activations", activations, less),
        ("update", "logits", memory.logit_bytes(sizes, batch) * stage.is_last, smaller),
        ("update", "working space", memory.working_bytes(stage, sizes, batch), smaller),
    ]
    if job.compared_layers:
        in_stages = job.layout.pipeline_parallel_size > 1  # then all microbatches are read before one is heard
        compared = memory.compared_state_bytes(
            sizes, batch, layers=min(job.compared_layers, stage.num_layers), in_flight=in_flight,
            waiting=job.num_microbatches() if in_stages else int(job.recompute), recompute=job.recompute,
        )  # fmt: skip
        lines.append(("update", "compared states", compared, f"name fewer representation.layers, or {smaller}"))
    return lines


def _generation(stage: Stage, sizes: Sizes, job: Job) -> list[tuple[str, str, int, str]]:
    batch = job.generation()
    scores = memory.sampling_bytes(sizes, batch, top_p=job.top_p) * stage.is_last
    fewer = "lower policy.generation_batch_size"
    if job.prompt_multiple:
        fixed = memory.fixed_cache_bytes(stage, sizes, batch, prompt_multiple=job.prompt_multiple)
        phase, less = (
            ("always", f"set policy.decode.keep=false, or {fewer}") if job.keeps_cache else ("generation", fewer)
        )
        return [
            (phase, "KV cache of fixed shape", fixed, less),
            ("generation", "KV cache of prompts", memory.prompt_cache_bytes(stage, sizes, batch), fewer),
            ("generation", "sampling", scores, fewer),
        ]
    return [
        ("generation", "KV cache", memory.kv_cache_bytes(stage, sizes, batch), fewer),
        ("generation", "KV cache, copied", memory.cache_copy_bytes(sizes, batch), fewer),
        ("generation", "sampling", scores, fewer),
    ]


def peak(lines: Sequence[Item]) -> tuple[str, int]:
    """The phase that needs most, and the bytes at its height: what stays and what it adds."""
    phases = {item.phase: 0 for item in lines if item.phase != "always"}
    always = sum(item.bytes for item in lines if item.phase == "always")
    for phase in phases:
        phases[phase] = always + sum(item.bytes for item in lines if item.phase == phase)
    return max(phases.items(), key=lambda pair: pair[1])


def make_plan(stages: Sequence[Stage], sizes: Sizes, job: Job) -> dict:
    """The whole plan as plain values, sizes in bytes; ``render`` shows it."""
    lines = {stage.index: items(stage, sizes, job) for stage in stages}
    fullest = max(stages, key=lambda stage: peak(lines[stage.index])[1])
    phase, size = peak(lines[fullest.index])
    largest = max((x for x in lines[fullest.index] if x.phase in ("always", phase)), key=lambda item: item.bytes)
    count = memory.total_parameters
    parameters = {
        part: {
            "total": count(stages, part=part),
            "per_gpu": sum(p.numel for p in fullest.parameters if p.part == part),
            "trained": count(stages, part=part, trained=True),
            "frozen": count(stages, part=part, trained=False),
        }
        for part in PARTS
        if count(stages, part=part)
    }
    columns = ("total", "per_gpu", "trained", "frozen")
    return {
        "layout": asdict(job.layout) | {"data_parallel_size": job.layout.data_parallel_size},
        "parameters": parameters | {"all": {key: sum(p[key] for p in parameters.values()) for key in columns}},
        "pipeline_stage": fullest.index,
        "memory": [asdict(item) for item in lines[fullest.index]],
        "stage_peaks": [peak(lines[stage.index])[1] for stage in stages],
        "peak": {"phase": phase, "bytes": size},
        "gpu_bytes": job.gpu_bytes,
        "fits": size <= job.gpu_bytes,
        "largest": asdict(largest),
        "tokens": tokens(job),
    }


def tokens(job: Job) -> dict[str, int]:
    """At most, over all GPUs, for one batch."""
    prompts = job.batch_size * job.layout.data_parallel_size
    answers = prompts * job.group_size * job.answer_tokens
    return {
        "prompts": prompts,
        "speech frames": prompts * job.frames,
        "prompt positions": prompts * job.prompt_positions,
        "answer tokens generated": answers * job.generates,
        "answer tokens trained": answers * job.ppo_epochs,
        "optimiser steps": job.num_minibatches * job.ppo_epochs,
    }


def render(plan: dict) -> str:
    """The plan as aligned tables, with its ``notes``."""
    layout, top, largest = plan["layout"], plan["peak"], plan["largest"]
    lines = [
        f"{layout['world_size']} GPUs: tensor {layout['tensor_parallel_size']} x pipeline "
        f"{layout['pipeline_parallel_size']} x data {layout['data_parallel_size']}"
        + (", sequence parallel" if layout["sequence_parallel"] else ""),
        "",
        f"{'parameters':<26}" + "".join(f"{name:>16}" for name in ("total", "per GPU", "trained", "frozen")),
    ]
    for part, row in plan["parameters"].items():
        lines.append(f"  {part:<24}" + "".join(f"{value:>16,}" for value in row.values()))
    lines += ["", f"{'memory of the fullest GPU':<30}{'GiB':>12}    (pipeline stage {plan['pipeline_stage']})"]
    always = sum(item["bytes"] for item in plan["memory"] if item["phase"] == "always")
    for phase in dict.fromkeys(item["phase"] for item in plan["memory"]):
        rows = [item for item in plan["memory"] if item["phase"] == phase]
        lines += [f"  {phase + ': ' + item['name']:<28}{item['bytes'] / GIB:>12.2f}" for item in rows]
        added = sum(item["bytes"] for item in rows)
        total = "stays" if phase == "always" else f"at the height of {phase}"
        lines.append(f"  {'= ' + total:<28}{(added if phase == 'always' else always + added) / GIB:>12.2f}")
    lines += ["", f"{'tokens of one batch, at most':<30}{'all GPUs':>12}"]
    lines += [f"  {name:<24}{value:>16,}" for name, value in plan["tokens"].items()]
    verdict = "FITS" if plan["fits"] else "DOES NOT FIT"
    lines += ["", f"{verdict}: {top['bytes'] / GIB:.1f} GiB in {top['phase']}, of {plan['gpu_bytes'] / GIB:.1f} GiB"]
    lines.append(f"largest: {largest['name']}, {largest['bytes'] / GIB:.1f} GiB")
    if not plan["fits"]:
        lines[-1] += f"; to make it smaller: {largest['advice']}"
    lines += [f"note: {note}" for note in plan["notes"]]
    return "\n".join(lines)
