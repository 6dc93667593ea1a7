# SPDX-License-Identifier: Apache-2.0
"""The nouns. Every room of the package speaks in these and in nothing else.

Letters used in every shape:

    B  spoken prompts          P  prompt tokens      A  audio samples      H  hidden size
    G  rollouts per prompt     T  response tokens    V  vocabulary         K  teacher candidates per token
    N  rollouts, B * G

Conventions: token ids are int64 and right padded (a room that pads left does so inside itself); masks are bool,
True = real; log-probabilities are natural-log float32 of the *untempered, untruncated* distribution, whatever
temperature or nucleus the sampler used; audio is mono float32 in [-1, 1].
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    """What a user says and how the teacher would answer. Made by synthesis, read by everyone."""

    id: str
    text: str  # the words spoken
    response: str  # the teacher's answer, or a benchmark's; "" before the teacher has answered, or where there is none
    task: str  # the family reported in tables, e.g. "arithmetic", "open"
    typed: str = ""  # how it is written, where that is not how it is spoken: "5 kg" for "five kilograms"
    aliases: tuple[str, ...] = ()  # other right answers, where the response is one of few
    context: str = ""  # typed text that stands beside the speech in the prompt, e.g. "Translate into French:"
    extra: Mapping[str, object] = field(default_factory=dict)  # what a benchmark's measure needs besides; plain JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class Utterance:
    """An instruction, spoken. Made by a TTS, written to and read from the manifest."""

    instruction: Instruction
    audio: Tensor  # (A,)
    sampling_rate: int  # Hz
    speaker: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeechBatch:
    """B spoken prompts with the teacher's answers. Made by data, read by the model and by rollout sources.

    Without audio (A = 0) they are typed prompts: the words stand in ``prompt_ids`` where the speech went.
    """

    instructions: tuple[Instruction, ...]  # B
    audio: Tensor  # (B, A)
    audio_lens: Tensor  # (B,)
    prompt_ids: Tensor  # (B, P), with the audio locator token once per row, where the speech goes; none when typed
    prompt_lens: Tensor  # (B,)
    response_ids: Tensor  # (B, T), teacher's answer with its end-of-turn token
    response_lens: Tensor  # (B,)

    def __len__(self) -> int:
        return len(self.instructions)

    @property
    def is_typed(self) -> bool:
        """Whether the words are read instead of heard."""
        return self.audio.shape[1] == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to decode. Read by teachers and policies."""

    max_new_tokens: int
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0  # nucleus; 1 = the whole distribution
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One answer to one prompt of a batch. Made by a policy or a teacher, read by rewards and evaluation."""

    prompt_index: int  # row of the SpeechBatch it answers
    instruction: Instruction
    response: str  # decoded, without special tokens
    token_ids: Tensor  # (T_i,), ends with the end-of-turn token unless truncated
    logprobs: Tensor | None  # (T_i,) under the policy that sampled it; None when no policy did
    truncated: bool  # True: max_new_tokens came before the end of the turn


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutBatch:
    """N rollouts, padded and scored: what an objective and a policy need for one optimiser step.

    ``num_loss_tokens`` and ``num_loss_rollouts`` count over the *global* batch, so any split into microbatches or
    data-parallel ranks gives the same gradient. ``prompt_index`` lets encoder and prefill run once per prompt.
    """

    prompts: SpeechBatch  # the whole batch, also where this is one minibatch of its rollouts
    prompt_index: Tensor  # (N,) rows of ``prompts``, non-decreasing, the same number of rollouts for each one present
    response_ids: Tensor  # (N, T)
    response_mask: Tensor  # (N, T)
    advantages: Tensor  # (N,) per answer or (N, T) per token
    num_loss_tokens: int
    num_loss_rollouts: int
    old_logprobs: Tensor | None = None  # (N, T) under the policy before its first update on these answers
    sampler_logprobs: Tensor | None = None  # (N, T) as the sampler gave them, where old_logprobs are the trainer's
    importance_weights: Tensor | None = None  # (N, T) of every token's loss; None = 1
    ref_logprobs: Tensor | None = None  # (N, T) under the start model
    is_own: Tensor | None = None  # (N,) bool, the student's answers: samples of its KL to the start; None = all
    teacher_logprobs: Tensor | None = None  # (N, T) under the teacher, who reads the transcript
    teacher_baseline: float = 0.0  # mean of teacher_logprobs - old_logprobs over the tokens of the global batch
    teacher_topk_ids: Tensor | None = None  # (N, T, K) the teacher's likeliest next tokens
    teacher_topk_logprobs: Tensor | None = None  # (N, T, K)

    def __len__(self) -> int:
        return len(self.response_ids)
