# SPDX-License-Identifier: Apache-2.0
"""Group sampling: one prefill per prompt, then G answers that read its cache, until each has ended its turn.

Randomness belongs to the prompt, not to the batch: an answer's uniforms come from (seed, instruction id) alone, so the
same answers come out of any batch size, order, padding or data-parallel layout. Finished answers leave the batch.
One rank of the last pipeline stage draws the tokens; all others get them from it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from nemo_rba.distributed import pipeline
from nemo_rba.modules.attention import DecodePlan, PrefixPlan
from nemo_rba.modules.gpt import embed, logits, rotary_table, run
from nemo_rba.types import SamplingParams

_COMPACT_BELOW = 0.875  # drop finished rows once fewer than this share is alive: copying a cache costs about one step


@dataclass(frozen=True, slots=True)
class Generated:
    """N answers, ordered by prompt."""

    token_ids: list[Tensor]  # (T_i,) with the end-of-turn token unless truncated
    logprobs: list[Tensor]  # (T_i,) float32, untempered
    truncated: list[bool]


def uniforms(ids: Sequence[str], group_size: int, params: SamplingParams) -> Tensor:
    """One uniform number per answer token, a function of (seed, id): (B, G, max_new_tokens) float64."""
    rows = []
    for name in ids:
        digest = hashlib.blake2b(f"{params.seed}:{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        rows.append(torch.rand(group_size, params.max_new_tokens, generator=generator, dtype=torch.float64))
    return torch.stack(rows)


def choose(log_probs: Tensor, uniform: Tensor, params: SamplingParams) -> Tensor:
    """One token per row by inverse transform sampling: log_probs (n, V), uniform (n,) in [0, 1) -> (n,)."""
    if params.temperature == 0:
        return log_probs.argmax(-1)
    probs = (log_probs.double() / params.temperature).softmax(-1)
    if params.top_p < 1:
        ordered, order = probs.sort(-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= params.top_p  # the first token is never outside
        probs = probs.scatter(-1, order, ordered.masked_fill(outside, 0.0))
    cumulative = probs.cumsum(-1)
    target = uniform[:, None].to(cumulative.device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=probs.shape[-1] - 1)


@torch.no_grad()
def generate(
    gpt: GPTModel, prompts: Tensor | None, valid: Tensor, *, ids: Sequence[str], group_size: int, end_id: int,
    banned_ids: Tensor, params: SamplingParams,
) -> Generated:  # fmt: skip
    """Sample ``group_size`` answers to each of B prompts.

    prompts (P, B, H) left padded with valid (B, P), None beyond the first stage; ``ids`` (B) name the prompts for their
    random numbers; tokens of ``banned_ids`` are never chosen (kept log-probabilities are still those of the whole
    distribution).
    """
    num_prompts, prefix = valid.shape
    device, limit = valid.device, params.max_new_tokens
    rotary = rotary_table(gpt, prefix + limit)
    prefill = PrefixPlan(rotary, valid, cache={})
    scores = _next_token_scores(gpt, prompts, prefill, (prefix, num_prompts), banned_ids)
    noise = uniforms(ids, group_size, params).flatten(0, 1).to(device)  # (N, limit)
    num_rows = num_prompts * group_size
    rows = torch.arange(num_rows, device=device)  # the answers still in the batch
    plan = DecodePlan(rotary, valid, prefill.cache, prompt=rows // group_size, slot=rows % group_size)
    tokens = torch.full((num_rows, limit), end_id, device=device)
    logprobs = torch.zeros(num_rows, limit, device=device)
    lengths = torch.full((num_rows,), limit, device=device)
    ended = torch.zeros(num_rows, dtype=torch.bool, device=device)
    scores = None if scores is None else scores.repeat_interleave(group_size, 0)
    for step in range(limit):
        token, chosen = _draw(scores, noise[rows, step], params)
        alive = ~ended[rows]
        living = rows[alive]
        tokens[living, step] = token[alive]
        logprobs[living, step] = chosen[alive]
        done = living[token[alive] == end_id]
        ended[done], lengths[done] = True, step + 1
        num_living = len(living) - len(done)
        if num_living == 0 or step == limit - 1:
            break
        if num_living < _COMPACT_BELOW * len(rows):
            kept = (~ended[rows]).nonzero()[:, 0]
            rows, token = rows[kept], token[kept]
            plan.keep(kept)
        words = embed(gpt, token[:, None]) if gpt.pre_process else None
        scores = _next_token_scores(gpt, words, plan, (1, len(rows)), banned_ids)
        plan.num_cached += 1
    sizes = lengths.tolist()
    return Generated(
        token_ids=[row[:n].cpu() for row, n in zip(tokens, sizes, strict=True)],
        logprobs=[row[:n].cpu() for row, n in zip(logprobs, sizes, strict=True)],
        truncated=(~ended).tolist(),
    )


def _next_token_scores(
    gpt: GPTModel, embeddings: Tensor | None, plan: PrefixPlan | DecodePlan, shape: tuple[int, int], banned_ids: Tensor
) -> Tensor | None:
    """Through all stages: log-probabilities (n, V) after the last of ``shape`` (s, n) positions, -inf at banned tokens.

    None before the last stage.
    """
    if not gpt.pre_process:
        gpt.set_input_tensor(pipeline.receive((*shape, gpt.config.hidden_size), gpt.config.pipeline_dtype))
    hidden = run(gpt, embeddings, plan)
    if not gpt.post_process:
        pipeline.send(hidden)
        return None
    scores = logits(gpt, hidden[-1:], gather=True)[0].float().log_softmax(-1)
    scores[:, banned_ids] = -torch.inf
    return scores


def _draw(scores: Tensor | None, uniform: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """One token per row and its log-probability, the same on every rank: (n,), (n,)."""
    drawn = uniform.new_zeros(2, len(uniform))  # float64 holds token ids exactly
    if scores is not None:
        drawn[0] = choose(scores, uniform, params)
        drawn[1] = scores.gather(1, drawn[:1].long().T)[:, 0]
    pipeline.agree(drawn)
    return drawn[0].long(), drawn[1].float()
