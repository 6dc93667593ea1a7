# SPDX-License-Identifier: Apache-2.0
"""The student under megatron: four methods that hide schedules, gradient buffers and the optimizer.

What is frozen runs once: with a frozen encoder, a batch's speech features are computed at its first use and shared by
generation, the start model and every update.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from functools import partial

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from nemo_rba.algorithms.rollout import select, select_prompts
from nemo_rba.distributed import cpu, vocab_parallel
from nemo_rba.distributed.parallel import data_parallel_size, data_parallel_sum
from nemo_rba.modules.perception import EncodedSpeech
from nemo_rba.protocols import Metrics, Objective
from nemo_rba.types import Rollout, RolloutBatch, SamplingParams, SpeechBatch


class FrozenPolicy:
    """A SpeechLM that only answers: the ``generate`` of a policy, for evaluation and chat."""

    def __init__(self, *, model: nn.Module, generation_batch_size: int):
        self.model, self.generation_batch_size = model.requires_grad_(False), generation_batch_size

    @torch.no_grad()
    def generate(self, batch: SpeechBatch, *, group_size: int, params: SamplingParams) -> list[Rollout]:
        """See ``protocols.Policy``."""
        return _generate(self.model, batch, self.model.encode(batch), self.generation_batch_size, group_size, params)


class MegatronPolicy:
    """A SpeechLM that generates, judges its own words, and learns.

    Args:
        model: an RBASpeechLM.
        reference: the start model, frozen, or None when no objective asks for it.
        freeze: regular expressions of parameter names that are not trained.
        micro_batch_size: prompts, with all their answers, per forward pass.
        generation_batch_size: prompts generated at once.
        weight_decay, betas, epsilon, max_grad_norm: of AdamW.

    Raises:
        ValueError: ``freeze`` matches nothing, or everything.
    """

    def __init__(
        self, *, model: nn.Module, reference: nn.Module | None, freeze: Sequence[str], micro_batch_size: int,
        generation_batch_size: int, weight_decay: float, betas: Sequence[float], epsilon: float, max_grad_norm: float,
    ):  # fmt: skip
        self.model, self.reference = model, reference
        self.micro_batch_size, self.generation_batch_size = micro_batch_size, generation_batch_size
        self.max_grad_norm = max_grad_norm
        _freeze(model, freeze)
        self._encoder_frozen = not any(p.requires_grad for p in model.perception.encoder.parameters())
        self._speech: tuple[SpeechBatch, EncodedSpeech] | None = None
        with cpu.redirect_cuda():
            self._ddp = DistributedDataParallel(
                model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model
            )
            self.optimizer = get_megatron_optimizer(
                OptimizerConfig(
                    optimizer="adam", lr=1.0, weight_decay=weight_decay, clip_grad=max_grad_norm,
                    adam_beta1=betas[0], adam_beta2=betas[1], adam_eps=epsilon, bf16=model.config.bf16,
                    params_dtype=model.config.params_dtype,
                ),
                [self._ddp],
            )  # fmt: skip
        model.config.finalize_model_grads_func = finalize_model_grads
        model.config.grad_scale_func = self.optimizer.scale_loss
        model.config.no_sync_func = self._ddp.no_sync
        self._zero_grad()

    def generate(self, batch: SpeechBatch, *, group_size: int, params: SamplingParams) -> list[Rollout]:
        """See ``protocols.Policy``."""
        return _generate(self.model, batch, self._encode(batch), self.generation_batch_size, group_size, params)

    @torch.no_grad()
    def logprobs(self, batch: RolloutBatch, *, reference: bool = False) -> Tensor:
        """See ``protocols.Policy``."""
        if reference and self.reference is None:
            raise ValueError("this policy has no start model; give it one, or an objective without a KL term")
        model = self.reference if reference else self.model
        parts = [_token_logprobs(self._forward(model, part), part, topk=False) for part in self._microbatches(batch)]
        return torch.cat(parts).cpu()

    def forward_backward(self, batch: RolloutBatch, objective: Objective) -> Metrics:
        """See ``protocols.Policy``."""
        parts = list(self._microbatches(batch))
        scale = len(parts) * data_parallel_size()  # megatron divides by both; our loss has the global count already
        self.model.llm.train()
        with cpu.redirect_cuda():
            outputs = get_forward_backward_func()(
                forward_step_func=partial(self._forward_step, objective=objective, scale=scale),
                data_iterator=iter(parts),
                model=[self._ddp],
                num_microbatches=len(parts),
                seq_length=1,  # read by pipeline schedules only
                micro_batch_size=self.micro_batch_size,
                forward_only=False,
            )
        self.model.llm.eval()
        names = list(outputs[0])
        totals = torch.stack([torch.stack([out[name].float() for out in outputs]).sum() for name in names])
        return dict(zip(names, data_parallel_sum(totals).tolist(), strict=True))

    def step(self, learning_rate: float) -> Metrics:
        """See ``protocols.Policy``.

        Raises:
            FloatingPointError: the gradient is not finite; the weights are left as they were.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        with cpu.redirect_cuda():
            self.optimizer.prepare_grads()
            grad_norm = float(self.optimizer.get_grad_norm())
            if not math.isfinite(grad_norm):
                raise FloatingPointError(
                    f"the gradient norm is {grad_norm}; the weights are those of the last good step"
                )
            if self.max_grad_norm > 0:
                self.optimizer.clip_grad_norm(self.max_grad_norm)
            self.optimizer.step_with_ready_grads()
        self._zero_grad()
        return {"grad_norm": grad_norm, "lr": learning_rate}

    def parameters(self) -> list[nn.Parameter]:
        """See ``protocols.Policy``."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def state_dict(self) -> dict:
        """See ``protocols.Policy``."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        """See ``protocols.Policy``."""
        with cpu.redirect_cuda():
            self.optimizer.load_state_dict(state_dict)

    def _zero_grad(self) -> None:
        self._ddp.zero_grad_buffer()
        self.optimizer.zero_grad()

    def _forward_step(self, parts, model, *, objective: Objective, scale: int):
        part = next(parts)
        with cpu.plain_torch():
            logits = self._forward(model, part)
        return logits, partial(_loss, part=part, objective=objective, scale=scale)

    def _forward(self, model: Callable, part: RolloutBatch) -> Tensor:
        prompts = part.prompt_index.unique()
        speech = _rows(self._encode(part.prompts), prompts) if self._encoder_frozen else None
        return model(
            select_prompts(part.prompts, prompts),
            speech,
            part.response_ids,
            part.response_mask,
            len(part) // len(prompts),
        )

    @torch.no_grad()
    def _encode(self, batch: SpeechBatch) -> EncodedSpeech:
        if self._speech is None or self._speech[0] is not batch or not self._encoder_frozen:
            self._speech = (batch, self.model.encode(batch))
        return self._speech[1]

    def _microbatches(self, batch: RolloutBatch):
        for prompts in batch.prompt_index.unique().split(self.micro_batch_size):
            yield select(batch, prompts)


def _loss(logits: Tensor, *, part: RolloutBatch, objective: Objective, scale: int):
    with cpu.plain_torch():
        part = _to(part, logits.device)
        loss, metrics = objective(_token_logprobs(logits, part, topk=objective.teacher_topk > 0), part)
        return loss * scale, metrics


def _token_logprobs(logits: Tensor, part: RolloutBatch, *, topk: bool) -> Tensor:
    """Packed logits (M, V / tp) -> log-probabilities (N, T), or (N, T, K) at the teacher's candidates; 0 if masked."""
    mask = part.response_mask.to(logits.device)
    ids = (part.teacher_topk_ids if topk else part.response_ids[..., None]).to(logits.device)
    picked = vocab_parallel.gather(vocab_parallel.log_softmax(logits), ids[mask])
    values = picked.new_zeros(ids.shape)
    values[mask] = picked
    return values if topk else values[..., 0]


def _to(part: RolloutBatch, device: torch.device) -> RolloutBatch:
    if part.response_ids.device == device:
        return part
    tensors = {
        field.name: getattr(part, field.name).to(device)
        for field in dataclasses.fields(part)
        if isinstance(getattr(part, field.name), Tensor)
    }
    return dataclasses.replace(part, **tensors)


def _rows(speech: EncodedSpeech, rows: Tensor) -> EncodedSpeech:
    rows = rows.to(speech.features.device)
    return EncodedSpeech(speech.features[rows], speech.lens[rows])


def _generate(
    model: nn.Module, batch: SpeechBatch, speech: EncodedSpeech, size: int, group_size: int, params: SamplingParams
) -> list[Rollout]:  # fmt: skip
    """Answers to a batch, ``size`` prompts at a time."""
    rollouts = []
    for rows in torch.arange(len(batch)).split(size):
        part = model.generate(select_prompts(batch, rows), _rows(speech, rows), group_size=group_size, params=params)
        rollouts += [dataclasses.replace(r, prompt_index=r.prompt_index + int(rows[0])) for r in part]
    return rollouts


def _freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            raise ValueError(f"policy.freeze: {pattern!r} matches no parameter; names look like {names[:3]}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(re.search(pattern, name) for pattern in patterns))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"policy.freeze {list(patterns)} leaves nothing to train")
