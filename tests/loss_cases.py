# SPDX-License-Identifier: Apache-2.0
"""Batches for the tests of losses: by hand, or with everything in them."""

from dataclasses import replace

import torch
from torch import Tensor

from nemo_rba.types import RolloutBatch, SpeechBatch

NO_PROMPTS = SpeechBatch(
    instructions=(),
    audio=torch.zeros(0, 0),
    audio_lens=torch.zeros(0),
    prompt_ids=torch.zeros(0, 0),
    prompt_lens=torch.zeros(0),
    response_ids=torch.zeros(0, 0),
    response_lens=torch.zeros(0),
)


def make_batch(mask: Tensor, **fields) -> RolloutBatch:
    return RolloutBatch(
        **{
            "prompts": NO_PROMPTS,
            "prompt_index": torch.arange(len(mask)),
            "response_ids": torch.zeros(mask.shape, dtype=torch.int64),
            "response_mask": mask,
            "advantages": torch.ones(len(mask)),
            "num_loss_tokens": int(mask.sum()),
            "num_loss_rollouts": len(mask),
        }
        | fields
    )


def one_token(logprob: float, **fields) -> tuple[Tensor, RolloutBatch]:
    return torch.tensor([[logprob]], requires_grad=True), make_batch(torch.ones(1, 1, dtype=torch.bool), **fields)


def random_case(num: int = 8, length: int = 6, candidates: int = 5) -> tuple[Tensor, Tensor, RolloutBatch]:
    """Log-probabilities (N, T) and (N, T, K), and a batch of two answers to each prompt with everything in it."""
    torch.manual_seed(0)
    mask = torch.arange(length) < torch.tensor([6, 1, 3, 2, 5, 4, 6, 2])[:num, None]
    batch = make_batch(
        mask,
        prompt_index=torch.arange(num) // 2,
        advantages=torch.randn(num),
        old_logprobs=-torch.rand(num, length),
        ref_logprobs=-torch.rand(num, length),
        teacher_logprobs=-torch.rand(num, length),
        teacher_topk_logprobs=torch.randn(num, length, candidates + 1).log_softmax(-1)[..., :-1],
    )
    return -torch.rand(num, length), torch.randn(num, length, candidates + 1).log_softmax(-1)[..., :-1], batch


def rows(batch: RolloutBatch, start: int, stop: int) -> RolloutBatch:
    tensors = {name: getattr(batch, name) for name in RolloutBatch.__slots__}
    return replace(batch, **{name: value[start:stop] for name, value in tensors.items() if torch.is_tensor(value)})
