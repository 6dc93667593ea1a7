# SPDX-License-Identifier: Apache-2.0
"""Group sampling of fixed shapes: every step is the same program on the same memory, so CUDA can record and replay it.

A decode step of one token launches hundreds of small kernels; on a GPU, Python is often slower than they are. A CUDA
graph launches them all at once, but it replays addresses and shapes as they were recorded. So here nothing changes but
values: finished answers stay in the batch, caches are made once for the longest prompt and answer and written in place
at a position that a tensor holds, random numbers and stop tests stay on the device. The host looks at every
``check_every``-th step whether all answers have ended. Tokens are those of the decode that drops finished rows
(``generation``), log-probabilities differ by rounding.

What it costs: finished answers, and cache positions that are not written yet, are computed to be thrown away. A CPU
has nothing to win: medians were 0.95 to 1.05 of the other's time where all answers are as long as allowed, and 2 to 3.2
times it where they have a sixth to a quarter of that. Memory is that of answers of full length; ``keep`` holds it
through updates.

On a CPU the same step runs unrecorded, which is what tests prove. **Recording itself was never run: there was no GPU.**
Tensor parallelism is let in because NCCL's collectives can be recorded, which was not run either.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from nemo_rba.distributed import pipeline
from nemo_rba.modules.attention import Cache, FixedPlan, PrefixPlan, Rotary
from nemo_rba.modules.generation import Generated, choose, cut
from nemo_rba.modules.gpt import embed, logits, rotary_table, run
from nemo_rba.types import SamplingParams

_WARM_UP_STEPS = 3  # before a recording: libraries choose algorithms and make their workspaces


def fix_decode(gpt: GPTModel, *, check_every: int, prompt_multiple: int, keep: bool) -> None:
    """Let ``generation.generate`` of this model work in fixed shapes.

    Args:
        gpt: a model of ``modules.gpt.build_gpt``.
        check_every: steps between two looks of the host at whether all answers have ended; up to so many are in vain.
        prompt_multiple: room for prompts is a multiple of this, so that batches share shapes and thus a graph.
        keep: whether caches and graph stay until shapes change. If not, they are freed when a batch is answered, which
            leaves their memory to updates, and made anew for the next.

    Raises:
        ValueError: a number is below 1, or the model is cut into pipeline stages.
    """
    if check_every < 1 or prompt_multiple < 1:
        raise ValueError(
            f"decode.check_every is {check_every} and decode.prompt_multiple is {prompt_multiple}; expected at least 1"
        )
    if pipeline.num_stages() > 1:
        raise ValueError(
            "a decode of fixed shapes does not work with pipeline stages: a CUDA graph of one stage cannot wait for "
            f"another. model.pipeline_model_parallel_size is {pipeline.num_stages()}, expected 1; or leave `decode` out"
        )
    gpt.fixed_decode = FixedDecode(check_every, prompt_multiple, keep)


@dataclass(frozen=True, slots=True)
class Shape:
    """What is fixed for good when a step is recorded: all that is no value of a tensor."""

    num_prompts: int
    group_size: int
    prompt_room: int
    end_id: int
    params: SamplingParams  # of any seed: random numbers are tensors
    device: torch.device
    weights: tuple[int, ...]  # where they are, and which adapters count: ``at_start`` and ``merged`` swap them


@dataclass(slots=True)
class State:
    """Every tensor that a step reads or writes; B prompts, N = B * G answers, P ``prompt_room``, T max_new_tokens."""

    shape: Shape
    rotary: Rotary  # (P + T, d)
    prefix: Cache  # (B, q, P, d)
    own: Cache  # (N, q, T, d)
    unreal: Tensor  # (B * q, 1, P), 0, -inf where no prompt is
    begin: Tensor  # (1,) int64, the position at which answers begin
    count: Tensor  # (1,) int64, tokens drawn
    noise: Tensor  # (N, T) float64
    banned: Tensor  # (V,) bool
    last: Tensor  # (N,) tokens drawn last, by ended answers too
    tokens: Tensor  # (N, T)
    logprobs: Tensor  # (N, T) float32
    lengths: Tensor  # (N,)
    ended: Tensor  # (N,) bool

    @classmethod
    def blank(cls, gpt: GPTModel, shape: Shape) -> "State":
        """Memory for answers of this shape; a step can run on it."""
        num_rows, limit, room = shape.num_prompts * shape.group_size, shape.params.max_new_tokens, shape.prompt_room
        attention = gpt.decoder.layers[0].self_attention
        heads, size = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
        zeros = partial(torch.zeros, device=shape.device)

        def cache(rows: int, positions: int) -> Cache:
            make = partial(zeros, (rows, heads, positions, size), dtype=gpt.config.params_dtype)
            return {layer.layer_number: (make(), make()) for layer in gpt.decoder.layers}

        return cls(
            shape=shape,
            rotary=rotary_table(gpt, room + limit),
            prefix=cache(shape.num_prompts, room),
            own=cache(num_rows, limit),
            unreal=zeros((shape.num_prompts * heads, 1, room), dtype=gpt.config.params_dtype),
            begin=zeros(1, dtype=torch.long),
            count=zeros(1, dtype=torch.long),
            noise=zeros((num_rows, limit), dtype=torch.float64),
            banned=zeros(gpt.num_words, dtype=torch.bool),
            last=zeros(num_rows, dtype=torch.long),
            tokens=zeros((num_rows, limit), dtype=torch.long),
            logprobs=zeros((num_rows, limit)),
            lengths=zeros(num_rows, dtype=torch.long),
            ended=zeros(num_rows, dtype=torch.bool),
        )

    def load(self, prefix: Cache, valid: Tensor, noise: Tensor, banned_ids: Tensor) -> None:
        """Begin with other prompts: their caches (B, q, p, d), valid (B, p), noise (N, T); empties ``prefix``.

        Old values go: a weight of 0 times what is not a number would be none either.
        """
        length = valid.shape[1]
        for layer, stores in self.prefix.items():
            for store, values in zip(stores, prefix.pop(layer), strict=True):
                store[:, :, :length] = values
                store[:, :, length:] = 0
            for store in self.own[layer]:
                store.zero_()
        unreal = self.unreal.view(len(valid), -1, self.shape.prompt_room).fill_(-torch.inf)
        unreal[..., :length].masked_fill_(valid[:, None], 0.0)
        self.begin.fill_(length)
        self.count.zero_()
        self.noise.copy_(noise)
        self.banned.zero_().index_fill_(0, banned_ids, True)
        self.tokens.fill_(self.shape.end_id)
        self.logprobs.zero_()
        self.lengths.fill_(self.shape.params.max_new_tokens)
        self.ended.zero_()

    def plan(self) -> FixedPlan:
        """Attention of the tokens drawn last."""
        place = self.count - 1
        position = self.begin + place
        table = Rotary(self.rotary.cos.index_select(0, position), self.rotary.sin.index_select(0, position))
        later = torch.arange(self.noise.shape[1], device=place.device) > place
        future = torch.zeros_like(later, dtype=self.unreal.dtype).masked_fill(later, -torch.inf)
        return FixedPlan(table, place, self.unreal, future, self.prefix, self.own)


def step(gpt: GPTModel, state: State) -> None:
    """The tokens drawn last through the model, and the next ones drawn: values of ``state`` change, nothing else."""
    hidden = run(gpt, embed(gpt, state.last[:, None]), state.plan())
    draw(state, _scores(gpt, state, hidden))


def _scores(gpt: GPTModel, state: State, hidden: Tensor) -> Tensor:
    """Log-probabilities (n, V) after hidden states (1, n, H), -inf at banned tokens."""
    return logits(gpt, hidden, gather=True)[0].float().log_softmax(-1).masked_fill(state.banned, -torch.inf)


def draw(state: State, scores: Tensor) -> None:
    """Draw a token for every answer from log-probabilities (N, V), and keep those of answers that go on."""
    uniform = state.noise.index_select(1, state.count)[:, 0]
    drawn = uniform.new_zeros(2, len(uniform))  # float64 holds token ids exactly
    drawn[0] = choose(scores, uniform, state.shape.params)
    drawn[1] = scores.gather(1, drawn[:1].long().T)[:, 0]
    pipeline.agree(drawn).wait()
    token, end_id = drawn[0].long(), state.shape.end_id
    kept = token.masked_fill(state.ended, end_id)
    logprob = drawn[1].float().masked_fill(state.ended, 0.0)
    state.tokens.index_copy_(1, state.count, kept[:, None])
    state.logprobs.index_copy_(1, state.count, logprob[:, None])
    state.last.copy_(token)
    state.count.add_(1)
    ends = (kept == end_id) & ~state.ended
    state.lengths.copy_(torch.where(ends, state.count, state.lengths))
    state.ended.logical_or_(ends)


@dataclass(slots=True)
class FixedDecode:
    """Answers to batches of prompts; keeps the memory and the graph of the last shape. Made by ``fix_decode``."""

    check_every: int
    prompt_multiple: int
    keep: bool
    kept: State | None = field(default=None, init=False)
    graph: "torch.cuda.CUDAGraph | None" = field(default=None, init=False)  # of a step on ``kept``; None on a CPU

    @torch.no_grad()
    def generate(
        self, gpt: GPTModel, prompts: Tensor, valid: Tensor, *, noise: Tensor, end_id: int, banned_ids: Tensor,
        params: SamplingParams,
    ) -> Generated:  # fmt: skip
        """As ``generation.generate``, with the random numbers ``noise`` (B, G, max_new_tokens)."""
        (num_prompts, length), group_size = valid.shape, noise.shape[1]
        room = length + -length % self.prompt_multiple
        shape = Shape(
            num_prompts, group_size, room, end_id, replace(params, seed=0), valid.device, weights=_addresses(gpt)
        )
        if self.kept is None or self.kept.shape != shape:
            self.release()  # first, or both need memory at once
            self._prepare(gpt, shape)
        state, prefix = self.kept, PrefixPlan(self.kept.rotary, valid, cache={})
        hidden = run(gpt, prompts, prefix)
        state.load(prefix.cache, valid, noise.flatten(0, 1), banned_ids)
        draw(state, _scores(gpt, state, hidden[-1:]).repeat_interleave(group_size, 0))
        self._answer(state, partial(step, gpt, state) if self.graph is None else self.graph.replay)
        found = Generated(*cut(state.tokens, state.logprobs, state.lengths, state.ended))
        if not self.keep:
            self.release()
        return found

    def release(self) -> None:
        """Give back caches and graph."""
        self.graph = self.kept = None

    def _prepare(self, gpt: GPTModel, shape: Shape) -> None:
        state = State.blank(gpt, shape)
        if shape.device.type == "cuda" and shape.params.max_new_tokens > 1:
            self.graph = record(gpt, state)
        self.kept = state  # not before its graph: a failure must not leave a state that would go without

    def _answer(self, state: State, advance: Callable[[], None]) -> None:
        for number in range(1, state.shape.params.max_new_tokens):
            if number % self.check_every == 0 and bool(state.ended.all()):  # the one place where the host waits
                return
            advance()


def record(gpt: GPTModel, state: State) -> "torch.cuda.CUDAGraph":
    """A step as a CUDA graph; changes values of ``state``, to be loaded afterwards.

    Steps before it run on a stream of their own, as torch asks for. Other threads (loading of data, NCCL's watchdog)
    may go on calling CUDA meanwhile.
    """
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(_WARM_UP_STEPS):
            state.count.fill_(1)  # whatever the longest answer is, there is room for a second token
            step(gpt, state)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step(gpt, state)
    return graph


def _addresses(gpt: GPTModel) -> tuple[int, ...]:
    """Equal where the same weights lie at the same places and the same adapters are switched on."""
    switches = [module.lora_enabled for module in gpt.modules() if hasattr(module, "lora_enabled")]
    return (*(parameter.data_ptr() for parameter in gpt.parameters()), *switches)
