# SPDX-License-Identifier: Apache-2.0
"""The loop with a fake policy: what happens to a batch, in order, with numbers one can do in the head."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from one_word import VOCABULARY, FakePolicy, FakeTeacher, clipped, make, speech_batch

from nemo_rba.algorithms.advantage import GreedyBaseline, NoAdvantage, PerRewardNormalized
from nemo_rba.algorithms.alignment import check_choices
from nemo_rba.algorithms.controllers import AdaptiveKL, KLAdaptiveLR
from nemo_rba.algorithms.controls import RunStopped
from nemo_rba.algorithms.group_losses import DPOLoss, MinimumRiskLoss
from nemo_rba.algorithms.importance import MaskedImportance, TruncatedImportance
from nemo_rba.algorithms.objectives import DistillationLoss, ForwardKLLoss, GeneralizedJSDLoss, JudgedPolicyLoss
from nemo_rba.algorithms.policy_losses import ReinforceLoss
from nemo_rba.algorithms.rollout import PolicyRollouts, TeacherRollouts
from nemo_rba.algorithms.strategy import MegatronStrategy
from nemo_rba.algorithms.watcher import StopOnCollapse
from nemo_rba.rewards.mixture import RewardMixture
from nemo_rba.rewards.teacher import TeacherLikelihood
from nemo_rba.types import Rollout


def test_reinforcement_raises_the_reward():
    module, step = make(clipped())
    history = [module.align(speech_batch(), step) for _ in range(40)]
    assert history[0]["reward/mean"] < 0.8
    assert sum(step["reward/mean"] for step in history[-5:]) / 5 > 0.9
    assert history[-1]["rollout/constant_groups"] > history[0]["rollout/constant_groups"]
    assert history[0]["reward/yes"] == history[0]["reward/mean"]
    assert history[0]["health/logprob_error"] == pytest.approx(0.0, abs=1e-6)


def test_the_teachers_judgement_alone_raises_the_reward():
    teacher = FakeTeacher()
    module, step = make(clipped(dense=1.0), advantage=NoAdvantage(), teacher=teacher)
    history = [module.align(speech_batch(), step) for _ in range(60)]
    assert history[-1]["reward/mean"] > 0.95
    assert teacher.prompts[0] == "say yes 0", "the teacher reads the transcript"


def test_distillation_needs_no_group_and_no_advantage():
    module, step = make(DistillationLoss(), source=TeacherRollouts())
    losses = [module.align(speech_batch(), step)["loss/distillation"] for _ in range(20)]
    assert losses[0] == pytest.approx(0.5 * torch.log(torch.tensor(2.0)).item())
    assert losses[-1] < 0.3 * losses[0]
    assert module.policy.seen[0].old_logprobs is None


def test_batch_carries_what_the_objective_asks_for():
    module, step = make(clipped(kl=0.1, dense=1.0), teacher=FakeTeacher())
    module.align(speech_batch(), step)
    batch = module.policy.seen[0]
    for name in ("old_logprobs", "ref_logprobs", "teacher_logprobs"):
        assert getattr(batch, name).shape == (16, 2)
    assert (batch.num_loss_tokens, batch.num_loss_rollouts) == (32, 16)
    module, step = make(ForwardKLLoss(teacher_topk=1), source=TeacherRollouts(), teacher=FakeTeacher())
    module.align(speech_batch(), step)
    assert module.policy.seen[0].teacher_topk_ids.shape == (4, 2, 1)


def test_minibatches_step_once_each_on_whole_groups():
    module, step = make(clipped(), num_minibatches=2)
    module.align(speech_batch(), step)
    assert [len(batch) for batch in module.policy.seen] == [8, 8]
    assert module.policy.seen[1].prompt_index.unique().tolist() == [2, 3]
    assert all(dataclasses.replace(b, prompts=None).num_loss_rollouts == 8 for b in module.policy.seen)


def test_passes_learn_again_from_the_same_answers():
    module, step = make(clipped(), num_minibatches=2, ppo_epochs=3)
    metrics = module.align(speech_batch(), step)
    seen = module.policy.seen
    assert [batch.prompt_index.unique().tolist() for batch in seen] == [[0, 1], [2, 3]] * 3
    for again in (seen[2], seen[4]):
        assert torch.equal(again.response_ids, seen[0].response_ids)
        assert torch.equal(again.old_logprobs, seen[0].old_logprobs), "of the policy that answered"
    assert module.num_batches == 1
    assert metrics["health/logprob_error"] == pytest.approx(0.0, abs=1e-6), "of the first step"
    once, step = make(clipped(), num_minibatches=2)
    assert metrics["clip_fraction"] > once.align(speech_batch(), step)["clip_fraction"], "the ratio moves on"


def test_passes_without_a_ratio_are_refused():
    with pytest.raises(ValueError, match="ppo_epochs is 0; expected 1 or more"):
        make(clipped(), ppo_epochs=0)
    reinforce = ReinforceLoss(kl_coefficient=0.0, kl_estimator="k3", dense_weight=0.0, dense_clip=5.0,
                              aggregation="token_mean")  # fmt: skip
    with pytest.raises(ValueError, match="ReinforceLoss has no ratio to the policy that answered, but ppo_epochs is 2"):
        make(reinforce, ppo_epochs=2)


def test_steps_sample_differently_and_a_seed_repeats_them():
    def answers():
        module, _ = make(clipped())
        for _ in range(3):
            module.align(speech_batch(), lambda: {})
        return [batch.response_ids[:, 0].tolist() for batch in module.policy.seen]

    first = answers()
    assert first == answers()
    assert first[0] != first[1]


def test_setup_refuses_what_cannot_learn():
    alone = PolicyRollouts(group_size=1, max_new_tokens=2, temperature=1.0, top_p=1.0)
    with pytest.raises(ValueError, match=r"rollouts\.group_size is 1"):
        make(clipped(), source=alone)
    with pytest.raises(ValueError, match="asks a teacher"):
        make(clipped(dense=1.0))
    with pytest.raises(ValueError, match="makes all 4 answers of a group equal"):
        PolicyRollouts(group_size=4, max_new_tokens=2, temperature=0.0, top_p=1.0)


@pytest.mark.parametrize(
    "advantage", [GreedyBaseline(), PerRewardNormalized(weights={"yes": 1.0}, epsilon=1e-4, batch_normalize=True)]
)
def test_estimators_get_what_they_ask_for(advantage):
    module, step = make(clipped(), advantage=advantage)
    history = [module.align(speech_batch(), step) for _ in range(40)]
    assert sum(step["reward/mean"] for step in history[-5:]) / 5 > 0.85


def test_what_cannot_be_compared_is_refused_at_setup():
    risk = MinimumRiskLoss(sharpness=1.0, kl_coefficient=0.0, kl_estimator="k3")
    one = PolicyRollouts(group_size=1, max_new_tokens=2, temperature=1.0, top_p=1.0)
    with pytest.raises(ValueError, match=r"MinimumRiskLoss compares 2 or more answers.*group_size is 1"):
        check_choices(one, NoAdvantage(), risk)
    with pytest.raises(ValueError, match="GreedyBaseline compares with the student's greedy answer, but TeacherRoll"):
        check_choices(TeacherRollouts(), GreedyBaseline(), clipped())
    check_choices(one, GreedyBaseline(), clipped())


def test_the_kl_coefficient_follows_the_kl():
    controller = AdaptiveKL(coefficient=0.5, target=1e-3, horizon_steps=1)
    module, step = make(clipped(kl=0.1), kl_controller=controller)
    assert module.objective.kl_coefficient == 0.5, "the controller's, from the first step"
    history = [module.align(speech_batch(), step) for _ in range(4)]
    assert history[0]["kl/reference"] == pytest.approx(0.0, abs=1e-6), "the start model itself"
    assert [line["loss/kl"] > 0 for line in history[1:]] == [True] * 3
    assert [line["kl/coefficient"] for line in history[:3]] == pytest.approx([0.5, 0.4, 0.48])
    assert module.objective.kl_coefficient == controller.value == pytest.approx(0.5 * 0.8 * 1.2**3)


def test_the_learning_rate_follows_the_kl_of_the_later_updates():
    schedule = KLAdaptiveLR(learning_rate=1.0, target=1e-6, factor=2.0, minimum=0.1, maximum=1.0)
    module, step = make(clipped(), num_minibatches=2, schedule=schedule)
    module.align(speech_batch(), step)
    assert schedule.value == 0.5, "the second update's KL; the first had none"


def test_a_sampler_that_is_not_the_trainer_is_corrected():
    class OtherPrecision(FakePolicy):
        def generate(self, batch, *, group_size, params, rows=None):
            answers = super().generate(batch, group_size=group_size, params=params)
            return [dataclasses.replace(a, logprobs=a.logprobs - torch.tensor([0.5, 0.0])) for a in answers]

    module, step = make(clipped(), importance=TruncatedImportance(maximum=1.25))
    module._policy[0] = OtherPrecision()
    metrics = module.align(speech_batch(), step)
    (batch,) = module.policy.seen
    torch.testing.assert_close(batch.old_logprobs[:, 0], torch.full((16,), 0.5).log())
    torch.testing.assert_close(batch.importance_weights, torch.tensor([[1.25, 1.0]] * 16))  # e^0.5, cut
    assert metrics["health/logprob_error"] == pytest.approx(0.25), "is still told"
    assert metrics["sampler/weight"] == pytest.approx(1.125)


def watcher(**settings):
    off = {"min_entropy": None, "min_length": None, "max_length": None, "validation_patience": None}
    return StopOnCollapse(patience=2, dev_score="val/reward", **off | settings)


def test_a_run_that_has_gone_wrong_is_stopped_with_its_reason():
    module, _ = make(clipped(), watcher=watcher(min_entropy=0.2))
    module.controls.watch({"entropy": 0.1})
    with pytest.raises(RunStopped, match=r"entropy has been below 0\.2 for 2 steps"):
        module.controls.watch({"entropy": 0.1})
    with pytest.raises(RunStopped, match="loss/policy is nan: the run has diverged"):
        module.controls.watch({"loss/policy": float("nan")})


def test_a_step_without_numbers_ends_the_run_before_a_controller_follows_it():
    controller = AdaptiveKL(coefficient=0.5, target=1e-3, horizon_steps=2)
    module, _ = make(clipped(kl=0.1), kl_controller=controller)
    with pytest.raises(RunStopped, match="grad_norm is inf: the run has diverged"):
        module.align(speech_batch(), lambda: {"grad_norm": float("inf")})
    assert controller.value == 0.5


def test_groups_without_an_advantage_are_told():
    module, step = make(clipped())
    history = [module.align(speech_batch(), step) for _ in range(40)]
    assert history[-1]["rollout/silent_groups"] == history[-1]["rollout/constant_groups"] > 0


def test_controls_are_saved_and_resumed():
    def build():
        controller = AdaptiveKL(coefficient=0.5, target=1e-3, horizon_steps=2)
        return make(clipped(kl=0.1), kl_controller=controller, watcher=watcher(max_length=1.0), num_minibatches=2)

    module, step = build()
    for _ in range(2):
        module.align(speech_batch(), step)
    module.controls.watch({"rollout/length": 2.0})
    module.on_save_checkpoint(saved := {})
    resumed, _ = build()
    resumed.on_load_checkpoint(saved)
    assert resumed.controls.state_dict() == module.controls.state_dict()
    assert resumed.objective.kl_coefficient == module.objective.kl_coefficient != 0.5
    with pytest.raises(RunStopped, match="answers get too long"):
        resumed.controls.watch({"rollout/length": 2.0})


def test_controls_with_nothing_to_steer_by_are_refused_at_setup():
    controller = AdaptiveKL(coefficient=0.5, target=1e-3, horizon_steps=2)
    with pytest.raises(ValueError, match=r"kl_controller steers the KL to the start model, but ClippedPolicyLoss does"):
        make(clipped(), kl_controller=controller)
    schedule = KLAdaptiveLR(learning_rate=1.0, target=1e-3, factor=2.0, minimum=0.1, maximum=1.0)
    with pytest.raises(
        ValueError, match=r"num_minibatches \* ppo_epochs is 1 with ClippedPolicyLoss; expected 2 or more"
    ):
        make(clipped(), schedule=schedule)
    with pytest.raises(ValueError, match="with DistillationLoss"):
        make(DistillationLoss(), source=TeacherRollouts(), schedule=schedule, num_minibatches=2)
    with pytest.raises(ValueError, match="MaskedImportance weighs the tokens of a policy gradient"):
        make(DistillationLoss(), source=TeacherRollouts(), importance=MaskedImportance(minimum=0.5, maximum=5.0))


def test_a_gradient_without_numbers_ends_the_run_with_its_reason():
    module, _ = make(clipped())

    def diverged():
        raise FloatingPointError("the gradient norm is nan; the weights are those of the last good step")

    with pytest.raises(RunStopped, match="the gradient norm is nan; the weights are those of the last good step"):
        module.align(speech_batch(), diverged)


def test_whoever_reads_token_ids_has_the_students_vocabulary():
    """A reward that is asked about token ids is as wrong by another vocabulary as the loss is, and as silent."""

    class Foreign(FakeTeacher):
        def vocabulary(self):
            return {"yes": 1, "no": 0, "<end>": 2}

    def configured(objective, teacher, reward):
        module, _ = make(objective, teacher=teacher)
        module._policy.clear()
        prompt = SimpleNamespace(vocabulary=lambda: VOCABULARY)
        module._builders = (lambda: SimpleNamespace(prompt=prompt), lambda **_: FakePolicy(), None, None)
        likelihood = TeacherLikelihood(teacher=reward, normalize="token", floor=-10.0)
        module.reward = RewardMixture(parts={"likelihood": likelihood}, weights={"likelihood": 1.0})
        module.configure_model()

    configured(clipped(dense=1.0), FakeTeacher(), FakeTeacher())
    configured(clipped(), None, FakeTeacher())
    with pytest.raises(ValueError, match=r"reward\.parts\.likelihood: teacher and student differ in 2 of 3 tokens"):
        configured(clipped(), None, Foreign())
    with pytest.raises(ValueError, match=r"^teacher and student differ in 2 of 3 tokens"):
        configured(clipped(dense=1.0), Foreign(), FakeTeacher())


@pytest.mark.parametrize(
    "objective",
    [MinimumRiskLoss(sharpness=1.0, kl_coefficient=0.0, kl_estimator="k3"), DPOLoss(beta=0.1, label_smoothing=0.0)],
)
def test_losses_without_an_old_policy_tell_how_far_off_the_sampler_was(objective):
    class OtherPrecision(FakePolicy):
        def generate(self, batch, *, group_size, params, rows=None):
            answers = super().generate(batch, group_size=group_size, params=params)
            return [dataclasses.replace(a, logprobs=a.logprobs - torch.tensor([0.5, 0.0])) for a in answers]

    module, step = make(objective)
    module._policy[0] = OtherPrecision()
    assert module.align(speech_batch(), step)["health/logprob_error"] == pytest.approx(0.25)


def test_training_leaves_the_model_where_it_is():
    """Lightning's own strategies move it to the host at the end, and NCCL cannot gather it there."""
    strategy = MegatronStrategy(tensor_model_parallel_size=1, pipeline_model_parallel_size=1, seed=0)
    parts = ("cluster_environment", "precision_plugin", "accelerator", "checkpoint_io")
    ended = []
    for part in parts:
        setattr(strategy, part, SimpleNamespace(teardown=lambda part=part: ended.append(part)))
    strategy._lightning_module = SimpleNamespace(cpu=lambda: pytest.fail("the model was moved"))
    strategy.teardown()
    assert ended == list(parts)


def test_the_sampled_token_is_the_last_candidate_where_a_loss_wants_both():
    settings = {"clip_low": 0.2, "clip_high": 0.2, "kl_coefficient": 0.0, "kl_estimator": "k3"}
    judgement = GeneralizedJSDLoss(beta=0.5, teacher_topk=1)
    objective = JudgedPolicyLoss(**settings, aggregation="token_mean", judgement=judgement, judgement_weight=1.0)
    module, step = make(objective, teacher=FakeTeacher())
    module.align(speech_batch(), step)
    (batch,) = module.policy.seen
    assert batch.teacher_topk_ids.shape == (16, 2, 2)
    assert (batch.teacher_topk_ids[..., 0] == torch.tensor([0, 2])).all(), "the teacher's likeliest"
    assert torch.equal(batch.teacher_topk_ids[..., 1], batch.response_ids)


def test_dev_prompts_are_heard_and_read():
    """As one who has learned to say yes by ear, and forgotten it as a reader."""
    module, _ = make(clipped(), validation_typed=True)
    module.policy.generate = lambda batch, **_: [
        Rollout(
            prompt_index=n, instruction=instruction, response=["yes", "no"][batch.is_typed and n > 0],
            token_ids=torch.tensor([0, 2]), truncated=False, logprobs=torch.zeros(2),
        )
        for n, instruction in enumerate(batch.instructions)
    ]  # fmt: skip
    module.validation_step(speech_batch(), 0)
    module.validation_step(speech_batch(num_prompts=1), 1)
    assert module._dev_scores() == {
        "val/teacher": 1.0, "val/reward": 1.0, "val/yes": 1.0, "val/typed/reward": 0.4, "val/typed/yes": 0.4,
        "val/both/reward": 0.7, "val/both/yes": 0.7,
    }  # fmt: skip
