# SPDX-License-Identifier: Apache-2.0
import pytest
import sacrebleu
import torch

from nemo_rba.rewards.text import ChrF, ExactMatch, LengthPenalty, TruncationPenalty, VerifierReward, normalize
from nemo_rba.types import Instruction, Rollout


def rollout(response: str, *, answer: str = "The cat sat.", truncated: bool = False) -> Rollout:
    instruction = Instruction(id="i1", text="where did the cat sit", response=answer, task="open")
    return Rollout(
        prompt_index=0,
        instruction=instruction,
        response=response,
        token_ids=torch.tensor([1]),
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


def test_exact_match_forgives_form_only():
    scores = ExactMatch()([rollout(r) for r in ("the  cat, sat!", "The cat sits.", "Ｔhe cat sat")])
    assert scores.tolist() == [1.0, 0.0, 1.0]
    assert normalize("  It's_OK, no? ") == "it s ok no"


@pytest.mark.parametrize("reward", [ChrF(), ExactMatch()])
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
