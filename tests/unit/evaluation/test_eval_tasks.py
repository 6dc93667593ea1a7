# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from nemo_rba.evaluation.tasks import InstructionFollowingTask, TranscriptionTask, word_errors
from nemo_rba.types import Instruction, Rollout


def rollout(response: str, *, text: str = "say yes", task: str = "yes") -> Rollout:
    return Rollout(
        prompt_index=0,
        instruction=Instruction(id="i", text=text, response="yes", task=task),
        response=response,
        token_ids=torch.tensor([1]),
        logprobs=None,
        truncated=False,
    )


def verify(text: str, response: str) -> float:
    return {"yes": 1.0, "half": 0.5, "no": 0.0, "bad": 1.5}[response]


def make_task(**changes) -> InstructionFollowingTask:
    settings = {"name": "test", "batches": list, "verify": verify, "kinds": {"yes": "closed", "open": "open"}}
    return InstructionFollowingTask(**settings | changes)


def test_scores_in_total_by_family_and_by_kind():
    rollouts = [rollout("yes"), rollout("half"), rollout("no", task="open"), rollout("half", task="open")]
    assert make_task().score(rollouts) == {
        "score": 50.0,
        "score/yes": 75.0,
        "score/open": 25.0,
        "score/closed": 75.0,
    }
    assert make_task(kinds={}).score(rollouts[:2]) == {"score": 75.0, "score/yes": 75.0}


def test_what_cannot_be_scored_is_named():
    with pytest.raises(ValueError, match=r"'riddle', which has no kind.*task\.kinds"):
        make_task().kind(rollout("yes", task="riddle").instruction)
    with pytest.raises(ValueError, match=r"verify gave 1\.5 for 'bad'"):
        make_task().score([rollout("bad")])
    with pytest.raises(ValueError, match="no rollouts"):
        make_task().score([])


def test_word_errors_are_corpus_level_and_forgive_form():
    assert word_errors("The cat, sat down.", "the cat sat sat down") == (1, 4)
    assert word_errors("a b c d", "") == (4, 4)
    rollouts = [rollout("a b", text="A, b!"), rollout("x", text="one two three four five six seven eight")]
    assert TranscriptionTask(name="wer", batches=list).score(rollouts) == {"wer": pytest.approx(80.0)}
    with pytest.raises(ValueError, match="reference with words"):
        word_errors("?!", "a")
