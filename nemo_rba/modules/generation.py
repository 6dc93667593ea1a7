# SPDX-License-Identifier: Apache-2.0
"""Group sampling: one prefill per prompt, then G answers that read its cache, until each has ended its turn.

Randomness belongs to the prompt, not to the batch: an answer's uniforms come from (seed, instruction id) alone, so the
same answers come out of any batch size, order, padding or data-parallel layout. Finished answers leave the batch,
unless the model was told to keep every shape (``fixed_decode``, for CUDA graphs), which gives the same answers.
One rank of the last pipeline stage draws the tokens; all others get them from it. A pipeline of n stages works on n
groups of prompts at a time: while one waits for its tokens, the others are on their way.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from nemo_rba.distributed import pipeline
from nemo_rba.modules.attention import DecodePlan, PrefixPlan, Rotary
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
    noise = uniforms(ids, group_size, params).to(valid.device)  # (B, G, limit)
    if gpt.fixed_decode is not None:
        return gpt.fixed_decode.generate(
            gpt, prompts, valid, noise=noise, end_id=end_id, banned_ids=banned_ids, params=params
        )
    rotary = rotary_table(gpt, valid.shape[1] + params.max_new_tokens)
    groups = [
        _Answers(gpt, rotary, valid[part], noise[part], end_id=end_id, banned_ids=banned_ids, params=params)
        for part in torch.arange(len(valid), device=valid.device).tensor_split(pipeline.num_stages())
        if len(part)
    ]
    begun = 0
    for group in groups:
        group.prefill(None if prompts is None else prompts[:, begun : begun + group.num_prompts])
        begun += group.num_prompts
    going = groups
    while going:
        going = [group for group in going if group.take_tokens() and group.decode()]
    done = [group.finished() for group in groups]
    return Generated(*([item for part in parts for item in part] for parts in zip(*done, strict=True)))


def cut(tokens: Tensor, logprobs: Tensor, lengths: Tensor, ended: Tensor) -> tuple[list, list, list]:
    """Fields of ``Generated`` from tokens and log-probabilities (n, T), lengths (n,) and which answers ended (n,)."""
    sizes = lengths.tolist()
    tokens, logprobs = ([row[:n].cpu() for row, n in zip(rows, sizes, strict=True)] for rows in (tokens, logprobs))
    return tokens, logprobs, (~ended).tolist()


class _Answers:
    """The answers to some of the prompts, on their way through the stages: prefill, then take and decode in turns."""

    def __init__(
        self, gpt: GPTModel, rotary: Rotary, valid: Tensor, noise: Tensor, *, end_id: int, banned_ids: Tensor,
        params: SamplingParams,
    ):  # fmt: skip
        self.num_prompts, self.group_size, self.limit = noise.shape
        self._gpt, self._rotary, self._valid, self._noise = gpt, rotary, valid, noise.flatten(0, 1)
        self._end_id, self._banned_ids, self._params = end_id, banned_ids, params
        device, num_rows = valid.device, len(self._noise)
        self._rows = torch.arange(num_rows, device=device)  # the answers still in the batch
        self._tokens = torch.full((num_rows, self.limit), end_id, device=device)
        self._logprobs = torch.zeros(num_rows, self.limit, device=device)
        self._lengths = torch.full((num_rows,), self.limit, device=device)
        self._ended = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self._step = 0

    def prefill(self, prompts: Tensor | None) -> None:
        """The prompts (P, b, H) through this stage, once for all their answers."""
        prefix, rows = PrefixPlan(self._rotary, self._valid, cache={}), self._rows
        scores = self._forward(prompts, prefix, (self._valid.shape[1], self.num_prompts))
        self._plan = DecodePlan(
            self._rotary, self._valid, prefix.cache, prompt=rows // self.group_size, slot=rows % self.group_size
        )
        self._draw(None if scores is None else scores.repeat_interleave(self.group_size, 0))

    def take_tokens(self) -> bool:
        """Wait for the tokens drawn last and keep them; whether an answer goes on."""
        self._arriving.wait()
        token, chosen = self._drawn[0].long(), self._drawn[1].float()
        alive = ~self._ended[self._rows]
        living = self._rows[alive]
        self._tokens[living, self._step] = token[alive]
        self._logprobs[living, self._step] = chosen[alive]
        done = living[token[alive] == self._end_id]
        self._step += 1
        self._ended[done], self._lengths[done] = True, self._step
        num_living = len(living) - len(done)
        if num_living < _COMPACT_BELOW * len(self._rows):
            kept = (~self._ended[self._rows]).nonzero()[:, 0]
            self._rows, token = self._rows[kept], token[kept]
            if num_living:
                self._plan.keep(kept)
        self._last = token
        return num_living > 0 and self._step < self.limit

    def decode(self) -> bool:
        """The last tokens through this stage; always True."""
        words = embed(self._gpt, self._last[:, None]) if self._gpt.pre_process else None
        scores = self._forward(words, self._plan, (1, len(self._rows)))
        self._plan.num_cached += 1
        self._draw(scores)
        return True

    def finished(self) -> tuple[list[Tensor], list[Tensor], list[bool]]:
        """Fields of ``Generated``."""
        return cut(self._tokens, self._logprobs, self._lengths, self._ended)

    def _forward(self, embeddings: Tensor | None, plan: PrefixPlan | DecodePlan, shape: tuple[int, int]):
        """Log-probabilities (n, V) after the last of ``shape`` (s, n) positions, -inf at banned tokens.

        None before the last stage.
        """
        gpt = self._gpt
        if not gpt.pre_process:
            gpt.set_input_tensor(pipeline.receive((*shape, gpt.config.hidden_size), gpt.config.pipeline_dtype))
        hidden = run(gpt, embeddings, plan)
        if not gpt.post_process:
            pipeline.send(hidden)
            return None
        scores = logits(gpt, hidden[-1:], gather=True)[0].float().log_softmax(-1)
        scores[:, self._banned_ids] = -torch.inf
        return scores

    def _draw(self, scores: Tensor | None) -> None:
        """Set out one token per row and its log-probability, the same for every rank, to arrive here."""
        uniform = self._noise[self._rows, self._step]
        self._drawn = uniform.new_zeros(2, len(uniform))  # float64 holds token ids exactly
        if scores is not None:
            self._drawn[0] = choose(scores, uniform, self._params)
            self._drawn[1] = scores.gather(1, self._drawn[:1].long().T)[:, 0]
        self._arriving = pipeline.agree(self._drawn)
