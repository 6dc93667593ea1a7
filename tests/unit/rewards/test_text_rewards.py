# SPDX-License-Identifier: Apache-2.0
import pytest
import sacrebleu
import torch

from nemo_rba.rewards.text import (
    AnswerMatch,
    Bleu,
    ChrF,
    ExactMatch,
    LengthPenalty,
    OverlongPenalty,
    RougeL,
    TruncationPenalty,
    VerifierReward,
    WordAccuracy,
    normalize,
)
from nemo_rba.types import Instruction, Rollout


def rollout(
    response: str, *, answer: str = "The cat sat.", aliases: tuple = (), tokens: int = 1, truncated: bool = False
) -> Rollout:
    instruction = Instruction(id="i1", text="where did the cat sit", response=answer, task="open", aliases=aliases)
    return Rollout(
        prompt_index=0,
        instruction=instruction,
        response=response,
        token_ids=torch.ones(tokens, dtype=torch.int64),
        logprobs=None,
        truncated=truncated,
    )


def test_chrf_is_sacrebleus_in_unit_range():
    responses = ["The cat sat.", "the cat", "", "dogs"]
    scores = ChrF()([rollout(response) for response in responses])
    expected = [sacrebleu.sentence_chrf(response, ["The cat sat."]).score / 100 for response in responses]
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float32))
    assert scores[0] == 1.0
    assert scores[2] == 0.0
    assert scores.dtype == torch.float32


def test_bleu_is_sacrebleus_in_unit_range():
    answer, responses = (
        "The cat sat on the mat.",
        ["The cat sat on the mat.", "The cat sat", "", "dogs", "The cat sat on"],
    )
    scores = Bleu(tokenize="13a")([rollout(response, answer=answer) for response in responses])
    expected = [sacrebleu.sentence_bleu(response, [answer]).score / 100 for response in responses]
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float32))
    assert scores[0] == 1.0
    assert scores[2] == 0.0
    assert scores[1].item() == pytest.approx(0.2635971), "all right, and 3 words of 7: exp(1 - 7 / 3)"
    chinese = rollout("我喜欢茶", answer="我喜欢喝茶")
    assert Bleu(tokenize="13a")([chinese]).item() < 0.2 < Bleu(tokenize="zh")([chinese]).item()
    with pytest.raises(ValueError, match=r"tokenize must be one of .*got 'thai'"):
        Bleu(tokenize="thai")


def test_exact_match_forgives_form_only():
    scores = ExactMatch()([rollout(r) for r in ("the  cat, sat!", "The cat sits.", "Ｔhe cat sat")])
    assert scores.tolist() == [1.0, 0.0, 1.0]
    assert normalize("  It's_OK, no? ") == "it s ok no"


def test_an_alias_anywhere_in_the_answer_is_right():
    answers = ["It is New York.", "NYC!", "in the big apple of course", "New Yorkers", "Boston", "",
               "Boston or Rome or Paris or New York"]  # fmt: skip
    scores = AnswerMatch(max_words=6)(
        [rollout(a, answer="New York", aliases=("the Big Apple", "N.Y.C.", "nyc")) for a in answers]
    )
    assert scores.tolist() == [1, 1, 1, 0, 0, 0, 0], "the last is too long to be an answer"
    with pytest.raises(ValueError, match="max_words must be 1 or more"):
        AnswerMatch(max_words=0)


@pytest.mark.parametrize(
    ("right", "answer", "matches"),
    [
        ("the Beatles", "Beatles", 1), ("the Beatles", "It was Beatles", 1), ("Lord of the Rings", "lord of rings", 1),
        ("U.S.", "in the US", 1), ("O'Brien", "It is O’Brien.", 1), ("Obama", "Obama's", 1),
        ("1,000", "1000 of them", 1),
        ("twenty five", "it is twenty-five", 1), ("Berlin", "Berlin,Germany", 1), ("The The", "the the!", 1),
        ("Vitamin A", "It is vitamin A, I think", 1), ("Vitamin A", "It is vitamin C", 0), ("Rome", "Romeo", 0),
        ("New York", "York is new", 0), ("Paris", "", 0), ("the", "nothing", 0),
    ],
)  # fmt: skip
def test_articles_and_punctuation_do_not_count_but_words_are_whole(right, answer, matches):
    assert AnswerMatch(max_words=9)([rollout(answer, answer=right)]).tolist() == [matches]


def test_rouge_l_by_hand():
    scores = RougeL()([rollout("the big cat sat there"), rollout("sat cat the"), rollout(""), rollout("dogs")])
    torch.testing.assert_close(scores, torch.tensor([2 * 0.6 * 1 / 1.6, 1 / 3, 0.0, 0.0]))
    assert RougeL()([rollout("Кошка сидела", answer="кошка сидела.")]).tolist() == [1.0]


def test_word_accuracy_is_one_minus_the_word_error_rate():
    scores = WordAccuracy()(
        [rollout(r) for r in ("the cat sat", "The cat, sat!", "the cat", "the cat sat on it", "a b c d e f g", "")]
    )
    torch.testing.assert_close(scores, torch.tensor([1.0, 1.0, 2 / 3, 1 / 3, 0.0, 0.0]))
    assert WordAccuracy()([rollout("", answer="?!"), rollout("what", answer="?!")]).tolist() == [1.0, 0.0]


def test_overlong_penalty_by_hand():
    lengths = [(4, False), (6, False), (8, False), (9, False), (10, False), (10, True), (3, True)]
    scores = OverlongPenalty(max_tokens=10, margin=4)([rollout("x", tokens=n, truncated=cut) for n, cut in lengths])
    assert scores.tolist() == [0.0, 0.0, -0.5, -0.75, -1.0, -1.0, -1.0]
    with pytest.raises(ValueError, match=r"margin must be between 1 and max_tokens \(10\), got 11"):
        OverlongPenalty(max_tokens=10, margin=11)


@pytest.mark.parametrize("reward", [ChrF(), ExactMatch(), RougeL(), WordAccuracy(), AnswerMatch(max_words=5)])
def test_a_missing_teacher_answer_is_named(reward):
    with pytest.raises(ValueError, match=r"'i1' has response ''.*config group reward"):
        reward([rollout("anything", answer="")])


def test_verifier_is_asked_once_for_equal_answers():
    asked = []

    def verify(text: str, response: str) -> float:
        asked.append((text, response))
        return len(response) / 2

    assert VerifierReward(verify=verify)([rollout("ab"), rollout("a"), rollout("ab")]).tolist() == [1.0, 0.5, 1.0]
    assert asked == [("where did the cat sit", "ab"), ("where did the cat sit", "a")]
    with pytest.raises(ValueError, match=r"reward\.verify"):
        VerifierReward(verify="my_package.verify")


def test_penalties():
    answers = [rollout("one two"), rollout("one two three"), rollout("a b c d e f"), rollout("")]
    assert LengthPenalty(max_words=2)(answers).tolist() == [0.0, -0.5, -1.0, 0.0]
    assert TruncationPenalty()([rollout("a"), rollout("b", truncated=True)]).tolist() == [0.0, -1.0]
    with pytest.raises(ValueError, match="max_words"):
        LengthPenalty(max_words=0)
