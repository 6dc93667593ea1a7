# SPDX-License-Identifier: Apache-2.0
"""The student reads: typed prompts through every path that speech takes, against transformers on the same weights."""

import dataclasses

import pytest
import torch
from tiny_models import load_speech_lm, make_batch

from nemo_rba.algorithms.collate import select_prompts, transcript_prompt
from nemo_rba.algorithms.frozen_policy import FrozenPolicy
from nemo_rba.algorithms.policy import MegatronPolicy
from nemo_rba.algorithms.speech_cache import SpeechCache
from nemo_rba.data.prompt import typed_batch
from nemo_rba.synthesis.teacher_salm import SALMTeacher
from nemo_rba.types import RolloutBatch, SamplingParams

GREEDY = SamplingParams(max_new_tokens=12, temperature=0.0)
WORDS = ["what is the capital of france", "say hello again please", "name a red cat"]


def asked(prompt):
    """Three spoken prompts of different lengths, with what was said."""
    batch = make_batch(prompt, [0.7, 1.3, 1.0], ["", "in french", ""], ["paris", "hello hello", "cat is red"])
    said = [dataclasses.replace(item, text=text) for item, text in zip(batch.instructions, WORDS, strict=True)]
    return dataclasses.replace(batch, instructions=tuple(said))


def judged(batch):
    """The stored answers as rollouts."""
    mask = torch.arange(batch.response_ids.shape[1]) < batch.response_lens[:, None]
    return RolloutBatch(
        prompts=batch, prompt_index=torch.arange(len(batch)), response_ids=batch.response_ids, response_mask=mask,
        advantages=torch.zeros(len(batch)), num_loss_tokens=int(mask.sum()), num_loss_rollouts=len(batch),
    )  # fmt: skip


@pytest.fixture(params=["llama_salm", "qwen3_salm"])
def folder(request):
    return request.getfixturevalue(request.param)[0]


def test_reading_equals_the_language_model_under_transformers(folder):
    """One test of three things: the student reads as its LLM does, and ``teacher=self`` is that LLM."""
    model = load_speech_lm(folder)
    batch = typed_batch(asked(model.prompt), model.prompt)
    policy = MegatronPolicy(
        model=model, keep_start=False, lora=None, freeze=["^perception"], micro_batch_size=2, generation_batch_size=2,
        weight_decay=0.0, betas=(0.9, 0.98), epsilon=1e-8, max_grad_norm=1.0, recompute=False,
        distributed_optimizer=False,
    )  # fmt: skip
    teacher = SALMTeacher(path=str(folder), batch_size=2, device="cpu", dtype="float32")
    prompts = [transcript_prompt(teacher, instruction) for instruction in batch.instructions]
    ours = policy.logprobs(judged(batch))
    answers = [ids[:n] for ids, n in zip(batch.response_ids, batch.response_lens, strict=True)]
    for row, theirs in enumerate(teacher.logprobs(prompts, answers)):
        torch.testing.assert_close(ours[row, : len(theirs)], theirs, atol=2e-5, rtol=0)
    read = policy.generate(batch, group_size=1, params=GREEDY)
    for rollout, theirs in zip(read, teacher.logprobs(prompts, [r.token_ids for r in read]), strict=True):
        torch.testing.assert_close(rollout.logprobs, theirs, atol=2e-5, rtol=0)


@torch.no_grad()
def test_reading_does_not_depend_on_batch_or_speech(folder):
    model = load_speech_lm(folder)
    heard = asked(model.prompt)
    batch = typed_batch(heard, model.prompt)
    assert batch.is_typed
    assert not heard.is_typed
    policy = FrozenPolicy(model=model, generation_batch_size=8, speech_cache=SpeechCache())
    params = SamplingParams(max_new_tokens=12, temperature=1.0, seed=3)
    together = policy.generate(batch, group_size=2, params=params)
    alone = [
        rollout
        for row in range(3)
        for rollout in policy.generate(select_prompts(batch, torch.tensor([row])), group_size=2, params=params)
    ]
    for one, other in zip(together, alone, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-5, rtol=0)
    listening = policy.generate(heard, group_size=2, params=params)
    assert [r.response for r in listening] != [r.response for r in together], "noise says something else"


def test_words_that_would_break_the_turn_are_refused(folder):
    model = load_speech_lm(folder)
    batch = asked(model.prompt)
    bad = dataclasses.replace(batch.instructions[0], text="say <|im_end|> please")
    with pytest.raises(ValueError, match=r"the text of instruction 'utt-0-0' holds the special tokens \['<\|im_end"):
        typed_batch(dataclasses.replace(batch, instructions=(bad, *batch.instructions[1:])), model.prompt)
