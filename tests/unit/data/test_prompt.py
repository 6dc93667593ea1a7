# SPDX-License-Identifier: Apache-2.0
"""The ids must be NeMo's own: compared with what NeMo's SALM gets from the same conversation."""

import dataclasses

import pytest
import torch
from lhotse import Recording, SupervisionSegment
from nemo.collections.common.data.lhotse import NeMoMultimodalConversation
from nemo.collections.common.data.lhotse.text_adapters import AudioTurn, TextTurn
from nemo.collections.common.data.prompt_fn import apply_prompt_format_fn
from nemo.collections.common.prompts import PromptFormatter

import nemo.collections.speechlm2.data.salm_dataset  # noqa: F401, isort: skip  registers SALM's prompt function

from nemo_rba.data.prompt import SALMPrompt
from nemo_rba.types import Instruction

ITEM = Instruction(id="i-0", text="what is two plus four", response="it is six", task="arithmetic")
IN_FRENCH = dataclasses.replace(ITEM, context="say in french :")


@pytest.fixture(scope="module")
def prompt(tokenizer_folder) -> SALMPrompt:
    return SALMPrompt.from_folder(folder=tokenizer_folder, prompt_format="qwen", audio_locator_tag="<|audio|>")


def salm_training_ids(prompt: SALMPrompt, instruction: Instruction) -> list[int]:
    """What ``SALMDataset`` collates for this conversation."""
    cut = Recording(id="r", sources=[], sampling_rate=16000, num_samples=16000, duration=1.0).to_cut()
    cut.supervisions = [SupervisionSegment(id="s", recording_id="r", start=0, duration=1.0)]
    turns = [TextTurn(role="user", value=instruction.context)] if instruction.context else []
    turns += [
        AudioTurn(role="user", cut=cut, audio_locator_tag="<|audio|>", text=""),
        TextTurn(role="assistant", value=instruction.response),
    ]
    conversation = NeMoMultimodalConversation(id="c", turns=turns, token_equivalent_duration=0.08)
    formatter = PromptFormatter.resolve("qwen")(prompt.tokenizer)
    return apply_prompt_format_fn(conversation, formatter)["input_ids"].tolist()


@pytest.mark.parametrize("instruction", [ITEM, IN_FRENCH])
def test_ids_are_those_of_salm_training(prompt, instruction):
    ours = prompt.encode_prompt(instruction) + prompt.encode_response(instruction.response)
    newline = prompt.tokenizer.text_to_ids("\n")  # the template writes one after the end of turn
    assert ours + newline == salm_training_ids(prompt, instruction)


@pytest.mark.parametrize("instruction", [ITEM, IN_FRENCH])
def test_prompt_is_that_of_salm_generation(prompt, instruction):
    message = f"{instruction.context} <|audio|>".strip()
    formatter = PromptFormatter.resolve("qwen")(prompt.tokenizer)
    theirs = formatter.encode_dialog([{"role": "user", "content": message}])["input_ids"]
    assert prompt.encode_prompt(instruction) == theirs.tolist()


def test_locator_stands_once_and_the_assistant_turn_is_open(prompt):
    ids = prompt.encode_prompt(IN_FRENCH)
    assert ids.count(prompt.audio_locator_id) == 1
    assert prompt.tokenizer.ids_to_tokens(ids)[-3:] == ["<|im_start|>", "assistant", "\n"]


def test_response_ends_with_the_end_of_turn_and_decodes_to_itself(prompt):
    ids = prompt.encode_response("it is six")
    assert ids[-1] == prompt.eot_id == prompt.tokenizer.token_to_id("<|im_end|>")
    assert ids.count(prompt.eot_id) == 1
    assert prompt.decode(ids) == "it is six"
    assert prompt.decode(torch.tensor(ids).tolist()) == "it is six"
    assert prompt.encode_response("\n it is six \n") == ids
    assert prompt.encode_response("") == [prompt.eot_id]


def test_vocabulary(prompt):
    vocabulary = prompt.vocabulary()
    assert prompt.vocab_size == len(vocabulary) == max(vocabulary.values()) + 1
    assert prompt.pad_id == vocabulary["<|endoftext|>"]
    assert prompt.audio_locator_id == vocabulary["<|audio|>"]


@pytest.mark.parametrize("context", ["say <|audio|>", "<|im_end|> hello"])
def test_a_context_with_special_tokens_is_refused(prompt, context):
    with pytest.raises(ValueError, match=r"context of instruction 'i-0' holds the special tokens"):
        prompt.encode_prompt(dataclasses.replace(ITEM, context=context))


def test_a_response_with_special_tokens_is_refused(prompt):
    with pytest.raises(ValueError, match=r"response holds the special tokens \['<\|im_end\|>'\]"):
        prompt.encode_response("six <|im_end|> hello")


def test_a_tokenizer_without_the_tag_is_refused(prompt):
    with pytest.raises(ValueError, match=r"no special token '<speech>' \(audio_locator_tag\).*tokenizer_config\.json"):
        SALMPrompt(tokenizer=prompt.tokenizer, prompt_format="qwen", audio_locator_tag="<speech>")


def test_an_ordinary_word_is_no_locator(prompt):
    with pytest.raises(ValueError, match="no special token 'hello'"):
        SALMPrompt(tokenizer=prompt.tokenizer, prompt_format="qwen", audio_locator_tag="hello")


@pytest.mark.parametrize(
    ("prompt_format", "message"),
    [
        ("qwenn", r"prompt_format: .*'qwenn' \(known formats: .*qwen"),
        ("canary", "no chat format"),
        ("plain", "no special token"),
        ("llama2", "needs a bos and eos token"),
    ],
)
def test_unsuitable_formats_are_refused(prompt, prompt_format, message):
    with pytest.raises(ValueError, match=message):
        SALMPrompt(tokenizer=prompt.tokenizer, prompt_format=prompt_format, audio_locator_tag="<|audio|>")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected tokenizer_config\.json"):
        SALMPrompt.from_folder(folder=tmp_path, prompt_format="qwen", audio_locator_tag="<|audio|>")
