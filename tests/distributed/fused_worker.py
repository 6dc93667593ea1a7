# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of bf16 policies whose Adam is that of Transformer Engine.

``main`` runs in two processes. On a GPU megatron takes Transformer Engine's Adam, which counts steps in its groups and
not in its states, and reads and writes its checkpoints by other branches than torch's. Here a plain Adam of that face
stands in its place. One layout saves, each reads, and every process leaves what the next update made of the weights.
"""

from pathlib import Path

import megatron.core.optimizer as megatron_optimizer
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import distrib_optimizer
from parity import CONTEXTS, RESPONSES, SECONDS, whole
from tiny_models import make_batch

from nemo_rba.algorithms.collate import collate, select_prompts
from nemo_rba.algorithms.objectives import DistillationLoss
from nemo_rba.algorithms.policy import MegatronPolicy
from nemo_rba.algorithms.rollout import TeacherRollouts
from nemo_rba.checkpoint import sharded
from nemo_rba.distributed import parallel
from nemo_rba.models.rba_speech_lm import RBASpeechLM

LAYOUTS = {"dp2": 1, "tp2": 2}  # tensor-parallel size
KINDS = {
    "distributed": (True, None),
    "lora": (False, {"rank": 4, "alpha": 8, "target_modules": ["linear_qkv", "linear_fc1"], "seed": 0}),
}
FREEZE = {"distributed": ["^perception\\.(preprocessor|encoder)"], "lora": ["^(?!.*\\.lora_[ab]$)"]}
LEARNING_RATE = 1e-2


class FusedAdam(torch.optim.Optimizer):
    """AdamW with the arguments and the state of ``transformer_engine.pytorch.optimizers.FusedAdam``."""

    def __init__(self, params, lr, weight_decay, betas, eps, adam_w_mode):
        assert adam_w_mode
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if group["params"]:
                group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter, group):
        state, (one, two), gradient = self.state[parameter], group["betas"], parameter.grad
        for name in ("exp_avg", "exp_avg_sq"):
            state.setdefault(name, torch.zeros_like(parameter))
        state["exp_avg"].lerp_(gradient, 1 - one)
        state["exp_avg_sq"].lerp_(gradient.square(), 1 - two)
        size = (state["exp_avg_sq"] / (1 - two ** group["step"])).sqrt() + group["eps"]
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(group["lr"] / (1 - one ** group["step"]) * state["exp_avg"] / size)


def make_policy(salm: Path, layout: str, kind: str) -> MegatronPolicy:
    distributed_optimizer, lora = KINDS[kind]
    model = RBASpeechLM.from_salm(
        folder=salm, tensor_model_parallel_size=LAYOUTS[layout], pipeline_model_parallel_size=1,
        sequence_parallel=layout == "tp2", params_dtype="bfloat16", seed=0,
    )  # fmt: skip
    return MegatronPolicy(
        model=model, keep_start=False, lora=lora, freeze=FREEZE[kind], micro_batch_size=2, generation_batch_size=3,
        weight_decay=0.1, betas=(0.9, 0.98), max_grad_norm=1.0, epsilon=1e-3, recompute=True,
        distributed_optimizer=distributed_optimizer,
    )  # fmt: skip


def update(policy) -> dict[str, torch.Tensor]:
    """One optimiser step; the weights after it."""
    rows = torch.arange(len(SECONDS))[parallel.data_parallel_rank() :: parallel.data_parallel_size()]
    batch = select_prompts(make_batch(policy.model.prompt, SECONDS, CONTEXTS, RESPONSES), rows)
    (part,) = collate(
        batch, TeacherRollouts()(policy, batch, seed=0), torch.zeros(len(rows)), policy=policy,
        objective=DistillationLoss(), teacher=None, num_minibatches=1,
    )  # fmt: skip
    policy.forward_backward(part, DistillationLoss())
    policy.step(LEARNING_RATE)
    return {name: value.float() for name, value in whole(policy.model, lambda p: p).items()}


def start(layout: str) -> None:
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel.initialize(tensor_parallel_size=LAYOUTS[layout], pipeline_parallel_size=1, seed=0)


def measure(salm: Path, folder: Path, kind: str) -> dict:
    start("dp2")
    policy = make_policy(salm, "dp2", kind)
    for _ in range(3):
        saved = update(policy)
    sharded.save(folder / kind, sharded=policy.sharded_state_dict(is_loading=False), lightning={})
    found = {
        "saved": saved,
        "next": update(policy),
        "adam": type(policy.optimizer.chained_optimizers[0].optimizer).__name__,
    }
    for layout in LAYOUTS:
        start(layout)
        policy = make_policy(salm, layout, kind)
        policy.load_sharded_state_dict(sharded.load(folder / kind, policy.sharded_state_dict(is_loading=True)))
        read = {name: value.float() for name, value in whole(policy.model, lambda p: p).items()}
        found[layout] = {"read": read, "next": update(policy)}
    return found


def main(salm: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    megatron_optimizer.Adam = distrib_optimizer.Adam = FusedAdam
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = True
    dist.init_process_group("gloo")
    measured = {kind: measure(salm, folder, kind) for kind in KINDS}
    torch.save(measured, folder / f"{dist.get_rank()}.pt")
    dist.barrier()
