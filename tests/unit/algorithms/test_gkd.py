# SPDX-License-Identifier: Apache-2.0
"""GKD's share of own answers: who is asked, how often, and what the loop makes of it."""

import pytest
import recipe_checks
import recipe_parts
import torch
from one_word import FakePolicy, FakeTeacher, clipped, make, speech_batch
from test_configs import load

from nemo_rba.algorithms.advantage import BatchWhitened, LeaveOneOut, NoAdvantage
from nemo_rba.algorithms.alignment import check_choices
from nemo_rba.algorithms.collate import select_prompts
from nemo_rba.algorithms.gkd import FreshGKDRollouts, GKDRollouts
from nemo_rba.algorithms.group_losses import DPOLoss
from nemo_rba.algorithms.importance import TruncatedImportance
from nemo_rba.algorithms.objectives import DistillationLoss, ForwardKLLoss
from nemo_rba.algorithms.representation import RepresentationReward
from nemo_rba.algorithms.rollout import FreshTeacherRollouts, PolicyRollouts, TeacherRollouts

SETTINGS = {"group_size": 1, "max_new_tokens": 2, "temperature": 1.0, "top_p": 1.0}


def gkd(share: float, **changes) -> GKDRollouts:
    return GKDRollouts(share=share, **(SETTINGS | changes))


class Writes(FakeTeacher):
    """Answers "no" to whatever it reads, but for the third prompt, to which it comes to no end."""

    def generate(self, prompts, params):
        self.asked = list(prompts)
        return ["" if prompt == "say yes 2" else "no" for prompt in prompts]


def own(rollouts) -> list[bool]:
    return [rollout.logprobs is not None for rollout in rollouts]


def same(first, second) -> bool:
    def key(rollout):
        logprobs = None if rollout.logprobs is None else rollout.logprobs.tolist()
        return rollout.prompt_index, rollout.response, rollout.token_ids.tolist(), logprobs, rollout.truncated

    return [key(rollout) for rollout in first] == [key(rollout) for rollout in second]


def test_a_share_of_one_is_the_policy_and_a_share_of_none_the_teacher():
    batch = speech_batch(8)
    for seed in range(5):
        assert same(gkd(1)(FakePolicy(), batch, seed), PolicyRollouts(**SETTINGS)(FakePolicy(), batch, seed))
        assert same(gkd(0)(FakePolicy(), batch, seed), TeacherRollouts()(FakePolicy(), batch, seed))
        fresh = FreshGKDRollouts(teacher=Writes(), share=0, **SETTINGS | {"group_size": 2})
        alone = FreshTeacherRollouts(teacher=Writes(), **SETTINGS | {"group_size": 2})
        assert same(fresh(FakePolicy(), batch, seed), alone(FakePolicy(), batch, seed))
    assert (gkd(1).on_policy, gkd(0.99).on_policy, gkd(0).on_policy) == (True, False, False)


def test_nobody_is_asked_in_vain():
    class Deaf(FakePolicy):
        def generate(self, *args, **kwargs):
            raise AssertionError("the student was asked")

    gkd(0)(Deaf(), speech_batch(), seed=0)
    FreshGKDRollouts(teacher=None, share=1, **SETTINGS)(FakePolicy(), speech_batch(), seed=0)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_the_share_is_kept_on_average_and_every_batch_has_both(share):
    source, batch, policy = gkd(share), speech_batch(32), FakePolicy()
    shares = [sum(own(source(policy, batch, seed))) / 32 for seed in range(100)]
    mean = sum(shares) / 100
    deviation = (share * (1 - share)) ** 0.5
    assert mean == pytest.approx(share, abs=4 * deviation / 3200**0.5)
    spread = torch.tensor(shares).std().item()
    assert spread == pytest.approx(deviation / 32**0.5, rel=0.3), "drawn for each prompt: not all of a batch or none"


def test_who_answers_hangs_on_the_step_and_the_prompt_alone():
    source, batch, policy = gkd(0.5), speech_batch(32), FakePolicy()
    authors = [own(source(policy, batch, seed)) for seed in (3, 3, 4)]
    assert authors[0] == authors[1] != authors[2]
    turned = torch.arange(32).flip(0)
    assert own(source(policy, select_prompts(batch, turned), 3)) == authors[0][::-1]
    some = torch.tensor([5, 7, 2, 30])
    asked = source(policy, batch, 3, rows=some)
    assert [rollout.prompt_index for rollout in asked] == [5, 7, 2, 30]
    assert own(asked) == [authors[0][row] for row in some.tolist()]


def test_a_group_has_one_author_and_the_teachers_unfinished_answers_are_counted():
    source = FreshGKDRollouts(teacher=Writes(), share=0.5, **SETTINGS | {"group_size": 3})
    unfinished = set()
    for seed in range(8):
        rollouts = source(FakePolicy(), speech_batch(4), seed)
        assert [rollout.prompt_index for rollout in rollouts] == [n // 3 for n in range(12)]
        groups = [set(own(rollouts[n : n + 3])) for n in range(0, 12, 3)]
        assert all(len(group) == 1 for group in groups)
        third = rollouts[6:9]
        assert source.num_unfinished == (0 if own(third)[0] else 3)
        assert own(third)[0] or third[0].response == "yes", "the stored answer takes its place"
        unfinished.add(source.num_unfinished)
    assert unfinished == {0, 3}, "also back to none, once the teacher was not asked"


def test_the_loop_learns_from_both_and_tells_the_share():
    module, step = make(ForwardKLLoss(teacher_topk=1), source=gkd(0.5), teacher=FakeTeacher())
    history = [module.align(speech_batch(16), step) for _ in range(20)]
    told = [line["rollout/own"] for line in history]
    assert 0.3 < sum(told) / 20 < 0.7
    assert len(set(told)) > 1
    assert history[0]["reward/mean"] < 1, "of the student's own answers, some of which are no"
    assert history[-1]["loss/forward_kl"] < 0.5 * history[0]["loss/forward_kl"]
    assert "rollout/own" not in make(DistillationLoss(), source=TeacherRollouts())[0].align(speech_batch(), dict)


def test_a_resumed_run_asks_whom_the_uninterrupted_one_asks():
    def build():
        return make(DistillationLoss(), source=gkd(0.5))

    whole, step = build()
    for n in range(6):
        if n == 3:
            whole.on_save_checkpoint(saved := {})
            logit = whole.policy.logit.detach().clone()
        whole.align(speech_batch(16), step)
    resumed, step = build()
    resumed.on_load_checkpoint(saved)
    resumed.policy.logit.data.copy_(logit)
    again = [resumed.align(speech_batch(16), step)["rollout/own"] for _ in range(3)]
    assert len(set(again)) > 1
    for expected, found in zip(whole.policy.seen[3:], resumed.policy.seen, strict=True):
        assert torch.equal(found.response_ids, expected.response_ids)
    assert torch.equal(resumed.policy.logit, whole.policy.logit)


def test_what_needs_own_answers_is_refused_unless_all_are():
    half, whole = gkd(0.5), gkd(1.0)
    dpo = DPOLoss(beta=0.1, label_smoothing=0.0)
    pairs = FreshGKDRollouts(teacher=None, share=0.5, **SETTINGS | {"group_size": 2})
    for source, objective in ((half, clipped()), (half, clipped(dense=1.0)), (pairs, dpo), (gkd(0.0), clipped())):
        with pytest.raises(ValueError, match=r"is a policy gradient, and with rollouts\.share 0\.\d some prompts"):
            check_choices(source, NoAdvantage(), objective)
    with pytest.raises(ValueError, match="on GKDRollouts; leave importance out"):
        check_choices(half, NoAdvantage(), DistillationLoss(), TruncatedImportance(maximum=2.0))
    with pytest.raises(ValueError, match="DistillationLoss takes none"):
        check_choices(half, NoAdvantage(), DistillationLoss(), None, RepresentationReward(weight=1.0, layers=[]))
    check_choices(half, NoAdvantage(), DistillationLoss())
    check_choices(whole, BatchWhitened(epsilon=1e-4, group_baseline=False), clipped())
    with pytest.raises(ValueError, match=r"LeaveOneOut compares 2 or more answers.*group_size is 1"):
        check_choices(whole, LeaveOneOut(), clipped())


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match=r"rollouts\.share must be from 0 to 1, got 1\.5"):
        gkd(1.5)
    with pytest.raises(ValueError, match=r"group_size is 8, but the teacher has one stored answer.*rollouts=gkd_fresh"):
        gkd(0.5, group_size=8)
    with pytest.raises(ValueError, match="makes every new answer the same one"):
        FreshGKDRollouts(teacher=None, share=0.5, **SETTINGS | {"temperature": 0.0})


@pytest.mark.parametrize("rollouts", ["gkd", "gkd_fresh"])
def test_recipes_choose_it_for_distillation(rollouts):
    chosen = [f"rollouts={rollouts}", "rollouts.share=0.25"]
    recipe_checks.preflight(load("rba_tiny", *chosen, "objective=jsd", "advantage=none"))
    source = recipe_parts.rollout_source(load("rba_tiny", *chosen), Writes())
    assert (source.share, source.group_size, source.on_policy) == (0.25, 1, False)
    with pytest.raises(SystemExit, match=r"JudgedPolicyLoss is a policy gradient, and with rollouts\.share 0\.25"):
        recipe_checks.preflight(load("rba_tiny", *chosen))
