# SPDX-License-Identifier: Apache-2.0
"""What users might say: instructions sampled from an aligned LLM's empty user turn (Magpie, arXiv 2406.08464).

Given nothing but the opening of a user's turn, an instruction-tuned LLM writes a user's message. Batches are numbered
and each has its own seed, so that sampling can go on at any batch after an interruption, and on any rank.

Other samplers: ``instructions_domains.py`` (Magpie after a system turn), ``instructions_seeded.py`` (by persona and
topic, or after examples), ``instructions_tasks.py`` (questions with answers, sentences with translations).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Protocol

from nemo_rba.functional import typed, user_prompt
from nemo_rba.protocols import Teacher
from nemo_rba.synthesis.instructions_plan import Requests, Temperature
from nemo_rba.synthesis.unanswered import Unanswered
from nemo_rba.types import Instruction, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What a sampler wrote, where that is more than a text: an instruction that has not passed the filters."""

    text: str
    response: str = ""  # where the sampler has one, the teacher is not asked for another
    task: str = ""  # "" leaves it to ``task_of``
    context: str | None = None  # None = the context that all have
    aliases: tuple[str, ...] = ()
    extra: Mapping[str, object] = field(default_factory=dict)
    reason: str = ""  # why it cannot be used, e.g. because it could not be read

    def beyond_text(self) -> dict:
        """The fields besides ``text`` that are set, as plain JSON; ``Draft(text=..., **fields)`` restores it."""
        plain = Draft(text=self.text)
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in found.items() if value != getattr(plain, name)}


class Sampler(Protocol):
    """Where instructions come from.

    A sampler that learns from what became of its batches also offers ``learn(index, kept)`` with the texts kept, by
    split. It is called for every batch, also for those that are read again, in order, once all that are sampled at the
    same time have been answered. It samples on the first rank only.
    """

    def batch(self, index: int) -> Iterable[str | Draft]:
        """What batch ``index`` holds, always the same."""


class MagpieSampler:
    """Seeded batches of instruction texts.

    Args:
        teacher: whose empty user turn is continued.
        batch_size: instructions per batch.
        temperature, top_p, max_new_tokens: how to sample; an instruction that does not end in time comes out as "".
        seed: with the batch's number it decides the batch.

    Raises:
        ValueError: a batch size below 1, greedy decoding (all instructions would be the same), or a teacher whose
            template cannot be left open in the user's turn; later, a teacher whose tokens the prompt alone fills.
    """

    def __init__(self, *, teacher: Teacher, batch_size: int, temperature: Temperature, top_p: float,
                 max_new_tokens: int, seed: int):  # fmt: skip
        self._requests = Requests(teacher=teacher, batch_size=batch_size, temperature=temperature, top_p=top_p,
                                  max_new_tokens=max_new_tokens, seed=seed)  # fmt: skip
        self._pre_query = teacher.render([], open_turn="user")

    def batch(self, index: int) -> list[str]:
        """The texts of batch ``index``, always the same ones; "" where the user's turn never ended."""
        texts = self._requests.complete([self._pre_query] * self._requests.batch_size, index)
        check_answered(texts)
        return texts


class PlainMagpieSampler(MagpieSampler):
    """``MagpieSampler`` whose instructions do not open with markup, as Magpie's authors sample theirs.

    Args:
        suppressed_openings: tokens that no instruction begins with, e.g. ``#`` and ``**``; [] for any beginning.
        teacher, batch_size, temperature, top_p, max_new_tokens, seed: as for ``MagpieSampler``.

    Raises:
        ValueError: as ``MagpieSampler``, or see ``without_openings``.
    """

    def __init__(self, *, teacher: Teacher, suppressed_openings: Sequence[str], batch_size: int,
                 temperature: Temperature, top_p: float, max_new_tokens: int, seed: int):  # fmt: skip
        super().__init__(teacher=without_openings(teacher, suppressed_openings), batch_size=batch_size,
                         temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed)  # fmt: skip


def without_openings(teacher: Teacher, openings: Sequence[str]) -> Teacher:
    """The teacher, but nothing that it writes begins with a token that is one of ``openings``.

    Raises:
        ValueError: an opening that is blank, or no token of the teacher, or a teacher that cannot, as a server does
            not say which ids its tokens have.
    """
    if not openings:
        return teacher
    if isinstance(openings, str) or any(not opening or opening != opening.strip() for opening in openings):
        raise ValueError(f"sampler.suppressed_openings is {openings!r}; expected a list of texts without blanks around")
    if not hasattr(teacher, "without_openings"):
        raise ValueError(
            f"sampler.suppressed_openings is {list(openings)}, but {type(teacher).__name__} cannot keep a token from "
            "being written (a server does not say which ids its tokens have); give [], and add "
            "nemo_rba.synthesis.filters_content.MarkupFilter to synthesis.instruction_filters"
        )
    return teacher.without_openings(openings)


def check_answered(texts: Sequence[str]) -> None:
    """Raise ValueError if the teacher did not go on from an opened user's turn: all its prompts are alike."""
    refused = next((text for text in texts if isinstance(text, Unanswered)), None)
    if refused is not None:
        raise ValueError(f"the teacher cannot write instructions, as {refused.reason}; lower sampler.max_new_tokens, "
                         "shorten the system turn, or choose another teacher")  # fmt: skip


def answer(teacher: Teacher, instructions: Sequence[Instruction], params: SamplingParams) -> list[str]:
    """The teacher's answer to each, as one types it; "" where it did not end within ``params.max_new_tokens``.

    Where it did not answer at all the "" is an ``Unanswered`` and has a reason.
    """
    if not instructions:
        return []
    return teacher.generate([user_prompt(teacher, typed(instruction)) for instruction in instructions], params)
