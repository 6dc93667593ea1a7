# SPDX-License-Identifier: Apache-2.0
"""The loop with a fake policy: what happens to a batch, in order, with numbers one can do in the head."""

import dataclasses

import pytest
import torch

from nemo_rba.algorithms.advantage import GreedyBaseline, LeaveOneOut, NoAdvantage, PerRewardNormalized
from nemo_rba.algorithms.alignment import RBAAlignment, check_choices
from nemo_rba.algorithms.controllers import AdaptiveKL, KLAdaptiveLR, WarmupDecay
from nemo_rba.algorithms.controls import Controls, RunStopped
from nemo_rba.algorithms.group_losses import MinimumRiskLoss
from nemo_rba.algorithms.importance import MaskedImportance, TruncatedImportance
from nemo_rba.algorithms.objectives import ClippedPolicyLoss, DistillationLoss, ForwardKLLoss
from nemo_rba.algorithms.rollout import FreshTeacherRollouts, PolicyRollouts, TeacherRollouts
from nemo_rba.algorithms.watcher import StopOnCollapse
from nemo_rba.rewards.mixture import RewardMixture
from nemo_rba.types import Instruction, Rollout, SamplingParams, SpeechBatch

VOCABULARY = {"yes": 0, "no": 1, "<end>": 2}


class FakePolicy:
    """A policy with one number: the logit of "yes" against "no"; answers are one word and the end."""

    def __init__(self):
        self.logit = torch.zeros(1, requires_grad=True)
        self.seen = []

    def _word_logprobs(self):
        return torch.cat((self.logit, -self.logit)).log_softmax(0)

    def generate(self, batch, *, group_size, params):
        generator = torch.Generator().manual_seed(params.seed)
        rollouts = []
        for row, instruction in enumerate(batch.instructions):
            for _ in range(group_size):
                word = int(torch.multinomial(self._word_logprobs().exp(), 1, generator=generator))
                rollouts.append(
                    Rollout(
                        prompt_index=row, instruction=instruction, response=["yes", "no"][word],
                        token_ids=torch.tensor([word, 2]), truncated=False,
                        logprobs=torch.stack((self._word_logprobs()[word].detach(), torch.tensor(0.0))),
                    )
                )  # fmt: skip
        return rollouts

    def encode_response(self, response):
        return [VOCABULARY[response], 2]

    def logprobs(self, batch, *, reference=False):
        words = self._word_logprobs().detach() if not reference else torch.full((2,), 0.5).log()
        return torch.stack((words[batch.response_ids[:, 0]], torch.zeros(len(batch))), 1)

    def forward_backward(self, batch, objective):
        self.seen.append(batch)
        first = self._word_logprobs()[batch.response_ids[:, 0]]
        logprobs = torch.stack((first, torch.zeros(len(batch))), 1)
        if objective.teacher_topk:
            logprobs = logprobs[..., None].expand(-1, -1, batch.teacher_topk_ids.shape[-1])
        loss, metrics = objective(logprobs, batch)
        loss.backward()
        return {name: float(value) for name, value in metrics.items()}

    def step(self, learning_rate):
        norm = float(self.logit.grad.norm())
        with torch.no_grad():
            self.logit -= learning_rate * self.logit.grad
        self.logit.grad = None
        return {"grad_norm": norm, "lr": learning_rate}


class SaysYes:
    """Reward 1 for yes."""

    def __call__(self, rollouts):
        return torch.tensor([float(rollout.response == "yes") for rollout in rollouts])


class FakeTeacher:
    """Certain of "yes", and of the end after it."""

    prompts = ()

    def vocabulary(self):
        return VOCABULARY

    def render(self, messages, *, open_turn):
        return messages[0]["content"]

    def logprobs(self, prompts, responses):
        self.prompts = prompts
        return [torch.tensor([-0.01 if ids[0] == 0 else -4.6, 0.0]) for ids in responses]

    def topk_logprobs(self, prompts, responses, k):
        return [(torch.tensor([[0], [2]]), torch.zeros(2, 1)) for _ in responses]


def speech_batch(num_prompts=4):
    instructions = tuple(
        Instruction(id=str(i), text=f"say yes {i}", response="yes", task="t") for i in range(num_prompts)
    )
    ones = torch.ones(num_prompts, 1, dtype=torch.int64)
    return SpeechBatch(
        instructions=instructions, audio=torch.zeros(num_prompts, 8), audio_lens=8 * ones[:, 0], prompt_ids=ones,
        prompt_lens=ones[:, 0], response_ids=torch.tensor([[0, 2]] * num_prompts), response_lens=2 * ones[:, 0],
    )  # fmt: skip


def clipped(kl=0.0, dense=0.0):
    return ClippedPolicyLoss(
        clip_low=0.2, clip_high=0.2, kl_coefficient=kl, kl_estimator="k3", dense_weight=dense, dense_clip=5.0,
        aggregation="token_mean",
    )  # fmt: skip


def constant_rate():
    return WarmupDecay(peak=1.0, floor=1.0, warmup_steps=0, total_steps=1, shape="linear")


def make(
    objective, source=None, advantage=None, teacher=None, num_minibatches=1, importance=None, schedule=None, **steering
):
    module = RBAAlignment(
        build_model=None, build_policy=None, build_loader=None, build_validation_loader=None, teacher=teacher,
        source=source or PolicyRollouts(group_size=4, max_new_tokens=2, temperature=1.0, top_p=1.0),
        reward=RewardMixture(parts={"yes": SaysYes()}, weights={"yes": 1.0}), advantage=advantage or LeaveOneOut(),
        objective=objective, controls=Controls(schedule=schedule or constant_rate(), **steering), importance=importance,
        validation_params=SamplingParams(max_new_tokens=2), num_minibatches=num_minibatches, seed=3,
    )  # fmt: skip
    module._policy.append(FakePolicy())
    return module, lambda: module.policy.step(module.controls.schedule.value)


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
        def generate(self, batch, *, group_size, params):
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
    with pytest.raises(ValueError, match="num_minibatches is 1 with ClippedPolicyLoss; expected 2 or more"):
        make(clipped(), schedule=schedule)
    with pytest.raises(ValueError, match="with DistillationLoss"):
        make(DistillationLoss(), source=TeacherRollouts(), schedule=schedule, num_minibatches=2)
    with pytest.raises(ValueError, match="MaskedImportance weighs the tokens of a policy gradient"):
        make(DistillationLoss(), source=TeacherRollouts(), importance=MaskedImportance(minimum=0.5, maximum=5.0))


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
