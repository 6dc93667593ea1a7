# SPDX-License-Identifier: Apache-2.0
"""Who answers: the student, asked again where it teaches nothing, among its teacher's answers, or the teacher anew."""

import pytest
import torch
from one_word import FakePolicy, FakeTeacher, SaysYes, clipped, make, speech_batch

from nemo_rba.algorithms.advantage import AmongOwn, GreedyBaseline, GroupCentred, GroupNormalized, LeaveOneOut
from nemo_rba.algorithms.alignment import check_choices
from nemo_rba.algorithms.group_losses import DPOLoss
from nemo_rba.algorithms.importance import TruncatedImportance
from nemo_rba.algorithms.objectives import DistillationLoss
from nemo_rba.algorithms.rollout import (
    FreshMixedRollouts,
    FreshTeacherRollouts,
    MixedRollouts,
    PolicyRollouts,
    ResampledRollouts,
    respond,
)
from nemo_rba.rewards.mixture import RewardMixture
from nemo_rba.rewards.teacher import TeacherAuthorship
from nemo_rba.types import Rollout


def own(group_size: int, kind=PolicyRollouts, **more):
    return kind(group_size=group_size, max_new_tokens=2, temperature=1.0, top_p=1.0, **more)


class Scripted:
    """A source whose answers to prompt r in its n-th call are ``script[r][n]``."""

    group_size, on_policy, num_unfinished = 2, True, 0

    def __init__(self, script, max_resamples):
        self.script, self.max_resamples, self.calls = script, max_resamples, []

    def __call__(self, policy, batch, seed, rows=None):
        chosen = range(len(batch)) if rows is None else rows.tolist()
        self.calls.append((seed, list(chosen)))
        return [
            Rollout(
                prompt_index=row, instruction=batch.instructions[row], response=word, token_ids=torch.tensor([0, 2]),
                logprobs=torch.zeros(2), truncated=False,
            )
            for row in chosen
            for word in self.script[row].pop(0)
        ]  # fmt: skip


def test_only_silent_groups_are_asked_again_and_no_oftener_than_allowed():
    script = [
        [("yes", "no")],
        [("no", "no"), ("no", "yes")],
        [("yes", "yes"), ("no", "no"), ("yes", "yes"), ("never", "asked")],
    ]
    source = Scripted(script, max_resamples=2)
    reward = RewardMixture(parts={"yes": SaysYes()}, weights={"yes": 2.0})
    answers = respond(source, None, speech_batch(3), reward, seed=7)
    assert [rows for _, rows in source.calls] == [[0, 1, 2], [1, 2], [2]]
    assert len({seed for seed, _ in source.calls}) == 3, "with other random numbers each time"
    assert [rollout.prompt_index for rollout in answers.rollouts] == [0, 0, 1, 1, 2, 2]
    assert [rollout.response for rollout in answers.rollouts] == ["yes", "no", "no", "yes", "yes", "yes"]
    assert answers.rewards.tolist() == [2.0, 0.0, 0.0, 2.0, 2.0, 2.0]
    assert answers.parts["yes"].tolist() == [1.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    assert answers.num_resampled == 2


def test_resampling_leaves_fewer_groups_without_an_advantage():
    shares = {}
    for source in (own(2), own(2, ResampledRollouts, max_resamples=3)):
        module, _ = make(clipped(), source=source)
        history = [module.align(speech_batch(16), lambda: {}) for _ in range(5)]
        shares[type(source)] = sum(step["rollout/silent_groups"] for step in history) / 5
    assert shares[ResampledRollouts] < 0.3 * shares[PolicyRollouts]
    assert 0.2 < history[0]["rollout/resampled"] < 0.9
    check_choices(source, GreedyBaseline(), clipped())
    with pytest.raises(ValueError, match=r"rollouts\.max_resamples must be 1 or more, got 0"):
        own(4, ResampledRollouts, max_resamples=0)


def test_the_teachers_answer_joins_each_group():
    source = own(4, MixedRollouts)
    module, step = make(clipped(), source=source)
    metrics = module.align(speech_batch(), step)
    (batch,) = module.policy.seen
    assert batch.prompt_index.tolist() == [row for row in range(4) for _ in range(4)]
    assert batch.response_ids[3::4, 0].tolist() == [0] * 4, "yes, the stored answer, is the last of each group"
    torch.testing.assert_close(batch.old_logprobs[3], torch.tensor([0.5, 1.0]).log(), msg="the student's own")
    assert module.policy.scored == [4], "the teacher's answers alone: of its own it knows since it wrote them"
    assert metrics["reward/mean"] < 1, "of the student's answers alone"
    with pytest.raises(ValueError, match="on MixedRollouts; leave importance out"):
        check_choices(source, LeaveOneOut(), clipped(), TruncatedImportance(maximum=2.0))
    with pytest.raises(ValueError, match="must be 2 or more, the teacher's answer included, got 1"):
        own(1, MixedRollouts)


def test_spin_prefers_the_teachers_answer_whatever_it_says():
    def answers_no(batch):
        return [Rollout(prompt_index=0, instruction=batch.instructions[0], response=word, token_ids=torch.tensor([0]),
                        logprobs=logprobs, truncated=False)
                for word, logprobs in (("yes", torch.zeros(1)), ("no", None))]  # fmt: skip

    assert TeacherAuthorship()(answers_no(speech_batch())).tolist() == [0.0, 1.0]
    module, step = make(DPOLoss(beta=0.5, label_smoothing=0.0), source=own(2, MixedRollouts),
                        advantage=GroupCentred())  # fmt: skip
    module.reward = RewardMixture(parts={"teacher": TeacherAuthorship()}, weights={"teacher": 1.0})
    history = [module.align(speech_batch(), step) for _ in range(30)]
    assert history[0]["dpo/ties"] == 0, "the teacher's answer is never one among equals"
    assert float(module.policy.logit.detach()) > 0.5, "yes has become likelier"


def test_new_answers_of_the_teacher_join_each_group():
    class Writer(FakeTeacher):
        """Says yes to every prompt but the third, with which it does not come to an end."""

        def generate(self, prompts, params):
            return ["" if "2" in prompt else "yes" for prompt in prompts]

    source = own(5, FreshMixedRollouts, teacher=Writer(), num_taught=2)
    policy = FakePolicy()
    rollouts = source(policy, speech_batch(), seed=0)
    assert [rollout.prompt_index for rollout in rollouts] == [row for row in range(4) for _ in range(5)]
    assert [rollout.logprobs is None for rollout in rollouts] == [False, False, False, True, True] * 4
    assert source.num_unfinished == 2, "whose place the stored answer took"
    some = source(policy, speech_batch(), seed=0, rows=torch.tensor([3, 1]))
    assert [rollout.prompt_index for rollout in some] == [1] * 5 + [3] * 5
    module, step = make(clipped(), source=source, advantage=GroupNormalized(epsilon=1e-4, divide_by_std=True))
    metrics = module.align(speech_batch(), step)
    (batch,) = module.policy.seen
    assert metrics["rollout/unfinished"] == 2 / 20
    rewards = (batch.response_ids[:, 0] == 0).float().view(4, 5)  # yes is obeyed
    for row, advantages in zip(rewards, batch.advantages.view(4, 5), strict=True):
        expected = (row - row.mean()) / (row.std() + 1e-4) if row.std() > 0 else torch.zeros(5)
        torch.testing.assert_close(advantages, expected, msg="the teacher's are compared like all others")
    module, step = make(clipped(kl=0.1), source=source, advantage=AmongOwn(estimator=GroupCentred()))
    module.align(speech_batch(), step)
    (batch,) = module.policy.seen
    assert batch.is_own.view(4, 5).tolist() == [[True, True, True, False, False]] * 4
    own_rewards = (batch.response_ids[:, 0] == 0).float().view(4, 5)[:, :3]
    expected = torch.nn.functional.pad(own_rewards - own_rewards.mean(1, keepdim=True), (0, 2))
    torch.testing.assert_close(batch.advantages.view(4, 5), expected)
    for num_taught in (0, 5):
        with pytest.raises(ValueError, match=rf"num_taught is {num_taught}, of rollouts\.group_size 5"):
            own(5, FreshMixedRollouts, teacher=None, num_taught=num_taught)


def test_a_teacher_answers_anew_each_time():
    class Moody(FakeTeacher):
        """Answers what the seed says, and does not come to an end with every fifth prompt."""

        def generate(self, prompts, params):
            self.asked = list(prompts)
            return ["" if n % 5 == 4 else ["yes", "no"][(params.seed + n) % 2] for n in range(len(prompts))]

    source = FreshTeacherRollouts(teacher=Moody(), group_size=2, max_new_tokens=4, temperature=1.0, top_p=1.0)
    first, second = (source(FakePolicy(), speech_batch(), seed) for seed in (0, 1))
    assert source.teacher.asked[:3] == ["say yes 0", "say yes 0", "say yes 1"], "it reads the words"
    assert [rollout.prompt_index for rollout in first] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [rollout.response for rollout in first] == ["yes", "no", "yes", "no", "yes", "no", "yes", "no"]
    assert [rollout.response for rollout in second] == ["no", "yes", "no", "yes", "yes", "yes", "no", "yes"]
    assert first[1].token_ids.tolist() == [1, 2]
    assert source.num_unfinished == 1, "whose place the stored answer took"
    module, step = make(DistillationLoss(), source=source)
    metrics = module.align(speech_batch(), step)
    assert metrics["loss/distillation"] > 0
    assert metrics["rollout/unfinished"] == 1 / 8
    with pytest.raises(ValueError, match="makes every new answer the same one"):
        FreshTeacherRollouts(teacher=None, group_size=1, max_new_tokens=4, temperature=0.0, top_p=1.0)
    with pytest.raises(ValueError, match="on FreshTeacherRollouts; leave importance out"):
        check_choices(source, LeaveOneOut(), clipped(), TruncatedImportance(maximum=2.0))
    with pytest.raises(ValueError, match=r"rollouts\.group_size must be 1 or more, got 0"):
        FreshTeacherRollouts(teacher=None, group_size=0, max_new_tokens=4, temperature=1.0, top_p=1.0)
