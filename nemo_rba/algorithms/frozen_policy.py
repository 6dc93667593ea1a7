# SPDX-License-Identifier: Apache-2.0
"""A SpeechLM that only answers, and how any of them answers a batch that is larger than what it takes at once."""

import dataclasses

import torch
from torch import Tensor, nn

from nemo_rba.algorithms.collate import select_prompts
from nemo_rba.algorithms.passes import rows_of
from nemo_rba.algorithms.speech_cache import SpeechCache
from nemo_rba.modules.perception import EncodedSpeech
from nemo_rba.types import Rollout, SamplingParams, SpeechBatch


class FrozenPolicy:
    """A SpeechLM that only answers: the ``generate`` of a policy, for evaluation and chat.

    ``speech_cache`` is shared by the policies of one evaluation; None encodes every batch anew.
    """

    def __init__(self, *, model: nn.Module, generation_batch_size: int, speech_cache: SpeechCache | None):
        self.model, self.generation_batch_size = model.requires_grad_(False), generation_batch_size
        self._encode = model.encode if speech_cache is None else speech_cache.encoder_of(model)

    @torch.no_grad()
    def generate(self, batch: SpeechBatch, *, group_size: int, params: SamplingParams) -> list[Rollout]:
        """See ``protocols.Policy``."""
        speech = self._encode(batch)
        return generate_in_parts(self.model, batch, speech, self.generation_batch_size, group_size, params)


def generate_in_parts(
    model: nn.Module, batch: SpeechBatch, speech: EncodedSpeech | None, size: int, group_size: int,
    params: SamplingParams, rows: Tensor | None = None,
) -> list[Rollout]:  # fmt: skip
    """Answers to a batch, or to some ``rows`` of it, ``size`` prompts at a time."""
    rollouts = []
    for part in (torch.arange(len(batch)) if rows is None else rows).split(size):
        answers = model.generate(
            select_prompts(batch, part), rows_of(speech, part), group_size=group_size, params=params
        )
        rollouts += [dataclasses.replace(answer, prompt_index=int(part[answer.prompt_index])) for answer in answers]
    return rollouts
