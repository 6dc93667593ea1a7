# SPDX-License-Identifier: Apache-2.0
"""What a policy does, measured under one layout: answers, log-probabilities, gradients, metrics, updated weights.

``main`` runs in four processes: FOLDER holds the SALM checkpoints ``llama`` and ``qwen3``, and each process of each
layout leaves there what it measured. One launch measures all layouts, each in a world of its own size.
"""

import dataclasses
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from tiny_models import make_batch

from nemo_rba.algorithms.collate import collate, select_prompts
from nemo_rba.algorithms.objectives import ClippedPolicyLoss, DistillationLoss
from nemo_rba.algorithms.policy import MegatronPolicy
from nemo_rba.algorithms.rollout import PolicyRollouts, TeacherRollouts
from nemo_rba.conversion.hf import global_name, words_only
from nemo_rba.conversion.mapping import unshard
from nemo_rba.data.prompt import typed_batch
from nemo_rba.distributed import parallel, pipeline
from nemo_rba.models.rba_speech_lm import RBASpeechLM
from nemo_rba.modules.fixed_decode import fix_decode
from nemo_rba.types import SamplingParams

LAYOUTS = {  # tensor, pipeline, sequence parallel; data parallelism is what is left of the world
    "one": (1, 1, False),
    "tp2": (2, 1, False),
    "tp2_sp": (2, 1, True),
    "pp2": (1, 2, False),
    "dp2": (1, 1, False),
    "tp2_pp2_sp": (2, 2, True),
}
WORLD_SIZES = {"one": 1, "tp2": 2, "tp2_sp": 2, "pp2": 2, "dp2": 2, "tp2_pp2_sp": 4}
SECONDS = [0.7, 1.3, 1.0, 0.9, 0.5]  # 5 prompts: microbatches of 2, 2 and 1; data-parallel ranks of 3 and 2
CONTEXTS = ["", "transcribe", "in french please", "", "say"]
RESPONSES = ["paris", "hello again", "a b c", "one two", "red"]
GROUP_SIZE = 4
LEARNING_RATE = 1e-2
AGREEING_LAYERS = {"all": [], "first": [1], "last": [2]}  # of two; the first and the second stage's
ATTRACTION = 3.0  # weight of the loss on states
# case: family, what is frozen
CASES = {"llama": ("llama", "encoder"), "qwen3": ("qwen3", "encoder"), "speech_only": ("llama", "llm")}
FROZEN = {"encoder": ["^perception\\.(preprocessor|encoder)"], "llm": ["^llm\\."]}


def shares_optimizer(layout: str, case: str) -> bool:
    """Where the distributed optimizer runs; each rank then has the summed gradient of its own share only."""
    return layout == "dp2" and case == "llama"


def make_policy(folder: Path, layout: str, case: str) -> MegatronPolicy:
    (tp, pp, sequence_parallel), (family, frozen) = LAYOUTS[layout], CASES[case]
    model = RBASpeechLM.from_salm(
        folder=folder / family, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp,
        sequence_parallel=sequence_parallel, params_dtype="float32", seed=0,
    )  # fmt: skip
    return MegatronPolicy(
        model=model, keep_start=True, lora=None, freeze=FROZEN[frozen], micro_batch_size=2, generation_batch_size=3,
        weight_decay=0.1, betas=(0.9, 0.98), max_grad_norm=1.0,
        epsilon=1e-3,  # AdamW's first step is the sign of the gradient; this makes it continuous in it
        recompute=layout != "one" and case == "qwen3", distributed_optimizer=shares_optimizer(layout, case),
    )  # fmt: skip


def whole(model, tensor_of) -> dict[str, torch.Tensor]:
    """Full tensors of all stages by global name; every rank contributes its own copy of what is not sharded."""
    tp, found = parallel_state.get_tensor_model_parallel_world_size(), {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        value = tensor_of(parameter).detach().contiguous()
        slices = [value]
        if tp > 1 and getattr(parameter, "tensor_model_parallel", False):
            slices = [torch.empty_like(value) for _ in range(tp)]
            dist.all_gather(slices, value, group=parallel_state.get_tensor_model_parallel_group())
        if name.startswith("llm."):
            template, layer = global_name(model.llm, name.removeprefix("llm."))
            name = "llm." + template.format(layer)
        found[name] = words_only(model.llm, name.removeprefix("llm."), unshard(slices, parameter)).clone()
    if pipeline.num_stages() > 1:
        stages = [None] * pipeline.num_stages()
        dist.all_gather_object(stages, found, group=parallel_state.get_pipeline_model_parallel_group())
        found = {name: value for stage in stages for name, value in stage.items()}
    return found


def update(policy, batch, rollouts, advantages, objective) -> dict:
    """One optimiser step, and everything that could differ on the way."""
    (part,) = collate(batch, rollouts, advantages, policy=policy, objective=objective, teacher=None, num_minibatches=1)
    scored = {"logprobs": policy.logprobs(part), "reference": policy.logprobs(part, reference=True)}
    result = {name: [row[mask] for row, mask in zip(v, part.response_mask, strict=True)] for name, v in scored.items()}
    result["metrics"] = policy.forward_backward(part, objective)
    result["gradients"] = whole(policy.model, lambda p: p.main_grad)
    result["metrics"] |= policy.step(LEARNING_RATE)
    result["weights"] = whole(policy.model, lambda p: p)
    return result


def answers(rollouts) -> dict:
    return {
        "tokens": [r.token_ids.tolist() for r in rollouts],
        "logprobs": [r.logprobs for r in rollouts],
        "truncated": [r.truncated for r in rollouts],
    }


def fixed_answers(policy, source, batch) -> dict | str:
    """What ``source`` gives when every shape is kept; the reason where that cannot be."""
    try:
        fix_decode(policy.model.llm, check_every=4, prompt_multiple=8, keep=False)
        return answers(source(policy, batch, seed=1))
    except ValueError as error:
        return str(error)
    finally:
        policy.model.llm.fixed_decode = None


def measure(folder: Path, layout: str, case: str) -> dict:
    """A distillation step, greedy and seeded answers, a policy-gradient step with a KL term, agreement of states.

    At last a loss on states beside the policy gradient, with weights that are no longer the start model's.
    """
    policy = make_policy(folder, layout, case)
    rows = torch.arange(len(SECONDS))[parallel.data_parallel_rank() :: parallel.data_parallel_size()]
    batch = select_prompts(make_batch(policy.model.prompt, SECONDS, CONTEXTS, RESPONSES), rows)
    taught = TeacherRollouts()(policy, batch, seed=0)
    result = {"rows": rows.tolist()}
    result["distillation"] = update(policy, batch, taught, torch.zeros(len(rows)), DistillationLoss())
    greedy = SamplingParams(max_new_tokens=10, temperature=0)
    result["greedy"] = answers(policy.generate(batch, group_size=1, params=greedy))
    with policy.at_start():
        result["start"] = answers(policy.generate(batch, group_size=1, params=greedy))
    source = PolicyRollouts(group_size=GROUP_SIZE, max_new_tokens=12, temperature=1.0, top_p=0.95)
    sampled = source(policy, batch, seed=1)
    result["sampled"], result["fixed"] = answers(sampled), fixed_answers(policy, source, batch)
    advantages = torch.linspace(-1, 1, len(SECONDS) * GROUP_SIZE).view(-1, GROUP_SIZE)[rows].flatten()
    objective = ClippedPolicyLoss(
        clip_low=0.2, clip_high=0.2, kl_coefficient=0.1, kl_estimator="k3", dense_weight=0.0, dense_clip=5.0,
        aggregation="token_mean",
    )  # fmt: skip
    result["policy_gradient"] = update(policy, batch, sampled, advantages, objective)
    (heard,) = collate(batch, sampled, advantages, policy=policy, objective=objective, teacher=None, num_minibatches=1)
    read = dataclasses.replace(heard, prompts=typed_batch(batch, policy.model.prompt))
    result["agreement"] = {name: policy.agreement(heard, read, layers) for name, layers in AGREEING_LAYERS.items()}
    for name, layers in AGREEING_LAYERS.items():
        policy._zero_grad()
        metrics = policy.forward_backward(heard, objective, read=read.prompts, layers=layers, weight=ATTRACTION)
        result["attraction", name] = {"metrics": metrics, "gradients": whole(policy.model, lambda p: p.main_grad)}
    return result


def run_layout(folder: Path, layout: str, store: dist.Store, rank: int) -> None:
    """Measure one layout on the first ranks of the world; the others go on to the next."""
    size = WORLD_SIZES[layout]
    if rank < size:
        dist.init_process_group(
            "gloo", store=dist.PrefixStore(layout, store), rank=rank, world_size=size, timeout=timedelta(minutes=5)
        )
        tp, pp, _ = LAYOUTS[layout]
        parallel.initialize(tensor_parallel_size=tp, pipeline_parallel_size=pp, seed=0)
        found = {case: measure(folder, layout, case) for case in CASES}
        torch.save(found, folder / f"{layout}.{rank}.pt")
        dist.barrier()
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    store, rank, _ = next(dist.rendezvous("env://"))
    for layout in LAYOUTS:
        run_layout(folder, layout, store, rank)
