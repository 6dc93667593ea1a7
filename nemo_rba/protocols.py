# SPDX-License-Identifier: Apache-2.0
"""The joints: what each room asks of the next. Anything with these methods fits; nothing inherits from them."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import Tensor

from nemo_rba.types import Instruction, Rollout, RolloutBatch, SamplingParams, SpeechBatch

Metrics = dict[str, float]


class Teacher(Protocol):
    """An aligned LLM that reads text."""

    def render(self, messages: Sequence[dict[str, str]], *, open_turn: str) -> str:
        """Chat text of ``messages`` with the turn of role ``open_turn`` left open.

        ``render([], open_turn="user")`` is the pre-query template of Magpie (arXiv 2406.08464).
        """

    def generate(self, prompts: Sequence[str], params: SamplingParams) -> list[str]:
        """One completion per rendered prompt, cut before the end of the turn; "" if the turn never ended."""


class LikelihoodTeacher(Teacher, Protocol):
    """A teacher that also judges: its own probability of somebody else's words. Hosted teachers need not offer this."""

    def vocabulary(self) -> dict[str, int]:
        """Token string -> id. Dense judgement needs a student with the same ids; see ``check_same_vocabulary``."""

    def logprobs(self, prompts: Sequence[str], responses: Sequence[Tensor]) -> list[Tensor]:
        """Log-probability of every token of ``responses[i]`` (T_i,) after the rendered ``prompts[i]``: (T_i,) each."""

    def topk_logprobs(self, prompts: Sequence[str], responses: Sequence[Tensor], k: int) -> list[tuple[Tensor, Tensor]]:
        """The k likeliest tokens before each token of ``responses[i]``: ids (T_i, K) and log-probabilities (T_i, K)."""


class TTS(Protocol):
    """A synthesizer with named speakers.

    It may also offer ``languages`` and ``voices``, speaker -> language and speaker -> voice (one voice may be several
    speakers); without them nothing is told of languages, and a speaker is a voice.
    """

    sampling_rate: int
    speakers: Sequence[str]

    def synthesize(self, texts: Sequence[str], speakers: Sequence[str]) -> list[Tensor]:
        """One mono float32 waveform (A_i,) in [-1, 1] per text."""


class PromptEncoder(Protocol):
    """Turns an instruction into the token ids a SpeechLM expects around the speech."""

    pad_id: int

    def encode_prompt(self, instruction: Instruction) -> list[int]:
        """Prompt ids with the audio locator token once, the assistant's turn left open."""

    def encode_typed(self, instruction: Instruction) -> list[int]:
        """The same with the words, typed, where the locator would be."""

    def encode_response(self, response: str) -> list[int]:
        """Response ids with the end-of-turn token."""


class Policy(Protocol):
    """The student. Collective: every rank of a model-parallel group calls it with, and gets, the same values."""

    def generate(
        self, batch: SpeechBatch, *, group_size: int, params: SamplingParams, rows: Tensor | None = None
    ) -> list[Rollout]:
        """``group_size`` answers per prompt, ordered by prompt, with their log-probabilities; to some rows if given."""

    def logprobs(self, batch: RolloutBatch, *, reference: bool = False) -> Tensor:
        """Teacher-forced log-probabilities (N, T), 0 where masked; of the start model when ``reference``."""

    def agreement(self, heard: RolloutBatch, read: RolloutBatch, layers: Sequence[int]) -> Tensor:
        """How alike hidden states are: today's, the prompt heard, and the start model's, the prompt read: (N,).

        The mean over ``layers`` (from 1; [] for all) and over an answer's tokens of their cosine, from -1 to 1.
        ``read`` holds the answers of ``heard``, its prompts typed.
        """

    def forward_backward(
        self, batch: RolloutBatch, objective: "Objective", *, read: SpeechBatch | None = None,
        layers: Sequence[int] = (), weight: float = 0.0,
    ) -> Metrics:  # fmt: skip
        """Accumulate the objective's gradient over microbatches; returns the objective's metrics, averaged.

        Given ``read``, the prompts of ``batch`` typed, also that of ``weight`` times the mean over the tokens of the
        global batch and over ``layers`` of 1 - the cosine of ``agreement``, with respect to today's states.
        """

    def encode_response(self, response: str) -> list[int]:
        """An answer's token ids, with the end of turn."""
        ...

    def step(self, learning_rate: float) -> Metrics:
        """Clip, apply and clear the gradient; returns ``grad_norm`` and ``lr``."""

    def parameters(self) -> Iterable[Tensor]:
        """What ``step`` changes."""

    def sharded_state_dict(self, *, is_loading: bool) -> dict:
        """Weights and optimizer state on this rank, each tensor with its place in the whole (megatron-core)."""

    def load_sharded_state_dict(self, state_dict: dict) -> None:
        """Continue from ``sharded_state_dict()``, filled from a checkpoint of any layout."""


class RolloutSource(Protocol):
    """Where answers come from: the policy (on-policy) or the teacher (distillation). The hinge of the design."""

    group_size: int  # answers per prompt it gives
    on_policy: bool  # the answers are the policy's own; it then has ``max_new_tokens``, the longest one
    num_unfinished: int  # answers of its last call that were to be new and did not come to an end: others stand in
    max_resamples: int  # how often prompts whose answers are all equally good are asked again; 0 for never

    def __call__(self, policy: Policy, batch: SpeechBatch, seed: int, rows: Tensor | None = None) -> list[Rollout]:
        """Rollouts ordered by prompt, the same number for each; to some rows of the batch where given."""


class RewardFunction(Protocol):
    """How good is an answer."""

    def __call__(self, rollouts: Sequence[Rollout]) -> Tensor:
        """(N,) finite float32, higher is better."""


class AdvantageEstimator(Protocol):
    """How much better than its siblings.

    With an attribute ``needs_parts`` = True it is also given ``parts``, the rewards by name; with ``needs_greedy``,
    ``greedy``, the reward (B,) of the greedy answer to each prompt; with ``needs_own``, ``own``, which answers are the
    student's (N,). See ``algorithms.advantage.estimate``.
    """

    min_group_size: int  # answers per prompt it needs

    def __call__(self, rewards: Tensor, prompt_index: Tensor) -> Tensor:
        """rewards (N,), prompt_index (N,) -> advantages (N,)."""


class Objective(Protocol):
    """A loss that sees log-probabilities, never a model.

    The ``needs_*`` fields say what the loop must put in the batch. With ``teacher_topk`` = K > 0 the loss gets the
    student's log-probabilities at the teacher's K candidates, (N, T, K), else of the tokens, (N, T); one that has
    ``needs_sampled`` set gets the token itself as one more, last candidate, (N, T, K + 1).
    ``needs_teacher`` asks for the teacher's log-probability of the tokens and has nothing to do with that.
    """

    needs_advantages: bool
    needs_old: bool
    needs_reference: bool
    needs_teacher: bool
    teacher_topk: int

    def __call__(self, logprobs: Tensor, batch: RolloutBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss (a sum over this microbatch divided by the *global* count), and per-batch metrics.

        Each metric is likewise a sum over the microbatch divided by the global count, so that adding microbatches
        gives the batch's mean.
        """


class EvalTask(Protocol):
    """A held-out set with its own measure."""

    name: str

    def batches(self) -> Iterable[SpeechBatch]:
        """The whole set, once, in a fixed order."""

    def score(self, rollouts: Sequence[Rollout]) -> Metrics:
        """Corpus-level scores in percent."""
