# SPDX-License-Identifier: Apache-2.0
"""What costs in the text stage, one order at a time, on whichever rank is free; and the rows it keeps of a batch."""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

from nemo_rba.protocols import Teacher
from nemo_rba.synthesis.augment import keyed_seed
from nemo_rba.synthesis.files import write_jsonl
from nemo_rba.synthesis.instructions import Draft, Sampler, answer
from nemo_rba.synthesis.orders import Handler, Place
from nemo_rba.synthesis.spoken_form import SpokenForm
from nemo_rba.synthesis.unanswered import Unanswered
from nemo_rba.types import Instruction, SamplingParams


class TextWork:
    """What any rank can do for a batch; results are files in ``parts``, until the batch's own is written.

    Args:
        teacher: who answers.
        sampler: where instructions come from. Those that have a response already are not answered.
        spoken_form: puts numbers and symbols into words; None speaks what was written.
        response_params: how answers are sampled; the seed is replaced by one for each batch.
        folder: where batches are kept.
        seed: with a batch's number it decides the answers of the batch.
    """

    def __init__(self, *, teacher: Teacher, sampler: Sampler, spoken_form: SpokenForm | None,
                 response_params: SamplingParams, folder: Path, seed: int):  # fmt: skip
        self._teacher, self._params, self._seed, self.folder = teacher, response_params, seed, folder
        self.sampler, self.spoken_form = sampler, spoken_form

    @property
    def handlers(self) -> dict[str, Handler]:
        """By kind of order, the one first that others wait for."""
        return {"answer": self.answer, "form": self.form, "sample": self.sample}

    def part(self, index: int, kind: str) -> Path:
        """Where the result of an order is until the batch is complete."""
        return self.folder / "parts" / f"{batch_name(index)}.{kind}.jsonl"

    def sample(self, order: dict) -> Place:
        """{index} -> the drafts of that batch."""
        rows = [{"text": draft.text} | beyond_text(draft) for draft in _drafts(self.sampler.batch(order["index"]))]
        return partial(write_jsonl, self.part(order["index"], "sample"), rows)

    def form(self, order: dict) -> Place:
        """{index, texts} -> how each is spoken, or why it cannot be."""
        rows = [{"spoken": list(spoken)} for spoken in self.spoken_form(order["texts"])]
        return partial(write_jsonl, self.part(order["index"], "form"), rows)

    def answer(self, order: dict) -> Place:
        """{index, texts, contexts, counts} -> as many answers to each as are counted."""
        params = replace(self._params, seed=keyed_seed(self._seed, f"answers/{order['index']}"))
        asked = [
            Instruction(id="", text=text, response="", task="", context=context)
            for text, context, count in zip(order["texts"], order["contexts"], order["counts"], strict=True)
            for _ in range(count)
        ]
        found = answer(self._teacher, asked, params)
        answers = ({"unanswered": a.reason} if isinstance(a, Unanswered) else a for a in found)
        rows = [{"responses": [next(answers) for _ in range(count)]} for count in order["counts"]]
        return partial(write_jsonl, self.part(order["index"], "answer"), rows)


def batch_name(index: int) -> str:
    """Of a batch's files and orders."""
    return f"batch-{index:05d}"


def _drafts(written: Iterable[str | Draft]) -> list[Draft]:
    return [Draft(text=item, reason=getattr(item, "reason", "")) if isinstance(item, str) else item for item in written]


def restored(row: dict) -> Draft:
    """The draft of a stored row."""
    draft = Draft(text=row["text"], **row.get("draft", {}))
    return replace(draft, aliases=tuple(draft.aliases))


def beyond_text(draft: Draft) -> dict:
    """What a row has of a draft besides its text."""
    found = draft.beyond_text()
    return {"draft": found} if found else {}


def response_fields(responses: list[str] | None) -> dict:
    """What a row has of the answers to an instruction; None where it was not answered."""
    if responses is None or len(responses) == 1:
        return {"response": responses and responses[0]}
    return {"responses": responses}


def stored_responses(row: dict) -> list[str] | None:
    """The answers of a stored row, the inverse of ``response_fields``."""
    if "responses" in row:
        return row["responses"]
    return None if row["response"] is None else [row["response"]]
