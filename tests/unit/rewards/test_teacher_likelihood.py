# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from nemo_rba.rewards.mixture import RewardMixture
from nemo_rba.rewards.teacher import TeacherLikelihood
from nemo_rba.rewards.text import ChrF
from nemo_rba.types import Instruction, Rollout


class EchoTeacher:
    """Token i has log-probability -i; remembers the prompts it was asked with."""

    def render(self, messages, *, open_turn):
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + f"<{open_turn}>"

    def logprobs(self, prompts, responses):
        self.prompts = list(prompts)
        return [-ids.double() for ids in responses]


def rollout(ids: list[int], *, context: str = "") -> Rollout:
    return Rollout(
        prompt_index=0,
        instruction=Instruction(id="i", text="good morning", response="", task="open", context=context),
        response="",
        token_ids=torch.tensor(ids, dtype=torch.int64),
        logprobs=None,
        truncated=False,
    )


def test_mean_sum_floor_and_empty_answers():
    rollouts = [rollout([1, 2]), rollout([]), rollout([90])]
    assert TeacherLikelihood(teacher=EchoTeacher(), normalize="token", floor=-10.0)(rollouts).tolist() == [
        -1.5,
        -10.0,
        -10.0,
    ]
    assert TeacherLikelihood(teacher=EchoTeacher(), normalize="none", floor=-100.0)(rollouts).tolist() == [
        -3.0,
        -100.0,
        -90.0,
    ]
    assert TeacherLikelihood(teacher=EchoTeacher(), normalize="none", floor=-7.0)([rollout([])]).tolist() == [-7.0]


def test_the_teacher_reads_context_and_transcript():
    teacher = EchoTeacher()
    TeacherLikelihood(teacher=teacher, normalize="token", floor=-9.0)(
        [rollout([1]), rollout([1], context="Translate into French:")]
    )
    assert teacher.prompts == ["<user>good morning<assistant>", "<user>Translate into French: good morning<assistant>"]


@pytest.mark.parametrize(("changes", "key"), [({"normalize": "word"}, "normalize"), ({"floor": 0.0}, "floor")])
def test_bad_settings_name_the_key(changes, key):
    with pytest.raises(ValueError, match=f"change {key} of TeacherLikelihood"):
        TeacherLikelihood(**{"teacher": EchoTeacher(), "normalize": "token", "floor": -1.0, **changes})


def test_a_teacher_that_only_writes_is_refused():
    with pytest.raises(ValueError, match="object only writes; change teacher of TeacherLikelihood"):
        TeacherLikelihood(teacher=object(), normalize="token", floor=-1.0)


def test_a_mixture_tells_whose_vocabulary_must_be_the_students():
    class Speller(EchoTeacher):
        def vocabulary(self):
            return {"a": 0}

    likelihood = TeacherLikelihood(teacher=Speller(), normalize="token", floor=-1.0)
    mixture = RewardMixture(parts={"chrf": ChrF(), "likely": likelihood}, weights={"chrf": 1.0, "likely": 1.0})
    assert mixture.vocabularies() == {"likely": {"a": 0}}
