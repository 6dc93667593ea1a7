# SPDX-License-Identifier: Apache-2.0
"""One microbatch's way through a pipeline stage, and what the last stage makes of its logits.

``forward_step`` is what megatron's schedules call; who judges the logits is one of ``token_logprobs``, ``token_loss``
and ``no_outcome``.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from nemo_rba.algorithms.collate import move, select_prompts
from nemo_rba.distributed import cpu, vocab_parallel
from nemo_rba.modules.perception import EncodedSpeech
from nemo_rba.protocols import Metrics, Objective
from nemo_rba.types import RolloutBatch


def forward_step(parts, model: Callable, *, judge: Callable, speech: EncodedSpeech | None):
    """One microbatch through this stage, as megatron's schedules want it."""
    part = next(parts)
    prompts = part.prompt_index.unique()
    with cpu.plain_torch():
        output = model(
            select_prompts(part.prompts, prompts),
            rows_of(speech, prompts),
            part.response_ids,
            part.response_mask,
            len(part) // len(prompts),
        )
    return output, partial(judge, part=part)


def token_logprobs(logits: Tensor, *, part: RolloutBatch, non_loss_data: bool) -> Tensor:
    """Of every answer's own tokens (N, T)."""
    with cpu.plain_torch():
        return _gather(logits, part, topk=False)


def no_outcome(logits: Tensor, *, part: RolloutBatch, non_loss_data: bool) -> None:
    """For passes whose hidden states were all that was asked for."""


def token_loss(
    logits: Tensor, *, part: RolloutBatch, objective: Objective, scale: int
) -> tuple[Tensor, Metrics]:  # fmt: skip
    """What the objective makes of the log-probabilities it asks for, times ``scale``, and its metrics."""
    with cpu.plain_torch():
        part = move(part, logits.device)
        loss, metrics = objective(_gather(logits, part, topk=objective.teacher_topk > 0), part)
        return loss * scale, metrics


def _gather(logits: Tensor, part: RolloutBatch, *, topk: bool) -> Tensor:
    """Packed logits (M, V / tp) -> log-probabilities (N, T), or (N, T, K) at the teacher's candidates; 0 if masked."""
    mask = part.response_mask.to(logits.device)
    ids = (part.teacher_topk_ids if topk else part.response_ids[..., None]).to(logits.device)
    picked = vocab_parallel.gather(vocab_parallel.log_softmax(logits), ids[mask])
    values = picked.new_zeros(ids.shape)
    values[mask] = picked
    return values if topk else values[..., 0]


def rows_of(speech: EncodedSpeech | None, rows: Tensor) -> EncodedSpeech | None:
    """The speech of some prompts; None for those that were typed, and for speech that is yet to be encoded."""
    if speech is None:
        return None
    rows = rows.to(speech.features.device)
    return EncodedSpeech(speech.features[rows], speech.lens[rows])
