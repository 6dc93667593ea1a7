# SPDX-License-Identifier: Apache-2.0
"""The student under megatron: a few methods that hide schedules, gradient buffers and the optimizer.

What is frozen runs once: with a frozen encoder, a batch's speech features are computed at its first use and shared by
generation, the start model and every update. The start model is no second model: the weights that training changes are
kept as they were, and change places with today's for the passes that ask for it. Under pipeline parallelism every pass
goes through megatron's schedule; logits, the objective and its metrics exist on the last stage and are handed to the
others.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from nemo_rba.algorithms.collate import select
from nemo_rba.algorithms.frozen_policy import generate_in_parts
from nemo_rba.algorithms.passes import forward_step, no_outcome, token_logprobs, token_loss
from nemo_rba.checkpoint.sharded import metadata, sharded_weights
from nemo_rba.distributed import cpu, pipeline
from nemo_rba.distributed.parallel import data_parallel_size, data_parallel_sum, device
from nemo_rba.modules import states
from nemo_rba.modules.fixed_decode import fix_decode
from nemo_rba.modules.lora import add_lora
from nemo_rba.modules.perception import EncodedSpeech
from nemo_rba.protocols import Metrics, Objective
from nemo_rba.types import Rollout, RolloutBatch, SamplingParams, SpeechBatch


class MegatronPolicy:
    """A SpeechLM that generates, judges its own words, and learns.

    Args:
        model: an RBASpeechLM.
        keep_start: whether an objective measures the distance to the start model.
        lora: arguments of ``modules.lora.add_lora``, or None; the factors are called ``...lora_a`` and ``...lora_b``.
        freeze: regular expressions of parameter names that are not trained.
        micro_batch_size: prompts, with all their answers, per forward pass.
        generation_batch_size: prompts generated at once.
        weight_decay, betas, epsilon, max_grad_norm: of AdamW; norms and biases do not decay.
        recompute: whether updates keep only each layer's input, and compute the rest again for the gradient.
        distributed_optimizer: whether data-parallel ranks share the optimizer's state (ZeRO-1, arXiv 1910.02054).

    Raises:
        ValueError: ``freeze`` matches nothing, or everything.
    """

    def __init__(
        self, *, model: nn.Module, keep_start: bool, lora: Mapping | None, freeze: Sequence[str], micro_batch_size: int,
        generation_batch_size: int, weight_decay: float, betas: Sequence[float], epsilon: float, max_grad_norm: float,
        recompute: bool, distributed_optimizer: bool,
    ):  # fmt: skip
        self.model, self.micro_batch_size, self.generation_batch_size = model, micro_batch_size, generation_batch_size
        self.max_grad_norm, self.weight_decay = max_grad_norm, weight_decay
        if lora is not None:
            add_lora(model.llm, **lora)
        trained = _freeze(model, freeze)
        self._encoder_frozen = not any(name.startswith("perception.encoder.") for name in trained)
        self._speech: tuple[SpeechBatch, EncodedSpeech] | None = None
        self._start = [parameter.detach().clone() for parameter in self.parameters()] if keep_start else None
        if recompute:
            model.config.recompute_granularity, model.config.recompute_method = "full", "uniform"
            model.config.recompute_num_layers = 1
        with cpu.redirect_cuda():
            self._ddp = DistributedDataParallel(
                model.config,
                DistributedDataParallelConfig(
                    grad_reduce_in_fp32=True, use_distributed_optimizer=distributed_optimizer
                ),
                model,
            )
            self.optimizer = get_megatron_optimizer(
                OptimizerConfig(
                    optimizer="adam", lr=1.0, weight_decay=weight_decay, clip_grad=max_grad_norm,
                    adam_beta1=betas[0], adam_beta2=betas[1], adam_eps=epsilon, bf16=model.config.bf16,
                    params_dtype=model.config.params_dtype, use_distributed_optimizer=distributed_optimizer,
                ),
                [self._ddp],
            )  # fmt: skip
        model.config.finalize_model_grads_func = finalize_model_grads
        model.config.grad_scale_func = self.optimizer.scale_loss
        model.config.no_sync_func = self._ddp.no_sync
        self._zero_grad()

    def generate(
        self, batch: SpeechBatch, *, group_size: int, params: SamplingParams, rows: Tensor | None = None
    ) -> list[Rollout]:
        """See ``protocols.Policy``."""
        return generate_in_parts(
            self.model, batch, self._encode(batch), self.generation_batch_size, group_size, params, rows
        )

    def encode_response(self, response: str) -> list[int]:
        """See ``protocols.Policy``."""
        return self.model.prompt.encode_response(response)

    @torch.no_grad()
    def logprobs(self, batch: RolloutBatch, *, reference: bool = False) -> Tensor:
        """See ``protocols.Policy``."""
        with self.at_start() if reference else nullcontext():
            outputs = self._schedule(
                self.model, batch, self._shared_speech(batch.prompts), token_logprobs, forward_only=True
            )
        values = torch.cat(outputs) if pipeline.is_last_stage() else torch.empty(batch.response_ids.shape)
        return pipeline.from_last_stage(values.to(device(), torch.float32)).cpu()

    @torch.no_grad()
    def agreement(self, heard: RolloutBatch, read: RolloutBatch, layers: Sequence[int]) -> Tensor:
        """See ``protocols.Policy``.

        Passes go microbatch by microbatch, so that no more states are kept than those of one, see ``states.Agreement``.

        Raises:
            ValueError: there is no such layer, or the policy was built without ``keep_start``.
        """
        layers, speech = states.chosen_layers(layers, self.model.config.num_layers), self._encode(heard.prompts)
        sums = []
        for ours, theirs in zip(self._microbatches(heard), self._microbatches(read), strict=True):
            both = states.Agreement(self.model.llm, layers, ours.response_mask.to(device()))
            with both.keep():
                self._schedule(self.model, ours, speech, no_outcome, forward_only=True)
            with self.at_start(), both.compare():
                self._schedule(self.model, theirs, None, no_outcome, forward_only=True)
            sums.append(both.total)
        return pipeline.sum_over_stages(torch.cat(sums)).cpu() / (len(layers) * heard.response_mask.sum(1))

    @contextmanager
    def at_start(self) -> Iterator[None]:
        """Scope in which the model is the start model; no weight is copied.

        Raises:
            ValueError: the policy was built without ``keep_start``.
        """
        if self._start is None:
            raise ValueError("this policy has no start model; build it with keep_start=True")
        self._swap_start()
        try:
            yield
        finally:
            self._swap_start()

    def _swap_start(self) -> None:
        for parameter, kept in zip(self.parameters(), self._start, strict=True):
            parameter.data, kept.data = kept.data, parameter.data

    def forward_backward(
        self, batch: RolloutBatch, objective: Objective, *, read: SpeechBatch | None = None,
        layers: Sequence[int] = (), weight: float = 0.0,
    ) -> Metrics:  # fmt: skip
        """See ``protocols.Policy``."""
        if read is not None:
            return self._drawn(batch, objective, dataclasses.replace(batch, prompts=read), layers, weight)
        return self._learn(batch, objective, ahead=None)

    def _drawn(
        self, batch: RolloutBatch, objective: Objective, read: RolloutBatch, layers: Sequence[int], weight: float
    ) -> Metrics:  # fmt: skip
        """``forward_backward`` with a loss on hidden states, see ``states.Attraction``.

        A microbatch is read just before it is heard; under pipeline parallelism, where a pass takes all stages, all of
        them are read first.

        Raises:
            ValueError: there is no such layer, or the policy was built without ``keep_start``.
        """
        layers = states.chosen_layers(layers, self.model.config.num_layers)
        num_cosines = len(layers) * batch.num_loss_tokens  # of the global batch
        scale = weight * data_parallel_size() / num_cosines  # megatron divides by the ranks
        drawn = states.Attraction(self.model.llm, layers, scale=scale)
        unread = self._microbatches(read)
        if pipeline.num_stages() > 1:
            for part in unread:
                with self.at_start(), drawn.keep(part.response_mask.to(device())):
                    self._schedule(self.model, part, None, no_outcome, forward_only=True)

        def ahead(part: RolloutBatch) -> RolloutBatch:
            if pipeline.num_stages() == 1:
                with self.at_start(), drawn.keep(part.response_mask.to(device())):
                    forward_step(unread, self.model, judge=no_outcome, speech=None)
            drawn.begin()
            return part

        with drawn.draw():
            metrics = self._learn(batch, objective, ahead=ahead)
        total = pipeline.sum_over_stages(data_parallel_sum(drawn.total))
        cosine = float(total) / num_cosines
        return metrics | {"loss/representation": weight * (1 - cosine), "representation/cosine": cosine}

    def _learn(self, batch: RolloutBatch, objective: Objective, *, ahead: Callable | None) -> Metrics:
        # megatron divides by both; our loss has the global count already
        scale = len(list(self._microbatches(batch))) * data_parallel_size()
        self.model.llm.train()
        speech, judge = self._shared_speech(batch.prompts), partial(token_loss, objective=objective, scale=scale)
        outputs = self._schedule(self._ddp, batch, speech, judge, forward_only=False, ahead=ahead)
        self.model.llm.eval()
        metrics = {}
        if pipeline.is_last_stage():
            names = list(outputs[0])
            totals = torch.stack([torch.stack([out[name].float() for out in outputs]).sum() for name in names])
            metrics = dict(zip(names, data_parallel_sum(totals).tolist(), strict=True))
        return pipeline.metrics_from_last_stage(metrics)

    def step(self, learning_rate: float) -> Metrics:
        """See ``protocols.Policy``.

        Raises:
            FloatingPointError: the gradient is not finite; the weights are left as they were.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
            group["weight_decay"] = self.weight_decay * group["wd_mult"]  # 0 for norms and biases
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

    def sharded_state_dict(self, *, is_loading: bool) -> dict:
        """See ``protocols.Policy``."""
        with cpu.redirect_cuda():
            weights = sharded_weights(self.model)
            optimizer = self.optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=metadata())
        return {"weights": weights, "optimizer": optimizer}

    def load_sharded_state_dict(self, state_dict: dict) -> None:
        """See ``protocols.Policy``."""
        self.model.load_state_dict(state_dict["weights"], strict=False)  # extra states of modules without any
        with cpu.redirect_cuda():
            self.optimizer.load_state_dict(state_dict["optimizer"])

    def _zero_grad(self) -> None:
        self._ddp.zero_grad_buffer()
        self.optimizer.zero_grad()

    def _schedule(
        self, model: nn.Module, batch: RolloutBatch, speech: EncodedSpeech | None, judge: Callable, *,
        forward_only: bool, ahead: Callable[[RolloutBatch], RolloutBatch] | None = None,
    ) -> list:  # fmt: skip
        """Every microbatch through all stages, forward and back: what ``judge`` made of the logits, on the last one.

        ``ahead`` is called with each just before its forward pass.
        """
        parts = list(self._microbatches(batch))
        with cpu.redirect_cuda():
            return get_forward_backward_func()(
                forward_step_func=partial(forward_step, judge=judge, speech=speech),
                data_iterator=iter(parts) if ahead is None else map(ahead, parts),
                model=[model],
                num_microbatches=len(parts),
                seq_length=1,  # not read: stages tell each other their shapes
                micro_batch_size=self.micro_batch_size,
                forward_only=forward_only,
                collect_non_loss_data=forward_only,
            )

    @torch.no_grad()
    def _shared_speech(self, prompts: SpeechBatch) -> EncodedSpeech | None:
        """What the encoder gives for all microbatches; None where it learns, and has to run in each of them.

        None also for typed prompts.
        """
        if self._encoder_frozen or prompts.is_typed:
            return self._encode(prompts)
        if pipeline.num_stages() == 1:
            return None
        speech = self.model.encode(prompts)  # later stages need the number of frames
        return None if pipeline.is_first_stage() else speech

    @torch.no_grad()
    def _encode(self, batch: SpeechBatch) -> EncodedSpeech | None:
        if batch.is_typed:
            return None
        if self._speech is None or self._speech[0] is not batch or not self._encoder_frozen:
            self._speech = (batch, self.model.encode(batch))
        return self._speech[1]

    def _microbatches(self, batch: RolloutBatch):
        for prompts in batch.prompt_index.unique().split(self.micro_batch_size):
            yield select(batch, prompts)


class FixedDecodePolicy(MegatronPolicy):
    """A MegatronPolicy of these ``settings`` that samples in fixed shapes: ``decode`` has what ``fix_decode`` takes."""

    def __init__(self, *, model: nn.Module, decode: Mapping, **settings):
        fix_decode(model.llm, **decode)
        super().__init__(model=model, **settings)


def _freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Freeze what matches a pattern; names, over all pipeline stages, of what does not."""
    tied = model.share_embeddings_and_output_weights
    own = {_tied_name(name) if tied else name: p for name, p in model.named_parameters()}
    names = pipeline.union_over_stages(list(own))
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            raise ValueError(f"policy.freeze: {pattern!r} matches no parameter; names look like {names[:3]}")
    trained = [name for name in names if not any(re.search(pattern, name) for pattern in patterns)]
    if not trained:
        raise ValueError(f"policy.freeze {list(patterns)} leaves nothing to train")
    for name, parameter in own.items():
        parameter.requires_grad_(name in trained)
    return trained


def _tied_name(name: str) -> str:
    """The last stage's copy of tied embeddings goes by the name of the first stage's."""
    return "llm.embedding.word_embeddings.weight" if name == "llm.output_layer.weight" else name
