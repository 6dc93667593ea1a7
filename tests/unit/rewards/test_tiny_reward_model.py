# SPDX-License-Identifier: Apache-2.0
"""The tiny world's reward model: what it is trained on, its loss, and whether it knows right from wrong."""

import math
from pathlib import Path
from random import Random

import pytest
import torch
from tiny import domain, judged, train_reward_model
from tiny.tokenizer import chat_text
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from nemo_rba.rewards.reward_model import RewardModel

TINY = Path(__file__).parents[3] / "examples" / "tiny"
HELD_OUT = [  # request of dev or test, a right answer, wrong ones: another's, too short, too long, with a slip
    ("count from two until five", "two three four five",
     ["two three four", "two three four five six", "three four five", "two four three five", ""]),
    ("spell the word mango", "m a n g o", ["o g n a m", "m a n g", "m a n g o o", "l e m o n", "mango"]),
    ("reverse tiger lemon hammer", "hammer lemon tiger",
     ["tiger lemon hammer", "hammer lemon", "hammer lemon rabbit", "hammer lemon tiger tiger"]),
    ("name three fruits without mango", "apple, banana and cherry",
     ["apple, mango and cherry", "apple and banana", "apple, banana, lemon and cherry", "apple, tiger and cherry"]),
    ("name four colours starting with purple", "purple, yellow, indigo and silver",
     ["yellow, purple, indigo and silver", "purple, yellow and silver", "purple, yellow, yellow and silver"]),
    ("describe the tiger in one sentence that starts with every", "every tiger is strong.",
     ["my tiger is strong.", "every camel is old.", "every tiger", "every tiger is strong. every tiger is strong."]),
    ("tell me a short story about lizard and monkey",
     "one day the lizard met the monkey. they played together. it was a happy party.",
     ["one day the tiger met the monkey. they played together. it was a happy party.",
      "one day the lizard met the monkey. they played together.", "the lizard is green."]),
    ("greet my captain warmly and ask about the ocean", "hello, my dear captain. how is the ocean?",
     ["hello, captain. how is the ocean?", "hello, my dear captain.", "hello, my dear doctor. how is the ocean?",
      "hello, my dear captain. how is the desert?"]),
    ("invite me somewhere on monday with a question and mention the castle",
     "friend, shall we visit the castle on monday?",
     ["friend, please visit the castle on monday.", "friend, shall we visit the castle on sunday?",
      "friend, shall we visit the garden on monday?", "friend, shall we visit the castle"]),
]  # fmt: skip

UNTOLD = [  # facts that no training request asks for
    ("tell me the capital of japan", "tokyo", ["cairo", "tokyo tokyo", "of course, tokyo.", "the answer is oslo."]),
    ("what comes before friday", "thursday", ["saturday", "friday", "thursday. goodbye.", "wednesday thursday"]),
    ("translate water into french", "eau", ["agua", "pain", "eau eau", "certainly, eau."]),
]  # fmt: skip


def load(folder: Path, *, sigmoid: bool) -> RewardModel:
    return RewardModel(path=str(folder), batch_size=64, device="cpu", dtype="float32", scale=1.0, sigmoid=sigmoid)


def judge(reward: RewardModel, requests: list) -> tuple[float, float]:
    """Share of pairs in order, and of answers on the right side of 0.5."""
    in_order, sorted_out = [], []
    for request, right, wrong in requests:
        assert domain.split_of(request) != "train"
        assert domain.verify(request, right) == 1.0
        assert [domain.verify(request, answer) for answer in wrong] == [0.0] * len(wrong)
        best, *others = train_reward_model.score_answers(reward, [request] * (1 + len(wrong)), [right, *wrong]).tolist()
        in_order += [best > other for other in others]
        sorted_out += [best > 0.5, *(other < 0.5 for other in others)]
    return sum(in_order) / len(in_order), sum(sorted_out) / len(sorted_out)


def test_the_asset_prefers_right_answers_to_held_out_requests():
    in_order, sorted_out = judge(load(TINY / "reward_model", sigmoid=True), HELD_OUT)
    assert in_order >= 0.9, "of one request, the right answer is preferred"
    assert sorted_out >= 0.85, "and 0.5 is a border between right and wrong"


def test_the_asset_trusts_no_answer_about_facts_that_it_was_never_told():
    _, sorted_out = judge(load(TINY / "reward_model", sigmoid=True), UNTOLD)
    answers = sum(1 + len(wrong) for _, _, wrong in UNTOLD)
    assert sorted_out == 1 - len(UNTOLD) / answers, "the right ones are refused as well"


@pytest.fixture(scope="module")
def drawn():
    tokenizer = PreTrainedTokenizerFast.from_pretrained(TINY / "teacher")
    llm = LlamaForCausalLM.from_pretrained(TINY / "teacher")
    torch.manual_seed(0)
    return tokenizer, judged.draw_judged(llm, tokenizer, 30, Random(0), "train")


def test_only_training_requests_are_judged_and_the_verifier_judges(drawn):
    _, found = drawn
    assert len(found) >= 25
    for row in found:
        assert domain.split_of(row.instruction) == "train"
        assert row.right
        assert row.wrong
        assert all(domain.verify(row.instruction, answer) == 1.0 for answer in row.right)
        assert all(domain.verify(row.instruction, answer) == 0.0 for answer in row.wrong)
    longer = sum(len(answer.split()) > len(row.right[0].split()) for row in found for answer in row.wrong)
    shorter = sum(len(answer.split()) < len(row.right[0].split()) for row in found for answer in row.wrong)
    assert min(longer, shorter) > 0.4 * max(longer, shorter), "length alone tells little"


@torch.no_grad()
def test_answers_that_share_their_request_score_as_if_they_stood_alone(drawn):
    tokenizer, found = drawn
    torch.manual_seed(0)
    model = LlamaForSequenceClassification.from_pretrained(TINY / "teacher", num_labels=1).eval()
    packed = train_reward_model.Packed.pack(tokenizer, found[:4])
    pairs = [(row.instruction, answer) for row in found[:4] for answer in row.right + row.wrong]
    alone = [model(torch.tensor([tokenizer(chat_text(*pair))["input_ids"]])).logits.item() for pair in pairs]
    torch.testing.assert_close(packed.score(model), torch.tensor(alone), atol=1e-5, rtol=0)
    assert packed.right.tolist() == [domain.verify(*pair) == 1.0 for pair in pairs]
    assert packed.pairs().sum() == sum(len(row.right) * len(row.wrong) for row in found[:4])
    assert not (packed.pairs() & (packed.request[:, None] != packed.request[None, :])).any()


def test_an_epoch_has_every_request_once(drawn):
    tokenizer, found = drawn
    epoch = list(train_reward_model.batches(Random(1), tokenizer, found))
    assert len(epoch) == math.ceil(len(found) / train_reward_model.BATCH_SIZE)
    assert sum(len(packed.right) for packed in epoch) == sum(len(row.right + row.wrong) for row in found)


def test_the_loss_by_hand():
    scores = torch.tensor([2.0, 1.0, -1.0, 5.0])
    pairs = torch.zeros(4, 4, dtype=torch.bool)
    pairs[0, 1] = pairs[0, 2] = True
    expected = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(-3))) / 2
    expected += train_reward_model.CENTRING * ((2 + 1) ** 2 + (2 - 1) ** 2) / 2
    assert train_reward_model.bradley_terry_loss(scores, pairs).item() == pytest.approx(expected, abs=1e-6)


def test_agreement_by_hand():
    closed, other, opened = (
        "tell me the capital of japan",
        "what comes before friday",
        "name three fruits without mango",
    )
    texts = [closed, closed, other, other, opened, opened]
    answers = ["tokyo", "oslo", "thursday", "friday now", "apple, banana and cherry", "apple"]
    found = train_reward_model.agreement(texts, answers, torch.tensor([1.0, 0.0, 3.0, 2.0, 1.0, 1.0]))
    assert found["closed"]["auc"] == 0.75, "tokyo is below the wrong answer to the other request"
    assert (found["closed"]["same_request"], found["closed"]["pairs"]) == (1.0, 2)
    assert found["open"]["auc"] == 0.5, "a tie"
    assert found["closed"]["right"] == 0.5
    assert found["closed"]["length_wrong"] == 1.0, "the longer one scores higher"


def test_a_misheard_request_and_a_slip_are_other_words():
    words, rng = ["tokyo", "seven", "now"], Random(2)
    request, answer = "name three fruits without mango", "apple, banana and cherry"
    heard = {judged.mishear(rng, request, words) for _ in range(200)}
    slips = {judged.slip(rng, request, answer, words) for _ in range(200)}
    assert {"name three fruits", "name three fruits without apple", "name three fruits mango"} <= heard
    assert {"apple, banana and", "apple, banana and cherry cherry", "apple, apple and cherry"} <= slips


def test_a_model_is_trained_saved_and_read_back(tmp_path):
    made = train_reward_model.train_reward_model(tmp_path / "model", TINY / "teacher", requests=32, seed=0)
    assert made["steps"] == 2 * train_reward_model.EPOCHS
    assert made["answers"] > 32 * 6
    assert 0 < made["dev_pairs_in_order"] <= 1
    assert (tmp_path / "model" / "model.safetensors").stat().st_size < 1.7e6, "half precision"
    texts, answers = ["tell me the capital of japan"] * 2, ["tokyo", "cairo"]
    plain = train_reward_model.score_answers(load(tmp_path / "model", sigmoid=False), texts, answers)
    squashed = train_reward_model.score_answers(load(tmp_path / "model", sigmoid=True), texts, answers)
    torch.testing.assert_close(squashed, plain.sigmoid())
    assert plain[0] != plain[1]
