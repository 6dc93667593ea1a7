# SPDX-License-Identifier: Apache-2.0
"""A tiny random reward model, saved and loaded, against a plain forward pass."""

import pytest
import torch

from nemo_rba.rewards.reward_model import RewardModel
from nemo_rba.types import Instruction, Rollout

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
WORDS = ["<pad>", "<user>", "<assistant>", "<end>", "say", "hi", "hello", "there", "please", "now"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("reward_model")
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<pad>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=24, num_labels=1, pad_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder


def load(folder, **changes) -> RewardModel:
    settings = {"batch_size": 4, "device": "cpu", "dtype": "float32", "scale": 1.0, "sigmoid": False}
    return RewardModel(path=str(folder), **(settings | changes))


def rollout(text: str, response: str, context: str = "") -> Rollout:
    return Rollout(
        prompt_index=0, instruction=Instruction(id="i", text=text, response="", task="t", context=context),
        response=response, token_ids=torch.tensor([1]), logprobs=None, truncated=False,
    )  # fmt: skip


ANSWERS = [
    rollout("say hi", "hi"), rollout("say hello there please", "hello there now hello"), rollout("say hi", "hi"),
    rollout("hi", "", context="say please"),
]  # fmt: skip


@torch.no_grad()
def test_scores_are_those_of_a_plain_pass_whatever_the_batch(folder):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    texts = [
        "<user> say hi <end> <assistant> hi <end>",
        "<user> say hello there please <end> <assistant> hello there now hello <end>",
        "<user> say hi <end> <assistant> hi <end>",
        "<user> say please hi <end> <assistant> <end>",
    ]
    expected = [float(model(torch.tensor([[WORDS.index(w) for w in text.split()]])).logits) for text in texts]
    for batch_size in (1, 2, 4):
        scores = load(folder, batch_size=batch_size)(ANSWERS)
        torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-5, rtol=0)
    assert len({round(score, 3) for score in expected}) == 3
    squashed = load(folder, scale=2.0, sigmoid=True)(ANSWERS)
    torch.testing.assert_close(squashed, (torch.tensor(expected) / 2).sigmoid(), atol=1e-5, rtol=0)


def test_equal_answers_are_read_once(folder):
    reward, seen = load(folder), []
    plain = reward._score
    reward._score = lambda rows: seen.extend(rows) or plain(rows)
    reward(ANSWERS)
    assert len(seen) == 3


def test_what_is_no_reward_model_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        load(tmp_path)
    with pytest.raises(ValueError, match="scale=0"):
        load(folder, scale=0)
    with pytest.raises(ValueError, match=r"has 2\d tokens.*reads 24; lower rollouts.max_new_tokens"):
        load(folder)([rollout("say hi", "hi " * 20)])
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, ignore_mismatched_sizes=True)
    model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has 2 labels"):
        load(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        load(tmp_path)
