# SPDX-License-Identifier: Apache-2.0
"""Bytes one GPU needs: what stays, and what the update, generation and the teacher's judgement add.

Letters: b prompts in a microbatch, G answers to each, T tokens an answer, t = T - 1 of them fed, P prompt positions
(text around the speech, and its frames), S = P + G * t positions of a ``GroupPlan`` row, n = S * b, a = G * t * b;
H hidden, F feed-forward, h heads, q key-value heads, d head size, V vocabulary: F, h, q and V are those of one
tensor-parallel rank; e bytes a parameter; s = tensor-parallel size under sequence parallelism, else 1.

Saved for backward by one layer, as this code runs it with torch operations, in bytes:

    norms        2 n (H c + 4) / s   c = e where the kernel is fused (a GPU, norm weights in e bytes too); otherwise
                                     4 for the input in fp32 and, where the norm is trained, 4 for what it scales
    linears      2 n H e / s  (QKV and FC1)  +  n h d e  (projection)  +  n F e  (FC2); none of it where frozen
    MLP          4 n F e      gate and value, silu(gate), value + 0
    attention    n (h + 2 q) d e + n q d e    fused QKV, which the values are views of, and rotated keys
                 4 S d e                      rotary tables at the positions
    - q, k norm  n (h + q) (4 + d (c - e)) + n h d e    queries are copied out of the fused QKV
    - answers    2 a (h + q) d e              queries and own keys and values, copied for the products
                 a h (P + t) * 4              softmax in fp32, materialised; and again * e in bf16
    - prompt     fused SDPA on a CPU:         n h d e + b h P (d e + 4) + b P P e
                 math SDPA on a GPU:          b h P (P + 3 d) * 4    (a mask with grouped heads has no fused kernel)

After the last layer: n H c for the final norm and M H e for the M = b G T positions that get logits; before the first:
b (P + 2) (H e + 8) for the splice and b P e times the adapter's width. With full recomputation a layer keeps its input,
n H e / s, and one layer at a time is whole. A trained encoder or a Conformer adapter is not counted: its parameters,
gradients and optimizer state are, its activations are not.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from nemo_rba.plan.shapes import Stage

KEEP_SHARE = 0.875  # of the answers when finished ones are dropped: modules.generation._COMPACT_BELOW


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """One rank's share of the language model, in elements; see the letters above."""

    hidden: int
    ffn: int
    heads: int
    groups: int
    head_dim: int
    vocabulary: int
    tensor_parallel_size: int
    sequence_split: int  # s
    itemsize: int  # e
    qk_norm: bool
    on_gpu: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What layers keep for the gradients of their weights."""

    norm_bytes: int  # of each element of a norm's input, c
    linears: bool  # their inputs, because their weights (or LoRA on them) are trained
    adapter: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatch:
    """Prompts with all their answers: b, G, T and P, at their longest."""

    prompts: int
    group_size: int
    answer_tokens: int
    prompt_positions: int

    @property
    def fed(self) -> int:
        """Tokens of an answer that the model reads."""
        return self.answer_tokens - 1

    @property
    def logit_rows(self) -> int:
        """Positions with logits, M."""
        return self.prompts * self.group_size * self.answer_tokens

    @property
    def scores(self) -> int:
        """Attention weights of the answers for one head, a * (P + t)."""
        return self.prompts * self.group_size * self.fed * (self.prompt_positions + self.fed)


def weight_bytes(stage: Stage) -> int:
    """Parameters and buffers of one rank."""
    return sum(p.numel * p.itemsize for p in stage.parameters) + stage.buffer_bytes


def reference_bytes(stage: Stage) -> int:
    """The start model, kept as a second copy of the trained parameters only."""
    return sum(p.numel * p.itemsize for p in stage.parameters if p.trained)


def gradient_bytes(stage: Stage) -> int:
    """megatron's gradient buffer: fp32, trained parameters only."""
    return sum(4 * p.numel for p in stage.parameters if p.trained)


def optimizer_bytes(stage: Stage, *, ways: int, on_gpu: bool) -> int:
    """Adam: two fp32 moments, and the fp32 main weight of a bf16 one, divided over ``ways`` data-parallel ranks.

    torch's AdamW, which runs on a CPU, also keeps a fp32 step count for each tensor.
    """
    trained = [p for p in stage.parameters if p.trained]
    state = sum((8 if p.itemsize == 4 else 12) * p.numel for p in trained)
    return -(-state // ways) + (0 if on_gpu else 4 * len(trained))


def layer_activation_bytes(sizes: Sizes, kept: Kept, batch: Microbatch) -> int:
    """Saved for backward by one decoder layer."""
    e, d, h, q = sizes.itemsize, sizes.head_dim, sizes.heads, sizes.groups
    row = batch.prompt_positions + batch.group_size * batch.fed
    row += -row % sizes.sequence_split
    n = row * batch.prompts
    hidden = 2 * n * (sizes.hidden * (kept.norm_bytes + e * kept.linears) + 4)
    mlp = n * sizes.ffn * e * (4 + kept.linears)
    attention = n * d * e * (h + 3 * q) + n * h * d * e * kept.linears + 4 * row * d * e
    if sizes.qk_norm:
        attention += n * (h + q) * (4 + d * (kept.norm_bytes - e)) + n * h * d * e
    return hidden // sizes.sequence_split + mlp + attention + _answers(sizes, batch) + _prompt(sizes, batch, n)


def _answers(sizes: Sizes, batch: Microbatch) -> int:
    copies = 2 * batch.prompts * batch.group_size * batch.fed * (sizes.heads + sizes.groups) * sizes.head_dim
    softmax = 4 if sizes.itemsize == 4 else 4 + sizes.itemsize
    return copies * sizes.itemsize + batch.scores * sizes.heads * softmax


def _prompt(sizes: Sizes, batch: Microbatch, n: int) -> int:
    b, h, d, e, length = batch.prompts, sizes.heads, sizes.head_dim, sizes.itemsize, batch.prompt_positions
    if sizes.on_gpu:
        return b * h * length * (length + 3 * d) * 4
    return n * h * d * e + b * h * length * (d * e + 4) + b * length * length * e


def activation_bytes(
    stage: Stage, sizes: Sizes, kept: Kept, batch: Microbatch, *, adapter_width: int, recompute: bool
) -> int:
    """Saved for backward by one microbatch on this pipeline stage, without the logits."""
    layer = layer_activation_bytes(sizes, kept, batch)
    e, length = sizes.itemsize, batch.prompt_positions
    hidden = batch.prompts * (length + batch.group_size * batch.fed) * sizes.hidden * e // sizes.sequence_split
    total = stage.num_layers * hidden + layer if recompute else stage.num_layers * layer
    if stage.is_first:
        total += batch.prompts * (length + 2) * (sizes.hidden * e + 8)
        total += batch.prompts * length * adapter_width * e * kept.adapter
    if stage.is_last:
        total += hidden // e * kept.norm_bytes
        total += batch.logit_rows * sizes.hidden * e * kept.linears
    return total


def saved_logit_bytes(sizes: Sizes, batch: Microbatch) -> int:
    """What the log-softmax over M rows of V logits keeps: one fp32 tensor, with every token id once."""
    return batch.logit_rows * (4 * sizes.vocabulary + 8)


def logit_bytes(sizes: Sizes, batch: Microbatch) -> int:
    """Logits of one microbatch and their gradients at the peak of the backward pass.

    The logits, their log-softmax and two fp32 gradients; sharded vocabularies keep one fp32 tensor more.
    """
    return batch.logit_rows * sizes.vocabulary * (sizes.itemsize + (12 if sizes.tensor_parallel_size == 1 else 16))


def working_bytes(stage: Stage, sizes: Sizes, batch: Microbatch) -> int:
    """Short-lived tensors of the backward pass: gradients of one layer's attention weights, and one weight gradient."""
    scores = batch.scores * sizes.heads * (4 * sizes.itemsize + 4)
    return scores + max((p.numel * p.itemsize for p in stage.parameters if p.trained), default=0)


def cache_capacity(tokens: int) -> int:
    """Positions ``DecodePlan`` has room for once ``tokens`` are cached: it doubles from 32."""
    capacity = 0
    for length in range(1, tokens + 1):
        if capacity < length:
            capacity = max(32, 2 * length)
    return capacity


def kv_cache_bytes(stage: Stage, sizes: Sizes, batch: Microbatch) -> int:
    """Keys and values during generation: every prompt's once, and those of all its answers, none having ended."""
    position = 2 * stage.num_layers * sizes.groups * sizes.head_dim * sizes.itemsize
    return position * batch.prompts * (batch.prompt_positions + batch.group_size * cache_capacity(batch.fed))


def cache_copy_bytes(sizes: Sizes, batch: Microbatch) -> int:
    """Second copy of one layer's cache of answers while finished ones are dropped from it, at its longest."""
    position = 2 * sizes.groups * sizes.head_dim * sizes.itemsize
    return int(KEEP_SHARE * position * batch.prompts * batch.group_size * batch.fed)


def fixed_cache_bytes(stage: Stage, sizes: Sizes, batch: Microbatch, *, prompt_multiple: int) -> int:
    """What ``modules.fixed_decode`` keeps: caches of whole length, rotary tables, and what a step reads and writes."""
    b, rows, tokens = batch.prompts, batch.prompts * batch.group_size, batch.answer_tokens
    room = batch.prompt_positions + -batch.prompt_positions % prompt_multiple
    caches = 2 * stage.num_layers * sizes.groups * sizes.head_dim * sizes.itemsize * (b * room + rows * tokens)
    unreal = b * sizes.groups * room * sizes.itemsize
    rotary = 2 * (room + tokens) * sizes.head_dim * 4
    answers = rows * (tokens * (8 + 8 + 4) + 8 + 8 + 1)  # random numbers, ids, log-probabilities; last, length, ended
    return caches + unreal + rotary + answers + sizes.vocabulary * sizes.tensor_parallel_size + 16


def prompt_cache_bytes(stage: Stage, sizes: Sizes, batch: Microbatch) -> int:
    """Keys and values of the prompts as they are computed, before ``modules.fixed_decode`` takes them over."""
    position = 2 * stage.num_layers * sizes.groups * sizes.head_dim * sizes.itemsize
    return position * batch.prompts * batch.prompt_positions


def compared_state_bytes(
    sizes: Sizes, batch: Microbatch, *, layers: int, in_flight: int, waiting: int, recompute: bool
) -> int:
    """What a loss on hidden states adds at the height of an update, see ``modules.states.Attraction``.

    Two fp32 copies of every compared state, with their norms, for the gradient, of one layer at a time where layers are
    computed again; and the states to be like, of ``waiting`` microbatches that have not been compared yet.
    """
    graph = batch.logit_rows * (8 * sizes.hidden + 8) * (1 if recompute else layers * in_flight)
    return graph + waiting * layers * batch.logit_rows * sizes.hidden * sizes.itemsize


def sampling_bytes(sizes: Sizes, batch: Microbatch, *, top_p: bool) -> int:
    """Gathered scores of the next token and the fp64 probabilities they are drawn from."""
    rows = batch.prompts * batch.group_size
    return rows * sizes.vocabulary * sizes.tensor_parallel_size * (4 + 16 + (24 if top_p else 0))


def judging_bytes(*, rows: int, tokens: int, prompt_tokens: int, vocabulary: int, ffn: int, itemsize: int) -> int:
    """A Hugging Face teacher's logits of ``rows`` answers, one row of them in fp32 twice, and one MLP."""
    logits = vocabulary * ((tokens + 1) * rows * itemsize + 8 * tokens)
    return logits + 3 * ffn * rows * (prompt_tokens + tokens) * itemsize


def total_parameters(stages: Sequence[Stage], *, part: str | None = None, trained: bool | None = None) -> int:
    """Parameters of the whole model: every shard counted, every copy left out."""
    return sum(
        p.numel * p.ways - p.filling
        for stage in stages
        for p in stage.parameters
        if not p.is_copy and part in (None, p.part) and trained in (None, p.trained)
    )
