# SPDX-License-Identifier: Apache-2.0
"""The words around the speech: the token ids a NeMo SALM sees, from NeMo's own tokenizer and prompt formatter.

A SALM conversation is a user turn in which one locator token stands where the speech goes, then the assistant's turn:

    <|im_start|>user\\n{context} <|audio|><|im_end|>\\n<|im_start|>assistant\\n{response}<|im_end|>\\n      (qwen)
    |------------------------ prompt ----------------------------------------||------ response -----|

NeMo's training loss also covers the assistant's opening tags and what the template writes after the end of turn;
here the tags belong to the prompt (a policy is never asked to sample them) and a response ends with the end of turn,
where sampling stops. Otherwise the ids are those of ``nemo/collections/speechlm2/data/salm_dataset.py``.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from nemo.collections.common.prompts import PromptFormatter
from nemo.collections.common.tokenizers import AutoTokenizer

from nemo_rba.functional import pad_sequences, typed
from nemo_rba.protocols import PromptEncoder
from nemo_rba.types import Instruction, SpeechBatch

_MESSAGE = "message"  # the one slot of NeMo's user and assistant turns
_EOS_SLOT = "|eos|"  # how NeMo's templates spell "the tokenizer's end-of-sequence id"


class SALMPrompt:
    """``PromptEncoder`` of NeMo's SALM models.

    Args:
        tokenizer: NeMo tokenizer over a Hugging Face folder; ``SALMPrompt.from_folder`` makes one.
        prompt_format: name of a NeMo prompt formatter, e.g. "qwen"; the SALM's own ``prompt_format``.
        audio_locator_tag: the special token that marks the speech; the SALM's own ``audio_locator_tag``.

    Raises:
        ValueError: the tokenizer lacks the tag, or the format is unknown or has no end-of-turn token.
    """

    def __init__(self, *, tokenizer: AutoTokenizer, prompt_format: str, audio_locator_tag: str):
        self.tokenizer = tokenizer
        self.prompt_format = prompt_format
        self.audio_locator_tag = audio_locator_tag
        self._special_tokens = tuple(tokenizer.tokenizer.all_special_tokens)
        self.audio_locator_id = self._locator_id()
        self._formatter = self._make_formatter()
        self._opening = self._opening_ids()
        self.eot_id = self._end_of_turn_id()
        # Lengths, not pad ids, say what is real, so a tokenizer without a pad token (Llama 3) needs none.
        self.pad_id: int = self.eot_id if tokenizer.pad_id is None else tokenizer.pad_id

    @classmethod
    def from_folder(cls, *, folder: str | Path, prompt_format: str, audio_locator_tag: str) -> "SALMPrompt":
        """Read a Hugging Face tokenizer folder. Never runs code found in it.

        Raises:
            ValueError: the folder holds no tokenizer, or as for the class.
        """
        if not (Path(folder) / "tokenizer_config.json").is_file():
            raise ValueError(
                f"no tokenizer in '{folder}': expected tokenizer_config.json and tokenizer.json there; "
                "point the tokenizer folder of the model's config at a Hugging Face checkpoint"
            )
        tokenizer = AutoTokenizer(str(folder), use_fast=True, trust_remote_code=False)
        return cls(tokenizer=tokenizer, prompt_format=prompt_format, audio_locator_tag=audio_locator_tag)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, special ones included; the model's embedding may be padded beyond it."""
        return self.tokenizer.vocab_size

    def vocabulary(self) -> dict[str, int]:
        """Token string -> id, to compare with a teacher's."""
        return self.tokenizer.tokenizer.get_vocab()

    def encode_prompt(self, instruction: Instruction) -> list[int]:
        """Ids of the user turn, ``context`` then the locator, with the assistant's turn open.

        Raises:
            ValueError: ``context`` holds a special token, so the turn would break or the speech would be put twice.
        """
        self._refuse_special_tokens(instruction.context, f"the context of instruction '{instruction.id}'")
        message = f"{instruction.context} {self.audio_locator_tag}" if instruction.context else self.audio_locator_tag
        ids = self._formatter.encode_dialog([_turn("user", message)])["input_ids"].tolist()
        if ids.count(self.audio_locator_id) != 1:
            raise ValueError(
                f"the prompt of instruction '{instruction.id}' holds {ids.count(self.audio_locator_id)} audio locators "
                f"'{self.audio_locator_tag}', expected 1; its context is {instruction.context!r}"
            )
        return ids

    def encode_typed(self, instruction: Instruction) -> list[int]:
        """Ids of the user turn with the words typed where ``encode_prompt`` has the locator.

        Raises:
            ValueError: the words or the ``context`` hold a special token.
        """
        message = typed(instruction)
        self._refuse_special_tokens(message, f"the text of instruction '{instruction.id}'")
        return self._formatter.encode_dialog([_turn("user", message)])["input_ids"].tolist()

    def encode_response(self, response: str) -> list[int]:
        """Ids of the answer, ending with the end of turn. White space around the answer is dropped.

        A leading newline would melt into the template's own in most BPE vocabularies, giving ids that no policy can
        sample after the prompt.

        Raises:
            ValueError: the answer holds a special token.
        """
        self._refuse_special_tokens(response, "the response")
        turns = [_turn("user", self.audio_locator_tag), _turn(self._formatter.OUTPUT_ROLE, response.strip())]
        ids = self._formatter.encode_dialog(turns)["answer_ids"].tolist()
        if ids[: len(self._opening)] != self._opening:
            raise ValueError(
                f"response {response[:60]!r} changes the ids of the assistant's opening tags from {self._opening} to "
                f"{ids[: len(self._opening)]}: prompt_format '{self.prompt_format}' does not suit this tokenizer"
            )
        body = ids[len(self._opening) :]
        return body[: body.index(self.eot_id) + 1]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens left out."""
        return self.tokenizer.ids_to_text(list(ids), remove_special_tokens=True)

    def _locator_id(self) -> int:
        tag = self.audio_locator_tag
        if tag not in self.vocabulary() or tag not in self._special_tokens:
            raise ValueError(
                f"the tokenizer has no special token '{tag}' (audio_locator_tag); its special tokens are "
                f"{list(self._special_tokens)}. Name one of them, or add '{tag}' to additional_special_tokens in "
                "tokenizer_config.json and save the tokenizer again"
            )
        return self.tokenizer.token_to_id(tag)

    def _make_formatter(self) -> PromptFormatter:
        try:
            formatter = PromptFormatter.resolve(self.prompt_format)(self.tokenizer)
        except RuntimeError as error:  # lists the formats NeMo knows
            raise ValueError(f"prompt_format: {error}") from error
        for role in ("user", formatter.OUTPUT_ROLE):
            slots = list(formatter.get_slots(role)) if role in formatter.get_roles() else None
            if slots != [_MESSAGE]:
                raise ValueError(
                    f"prompt_format '{self.prompt_format}' is no chat format: role '{role}' has the slots {slots}, "
                    f"expected ['{_MESSAGE}']; use the prompt_format of the SALM's config.json, e.g. 'qwen'"
                )
        try:
            formatter.encode_dialog([_turn("user", "a"), _turn(formatter.OUTPUT_ROLE, "b")])
        except TypeError as error:  # NeMo puts None where the format asks for a bos or eos id
            raise ValueError(
                f"prompt_format '{self.prompt_format}' needs a bos and eos token, the tokenizer has bos "
                f"{self.tokenizer.bos_id}, eos {self.tokenizer.eos_id}; name them in tokenizer_config.json"
            ) from error
        return formatter

    def _opening_ids(self) -> list[int]:
        """Ids that open the assistant's turn; [] in formats without opening tags."""
        prefix = self._formatter.INFERENCE_PREFIX
        return [] if prefix is None else self.tokenizer.text_to_ids(prefix)

    def _end_of_turn_id(self) -> int:
        closing = self._formatter.get_template(self._formatter.OUTPUT_ROLE).split(f"|{_MESSAGE}|")[1].strip()
        if closing == _EOS_SLOT:
            return self.tokenizer.eos_id
        ids = self.tokenizer.text_to_ids(closing)
        if len(ids) != 1 or closing not in self._special_tokens:
            raise ValueError(
                f"prompt_format '{self.prompt_format}' ends the assistant's turn with {closing!r}, which is no special "
                f"token of this tokenizer (ids {ids}); its special tokens are {list(self._special_tokens)}"
            )
        return ids[0]

    def _refuse_special_tokens(self, text: str, what: str) -> None:
        found = [token for token in self._special_tokens if token in text]
        if found:
            raise ValueError(f"{what} holds the special tokens {found}: {text[:80]!r}; remove them from the manifest")


def typed_batch(batch: SpeechBatch, prompt: PromptEncoder) -> SpeechBatch:
    """The same prompts to be read instead of heard, for the same model."""
    rows = [torch.tensor(prompt.encode_typed(instruction)) for instruction in batch.instructions]
    ids, mask = pad_sequences(rows, pad_value=prompt.pad_id)
    nothing = batch.audio.new_zeros(len(batch), 0)
    return replace(
        batch, audio=nothing, audio_lens=torch.zeros_like(batch.audio_lens), prompt_ids=ids, prompt_lens=mask.sum(1)
    )


def _turn(role: str, message: str) -> dict:
    return {"role": role, "slots": {_MESSAGE: message}}
