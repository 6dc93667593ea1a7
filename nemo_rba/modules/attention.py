# SPDX-License-Identifier: Apache-2.0
"""One prompt, many answers: attention in which the G answers to a prompt read one prefix cache.

A textbook decoder repeats the prompt for every answer. Here a prompt is one row, left padded so that every prompt ends
at position P - 1, and its answers follow it: the keys and values of the prompt exist once, in training as in
generation, and cost is linear in G (bifurcated attention, arXiv 2403.08845). megatron's transformer block runs
unchanged (for single new tokens its layers' modules do, see ``gpt.run``); only its core attention is ours, and it does
what the *plan* handed down as ``attention_bias`` says:

    PrefixPlan   the prompts alone; keeps keys and values when given a cache      (prefill)
    GroupPlan    prompts and all their answers in one pass, S = P + G * T         (teacher forcing)
    DecodePlan   one new token per living answer, on the caches                   (sampling)
    FixedPlan    one new token per answer, on caches that never change their shape (sampling, ``fixed_decode``)

Rotary embeddings are applied here, from tables made once per pass. Being relative, they do not see the left padding.
Layouts: b prompts, q key-value heads, r query heads per key-value head, g answers, t tokens, p prefix, d head size.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

Cache = dict[int, tuple[Tensor, Tensor]]  # layer -> keys, values


@dataclass(frozen=True, slots=True)
class Rotary:
    """Cosine and sine of every position from 0: (S, d) each."""

    cos: Tensor
    sin: Tensor

    def __call__(self, x: Tensor, positions: Tensor | slice) -> Tensor:
        """Rotate x (s, b, h, d) to its positions (s,)."""
        cos, sin = self.cos[positions][:, None, None], self.sin[positions][:, None, None]
        first, second = x.chunk(2, -1)
        return x * cos.to(x.dtype) + torch.cat((-second, first), -1) * sin.to(x.dtype)


class PlannedAttention(torch.nn.Module):
    """megatron's core-attention slot: hands queries, keys and values to the plan of this pass."""

    def __init__(self, config, layer_number: int, *args, **kwargs):
        super().__init__()
        if config.softmax_scale is not None or config.attention_dropout:
            raise ValueError(
                f"softmax_scale {config.softmax_scale} and attention_dropout {config.attention_dropout} are not "
                "supported: sampled and teacher-forced log-probabilities must be equal"
            )
        self.layer_number = layer_number

    def forward(self, query, key, value, attention_mask, *, attention_bias, **kwargs) -> Tensor:
        """query (s, b, h, d), key and value (s, b, q, d) -> (s, b, h * d)."""
        return attention_bias.attend(self.layer_number, query, key, value)


def _by_head(grid: Tensor) -> Tensor:
    """(b, g, q, r, x) -> (b * q, g * r, x): one matrix per prompt and head."""
    b, g, q, r, x = grid.shape
    return grid.transpose(1, 2).reshape(b * q, g * r, x)


def _by_slot(matrices: Tensor, q: int, g: int) -> Tensor:
    """The way back: (b * q, g * r, x) -> (b, g, q, r, x)."""
    return matrices.unflatten(0, (-1, q)).unflatten(2, (g, -1)).transpose(1, 2)


def _heads_first(x: Tensor) -> Tensor:
    return x.permute(1, 2, 0, 3)  # (s, b, h, d) -> (b, h, s, d)


def _prefix_attention(query: Tensor, key: Tensor, value: Tensor, valid: Tensor) -> Tensor:
    """Causal attention of left-padded prompts: (b, h, p, d), keys (b, q, p, d), valid (b, p) -> (p, b, h * d)."""
    length = valid.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=valid.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=valid.device)  # a padded row must attend to something
    mask = (causal & valid[:, None, :]) | itself
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None], enable_gqa=True)
    return out.permute(2, 0, 1, 3).flatten(2)


@dataclass(slots=True)
class PrefixPlan:
    """Prompts alone."""

    rotary: Rotary
    valid: Tensor  # (b, p), False where left padded
    cache: Cache | None = None  # filled layer by layer with rotated keys and values (b, q, p, d)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        positions = slice(0, len(query))
        query, key, value = (
            _heads_first(x) for x in (self.rotary(query, positions), self.rotary(key, positions), value)
        )
        if self.cache is not None:
            self.cache[layer] = (key.contiguous(), value.contiguous())  # read at every step; no view of the projection
        return _prefix_attention(query, key, value, self.valid)


@dataclass(slots=True)
class GroupPlan:
    """Prompts, then ``group_size`` answers of ``num_tokens`` positions each: S = p + g * t."""

    rotary: Rotary
    valid: Tensor  # (b, p)
    group_size: int
    num_tokens: int
    positions: Tensor = field(init=False)  # (S,) every answer starts at p

    def __post_init__(self) -> None:
        prefix, device = self.valid.shape[1], self.valid.device
        answer = torch.arange(prefix, prefix + self.num_tokens, device=device)
        self.positions = torch.cat((torch.arange(prefix, device=device), answer.repeat(self.group_size)))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        prefix = self.valid.shape[1]
        query, key = self.rotary(query, self.positions), self.rotary(key, self.positions)
        prefix_key, prefix_value = _heads_first(key[:prefix]), _heads_first(value[:prefix])
        prompt = _prefix_attention(_heads_first(query[:prefix]), prefix_key, prefix_value, self.valid)
        if self.num_tokens == 0:
            return prompt
        answers = self._answers(query[prefix:], key[prefix:], value[prefix:], prefix_key, prefix_value)
        return torch.cat((prompt, answers))

    def _answers(self, query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor) -> Tensor:
        """query (g * t, b, h, d), key and value (g * t, b, q, d) -> (g * t, b, h * d)."""
        (b, q, p, d), g, t = prefix_key.shape, self.group_size, self.num_tokens
        r = query.shape[2] // q
        query = query.view(g, t, b, q, r, d).permute(2, 3, 0, 4, 1, 5) * d**-0.5  # (b, q, g, r, t, d)
        key, value = (x.view(g, t, b, q, d).permute(2, 3, 0, 1, 4) for x in (key, value))  # (b, q, g, t, d)
        shared = query.reshape(b, q, g * r * t, d) @ prefix_key.transpose(-1, -2)
        shared = shared.masked_fill(~self.valid[:, None, None], -torch.inf).view(b, q, g, r, t, p)
        own = (query.reshape(b, q, g, r * t, d) @ key.transpose(-1, -2)).view(b, q, g, r, t, t)
        causal = torch.ones(t, t, dtype=torch.bool, device=own.device).tril()
        own = own.masked_fill(~causal, -torch.inf)
        weights = torch.cat((shared, own), -1).softmax(-1, dtype=torch.float32).to(value.dtype)
        shared, own = weights[..., :p], weights[..., p:]
        out = (shared.reshape(b, q, g * r * t, p) @ prefix_value).view(b, q, g, r, t, d)
        out = out + (own.reshape(b, q, g, r * t, t) @ value).view(b, q, g, r, t, d)
        return out.permute(2, 4, 0, 1, 3, 5).reshape(g * t, b, q * r * d)


@dataclass(slots=True)
class DecodePlan:
    """One new token per living answer. Row n belongs to prompt ``prompt[n]``, where it is number ``slot[n]``."""

    rotary: Rotary
    valid: Tensor  # (b, p)
    prefix: Cache  # (b, q, p, d)
    prompt: Tensor  # (n,)
    slot: Tensor  # (n,)
    own: Cache = field(default_factory=dict)  # (n, q, capacity, d)
    num_cached: int = 0  # tokens already in ``own``
    num_slots: int = 0  # most living answers of a prompt
    full: bool = False  # every prompt has that many, in order
    unreal: Tensor = field(init=False)  # (b, 1, 1, p) float32, what is added to scores: 0, -inf where left padded

    def __post_init__(self) -> None:
        self._index()

    def _index(self) -> None:
        self.num_slots = int(self.slot.max()) + 1
        self.full = len(self.prompt) == len(self.valid) * self.num_slots
        self.unreal = torch.zeros(self.valid.shape, device=self.valid.device)
        self.unreal = self.unreal.masked_fill_(~self.valid, -torch.inf)[:, None, None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        (p, h), (n, q, d) = (self.valid.shape[1], query.shape[2]), value.shape[1:]
        position = slice(p + self.num_cached, p + self.num_cached + 1)
        rotated = self.rotary(torch.cat((query, key), 2), position)[0]  # (n, h + q, d)
        query = rotated[:, :h].reshape(n, q, -1, d) * d**-0.5
        own_key, own_value = self._append(layer, rotated[:, h:], value[0])
        prefix_key, prefix_value = (x.flatten(0, 1) for x in self.prefix[layer])  # (b * q, p, d)
        unreal = self.unreal.to(query.dtype).expand(-1, q, -1, -1).flatten(0, 1)  # (b * q, 1, p)
        shared = torch.baddbmm(unreal, self._by_prompt(query), prefix_key.transpose(1, 2))
        own = self._by_prompt(query @ own_key.transpose(2, 3))
        weights = torch.cat((shared, own), -1).softmax(-1, dtype=torch.float32).to(value.dtype)
        out = self._by_answer(weights[..., :p] @ prefix_value, q)
        return (out + self._by_answer(weights[..., p:], q) @ own_value).reshape(1, n, -1)

    def _by_prompt(self, rows: Tensor) -> Tensor:
        """rows (n, q, r, x) of the answers -> (b * q, slots * r, x): one matrix per prompt and head."""
        (n, q, r, x), b = rows.shape, len(self.valid)
        if self.full:
            grid = rows.view(b, n // b, q, r, x)
        else:
            grid = rows.new_zeros(b, self.num_slots, q, r, x)
            grid[self.prompt, self.slot] = rows
        return _by_head(grid)

    def _by_answer(self, matrices: Tensor, q: int) -> Tensor:
        """The way back: (b * q, slots * r, x) -> (n, q, r, x)."""
        grid = _by_slot(matrices, q, self.num_slots)
        return grid.flatten(0, 1) if self.full else grid[self.prompt, self.slot]

    def _append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store this step's key and value (n, q, d); returns all so far, (n, q, num_cached + 1, d)."""
        length = self.num_cached + 1
        if layer not in self.own or self.own[layer][0].shape[2] < length:
            grown = tuple(x.new_empty(*x.shape[:2], max(32, 2 * length), x.shape[2]) for x in (key, value))
            if layer in self.own:
                for new, old in zip(grown, self.own[layer], strict=True):
                    new[:, :, : old.shape[2]] = old
            self.own[layer] = grown
        for store, new in zip(self.own[layer], (key, value), strict=True):
            store[:, :, length - 1] = new
        return tuple(store[:, :, :length] for store in self.own[layer])

    def keep(self, rows: Tensor) -> None:
        """Drop every answer but ``rows`` (m,), and every prompt that has none left."""
        prompts, self.prompt = self.prompt[rows].unique(return_inverse=True)
        if len(prompts) < len(self.valid):
            self.valid = self.valid[prompts]
            for layer, (key, value) in self.prefix.items():  # one layer after the other: the old one is freed first
                self.prefix[layer] = (key[prompts], value[prompts])
        length = self.num_cached
        for layer, (key, value) in self.own.items():
            self.own[layer] = (key[rows, :, :length], value[rows, :, :length])
        first = torch.searchsorted(self.prompt, self.prompt)  # rows stay ordered by prompt
        self.slot = torch.arange(len(rows), device=rows.device) - first
        self._index()


@dataclass(slots=True)
class FixedPlan:
    """One new token for each of g answers to each of b prompts, n = b * g in order, at a place only a tensor knows.

    Nothing here depends on a number that changes from step to step: what is not written yet is read and masked. Caches
    have room for the longest answer and are written where they are, so a step can be recorded and replayed.
    """

    rotary: Rotary  # of this step's position alone: (1, d)
    place: Tensor  # (1,) int64, where in ``own`` the keys and values of this step go
    unreal: Tensor  # (b * q, 1, p), what is added to scores: 0, -inf where padded
    future: Tensor  # (c,), the same of ``own``: -inf beyond ``place``
    prefix: Cache  # (b, q, p, d)
    own: Cache  # (n, q, c, d)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        (h, (n, q, d)), (b, _, p, _) = (query.shape[2], value.shape[1:]), self.prefix[layer][0].shape
        rotated = self.rotary(torch.cat((query, key), 2), slice(0, 1))[0]  # (n, h + q, d)
        query = rotated[:, :h].reshape(n * q, -1, d) * d**-0.5
        for store, new in zip(self.own[layer], (rotated[:, h:], value[0]), strict=True):
            store.index_copy_(2, self.place, new[:, :, None])
        own_key, own_value = (x.flatten(0, 1) for x in self.own[layer])  # (n * q, c, d)
        prefix_key, prefix_value = (x.flatten(0, 1) for x in self.prefix[layer])  # (b * q, p, d)
        own = torch.baddbmm(self.future, query, own_key.transpose(1, 2))
        shared, own = (_by_head(x.view(b, n // b, q, -1, x.shape[2])) for x in (query, own))
        shared = torch.baddbmm(self.unreal, shared, prefix_key.transpose(1, 2))
        weights = torch.cat((shared, own), -1).softmax(-1, dtype=torch.float32).to(value.dtype)
        out = _by_slot(weights[..., :p] @ prefix_value, q, n // b)
        own = _by_slot(weights[..., p:], q, n // b).reshape(n * q, -1, own_key.shape[1]) @ own_value
        return (out + own.view(out.shape)).reshape(1, n, -1)
