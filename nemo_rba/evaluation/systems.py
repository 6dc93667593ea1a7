# SPDX-License-Identifier: Apache-2.0
"""Who is asked: a SpeechLM that hears, a teacher who reads, and the two in a row. ``runner`` asks them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Protocol

import torch

from nemo_rba.functional import pad_sequences, typed, user_prompt
from nemo_rba.protocols import Policy, PromptEncoder, Teacher
from nemo_rba.types import Instruction, Rollout, SamplingParams, SpeechBatch


class System(Protocol):
    """Anything that answers. Rollouts carry the instruction as the system took it, see ``runner.Prediction.heard``."""

    name: str
    decoding: Mapping[str, object]  # whatever changes its answers; plain JSON

    def answer(self, batch: SpeechBatch) -> list[Rollout]:
        """One rollout per prompt."""


class PolicySystem:
    """A SpeechLM that hears the instruction."""

    def __init__(self, *, name: str, policy: Policy, params: SamplingParams):
        self.name = name
        self.policy = policy
        self.params = params
        self.decoding = asdict(params)

    def answer(self, batch: SpeechBatch) -> list[Rollout]:
        return self.policy.generate(batch, group_size=1, params=self.params)


class TeacherSystem:
    """The teacher, who reads the true words: the ceiling T of the modality gap."""

    def __init__(self, *, name: str, teacher: Teacher, params: SamplingParams):
        self.name = name
        self.teacher = teacher
        self.params = params
        self.decoding = asdict(params)
        self._known: dict[str, str] = {}  # prompt -> answer: conditions that speak the same words are read alike

    def answer(self, batch: SpeechBatch) -> list[Rollout]:
        prompts = [user_prompt(self.teacher, typed(item)) for item in batch.instructions]
        new = list(dict.fromkeys(prompt for prompt in prompts if prompt not in self._known))
        if new:
            self._known |= zip(new, self.teacher.generate(new, self.params), strict=True)
        return _rollouts(batch.instructions, [self._known[prompt] for prompt in prompts])


class CascadeSystem:
    """The SpeechLM writes down what it hears, then the teacher answers what was written down.

    Args:
        transcribe_context: typed prompt that makes the policy transcribe.
        transcribe_params: decoding of the transcript (greedy, as many tokens as the longest instruction).
        params: decoding of the teacher's answer.
    """

    def __init__(
        self,
        *,
        name: str,
        policy: Policy,
        teacher: Teacher,
        encoder: PromptEncoder,
        transcribe_context: str,
        transcribe_params: SamplingParams,
        params: SamplingParams,
    ):
        self.name = name
        self.policy = policy
        self.teacher = teacher
        self.encoder = encoder
        self.transcribe_context = transcribe_context
        self.transcribe_params = transcribe_params
        self.params = params
        self.decoding = asdict(params) | {
            "transcribe_context": transcribe_context,
            "transcribe_params": asdict(transcribe_params),
        }

    def answer(self, batch: SpeechBatch) -> list[Rollout]:
        transcripts = self.policy.generate(self._ask_for_words(batch), group_size=1, params=self.transcribe_params)
        heard = {rollout.prompt_index: rollout.response for rollout in transcripts}
        instructions = [replace(item, text=heard[row]) for row, item in enumerate(batch.instructions)]
        prompts = [user_prompt(self.teacher, typed(item)) for item in instructions]
        return _rollouts(instructions, self.teacher.generate(prompts, self.params))

    def _ask_for_words(self, batch: SpeechBatch) -> SpeechBatch:
        instructions = tuple(replace(item, context=self.transcribe_context) for item in batch.instructions)
        prompts = [torch.tensor(self.encoder.encode_prompt(item)) for item in instructions]
        prompt_ids, mask = pad_sequences(prompts, pad_value=self.encoder.pad_id)
        device = batch.prompt_ids.device
        return replace(
            batch, instructions=instructions, prompt_ids=prompt_ids.to(device), prompt_lens=mask.sum(1).to(device)
        )


def _rollouts(instructions: Sequence[Instruction], responses: Sequence[str]) -> list[Rollout]:
    """What a teacher answered, one rollout an instruction."""
    return [
        Rollout(
            prompt_index=row,
            instruction=item,
            response=response,
            token_ids=torch.empty(0, dtype=torch.int64),
            logprobs=None,
            truncated=not response,  # a teacher gives "" for a turn that never ended
        )
        for row, (item, response) in enumerate(zip(instructions, responses, strict=True))
    ]
