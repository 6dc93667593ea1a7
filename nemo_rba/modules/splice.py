# SPDX-License-Identifier: Apache-2.0
"""Prompts as the language model takes them: left padded, speech frames in place of the audio locator token."""

import torch
from torch import Tensor


def valid_positions(lengths: Tensor) -> Tensor:
    """Which positions of left-padded prompts of ``lengths`` (B,) are real: (B, S), S = the longest one."""
    total = int(lengths.max())
    return torch.arange(total, device=lengths.device) >= total - lengths[:, None]


def left_pad(token_embeddings: Tensor, prompt_lens: Tensor) -> tuple[Tensor, Tensor]:
    """Typed prompts: embeddings (P, B, H), right padded -> (S, B, H), left padded, and valid (B, S); S = longest."""
    valid = valid_positions(prompt_lens)
    index = (valid.long().cumsum(1) - 1).clamp(min=0)  # (B, S)
    rows = token_embeddings.transpose(0, 1).gather(1, index[..., None].expand(-1, -1, token_embeddings.shape[2]))
    return rows.masked_fill(~valid[..., None], 0.0).transpose(0, 1).contiguous(), valid


def splice(
    *, token_embeddings: Tensor, prompt_ids: Tensor, prompt_lens: Tensor, frames: Tensor, frame_lens: Tensor,
    locator_id: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Left-padded prompt embeddings.

    token_embeddings (P, B, H) of prompt_ids (B, P), right padded; frames (B, F, H) with frame_lens (B,).
    Returns embeddings (S, B, H), S = the longest prompt, and valid (B, S), False where padded.

    Raises:
        ValueError: a row has not exactly one locator token.
    """
    num_prompts, num_tokens = prompt_ids.shape
    device = prompt_ids.device
    real = torch.arange(num_tokens, device=device) < prompt_lens[:, None]
    is_locator = (prompt_ids == locator_id) & real
    if not bool((is_locator.sum(1) == 1).all()):
        counts = is_locator.sum(1).tolist()
        raise ValueError(f"every prompt needs the audio locator (id {locator_id}) exactly once, found {counts}")
    locator = is_locator.int().argmax(1, keepdim=True)  # (B, 1)
    frame_lens = frame_lens[:, None].to(device)
    valid = valid_positions(prompt_lens - 1 + frame_lens[:, 0])
    index = valid.long().cumsum(1) - 1  # (B, S), -1 where padded
    # one pool a row: tokens 0 .. P-1, then frames P .. P+F-1, then a zero vector for the padding
    source = torch.where(
        index < locator,
        index,
        torch.where(index < locator + frame_lens, num_tokens + index - locator, index - frame_lens + 1),
    )
    pool = torch.cat((token_embeddings.transpose(0, 1), frames, frames.new_zeros(num_prompts, 1, frames.shape[2])), 1)
    source = source.masked_fill(~valid, pool.shape[1] - 1)
    embeddings = pool.gather(1, source[..., None].expand(-1, -1, pool.shape[2]))
    return embeddings.transpose(0, 1).contiguous(), valid
