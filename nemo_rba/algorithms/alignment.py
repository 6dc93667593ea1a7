# SPDX-License-Identifier: Apache-2.0
"""Reinforced Behavior Alignment: the one loop (arXiv 2509.03526).

A batch of spoken prompts goes around once:

    source      somebody answers: the student itself, G times (RBA), or its teacher (distillation)
    reward      how much does each answer behave like the teacher? Does the student think as a reader would?
    advantage   compared with its siblings
    objective   turns advantages, and the teacher's judgement of every token, into a loss
    policy      takes a step

``RBAAlignment.align`` is all of it. Around it is a LightningModule with manual optimisation, so that NeMo's
``trainer`` and ``exp_manager`` sections mean what NeMo's users know: loggers, checkpoints, resume, time limits.
One ``training_step`` is one batch; ``global_step`` counts optimiser steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from nemo_rba.algorithms.advantage import estimate, silent_share
from nemo_rba.algorithms.choices import check_choices, check_passes
from nemo_rba.algorithms.collate import is_own, judge, prompt_index, split
from nemo_rba.algorithms.controls import Controls, RunStopped
from nemo_rba.algorithms.gkd import GKDRollouts
from nemo_rba.algorithms.importance import Importance
from nemo_rba.algorithms.kl_reward import is_priced, kl_price
from nemo_rba.algorithms.representation import RepresentationLoss, RepresentationReward
from nemo_rba.algorithms.rollout import Answers, TeacherRollouts, respond
from nemo_rba.data.prompt import typed_batch
from nemo_rba.distributed.parallel import data_parallel_lists, data_parallel_mean, data_parallel_rank, data_parallel_sum
from nemo_rba.functional import group_is_constant
from nemo_rba.protocols import (
    AdvantageEstimator,
    EvalTask,
    LikelihoodTeacher,
    Metrics,
    Objective,
    Policy,
    RolloutSource,
)
from nemo_rba.rewards.mixture import RewardMixture
from nemo_rba.synthesis.teacher_folder import check_same_vocabulary
from nemo_rba.types import Rollout, RolloutBatch, SamplingParams, SpeechBatch

SEEDS_PER_RUN = 1_000_003  # so that no two steps of two runs with neighbouring seeds sample alike


class RBAAlignment(LightningModule):
    """Aligns a SpeechLM with its teacher.

    Args:
        build_model: gives the start model; called once, after the process groups exist.
        build_policy: ``build_policy(model=..., keep_start=...)``.
        source, reward, advantage, objective: see ``protocols``.
        teacher: judges tokens; None when the objective does not ask for it.
        controls: learning rate, KL coefficient, and who stops a run that has gone wrong.
        importance: corrects for a sampler that is not the trainer (``importance``); None trusts the sampler.
        representation: one more reward, or term of the loss, for hidden states like a reader's (``representation``), or
            None.
        build_loader: ``build_loader(prompt=..., sampling_rate=...)`` gives the training batches.
        build_validation_loader: likewise the dev batches.
        validation_params: how the student answers them.
        validation_task: measures these answers as the evaluation does, ``val/task/...``, beside the reward; or None.
        validation_typed: the dev prompts are read as well, ``val/typed/...``: what a run forgets on text;
            ``val/both/...`` is the mean of heard and read.
        num_minibatches: optimiser steps of one pass over a batch of rollouts.
        ppo_epochs: passes over it; from the second step on the answers are an earlier policy's, as the ratio knows.
        seed: of the sampling.
    """

    def __init__(
        self, *, build_model: Callable, build_policy: Callable[..., Policy], source: RolloutSource,
        reward: RewardMixture, advantage: AdvantageEstimator, objective: Objective, teacher: LikelihoodTeacher | None,
        controls: Controls, build_loader: Callable, build_validation_loader: Callable,
        validation_params: SamplingParams, num_minibatches: int, ppo_epochs: int, seed: int,
        importance: Importance | None = None,
        representation: RepresentationReward | RepresentationLoss | None = None,
        validation_task: EvalTask | None = None,
        validation_typed: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.automatic_optimization = False
        check_choices(source, advantage, objective, importance, representation)
        check_passes(objective, ppo_epochs)
        controls.check(objective, num_minibatches * ppo_epochs)
        controls.begin(objective)
        if (objective.needs_teacher or objective.teacher_topk) and teacher is None:
            raise ValueError(
                f"{type(objective).__name__} asks a teacher for log-probabilities; configure such a teacher"
            )
        self.source, self.reward, self.advantage, self.objective = source, reward, advantage, objective
        self.controls, self.seed = controls, seed
        self.num_minibatches, self.ppo_epochs = num_minibatches, ppo_epochs
        self.importance, self.representation = importance, representation
        self.validation_params, self.validation_task = validation_params, validation_task
        self.validation_typed = validation_typed
        self._teacher = [teacher]  # in a list, and the policy in another: not modules of ours, not in our checkpoints
        self._policy: list[Policy] = []
        self._builders = (build_model, build_policy, build_loader, build_validation_loader)
        self.num_batches = 0
        self._validation: list[dict[str, Tensor]] = []  # each dev batch's rewards
        self._dev_answers: list[Rollout] = []
        self.start_reward: float | None = None  # on the dev set, before the first step

    # ---- the method ------------------------------------------------------------------------------------------------

    def align(self, batch: SpeechBatch, take_step: Callable[[], Metrics]) -> Metrics:
        """One batch of spoken prompts, from answers to updated weights."""
        seed = self.seed * SEEDS_PER_RUN + self.num_batches
        answers = self._represented(batch, respond(self.source, self.policy, batch, self.reward, seed))
        index, rollouts = prompt_index(answers.rollouts), answers.rollouts
        whole = judge(
            batch, rollouts, policy=self.policy, objective=self.objective, teacher=self._teacher[0],
            importance=self.importance,
        )  # fmt: skip
        price = kl_price(whole, self.objective) if is_priced(self.objective) else None
        advantages = self._advantages(batch, answers, price)
        minibatches, steps = list(split(replace(whole, advantages=advantages), self.num_minibatches)), []
        for minibatch in minibatches * self.ppo_epochs:
            metrics = self._update(minibatch, take_step)
            self.controls.after_step(metrics, self.objective, first=not steps)
            steps.append(metrics)
        self.num_batches += 1
        described = describe(answers)
        described["rollout/unfinished"] = self.source.num_unfinished / len(rollouts)
        if isinstance(self.source, GKDRollouts):
            described["rollout/own"] = float(is_own(rollouts).float().mean())
        if self.source.max_resamples:
            described["rollout/resampled"] = answers.num_resampled / len(batch)
        if self.objective.needs_advantages:
            described["rollout/silent_groups"] = silent_share(advantages, index)
        if price is not None:
            described["kl/price"] = float(price.mean())
        return _mean(steps) | data_parallel_mean(described)

    def _advantages(self, batch: SpeechBatch, answers: Answers, price: Tensor | None) -> Tensor:
        """Of every answer (N,), from rewards less the price of its KL, where there is one; 0 where nobody asks."""
        if not self.objective.needs_advantages:
            return torch.zeros_like(answers.rewards)
        rewards, index = answers.rewards if price is None else answers.rewards - price, prompt_index(answers.rollouts)
        greedy = partial(self._greedy_rewards, batch)
        own = is_own(answers.rollouts)
        return estimate(self.advantage, rewards, index, parts=answers.parts, greedy=greedy, own=own)

    def _update(self, minibatch: RolloutBatch, take_step: Callable[[], Metrics]) -> Metrics:
        """One optimiser step.

        Raises:
            RunStopped: the gradient is no number; the weights are those of the last good step.
        """
        try:
            return self._learn(minibatch) | take_step()
        except FloatingPointError as error:
            raise RunStopped(str(error)) from error

    def _greedy_rewards(self, batch: SpeechBatch) -> Tensor:
        """Reward of the student's greedy answer to each prompt (B,), for estimators that compare with it."""
        params = SamplingParams(max_new_tokens=self.source.max_new_tokens, temperature=0.0)
        rollouts = self.policy.generate(batch, group_size=1, params=params)
        rewards, parts = self.reward.score(rollouts)
        return self._represented(batch, Answers(rollouts=rollouts, rewards=rewards, parts=parts)).rewards

    def _represented(self, batch: SpeechBatch, answers: Answers) -> Answers:
        """The answers with the reward for their hidden states, where there is one."""
        if not isinstance(self.representation, RepresentationReward):
            return answers
        return self.representation(self.policy, batch, answers, self.model.prompt)

    def _learn(self, minibatch: RolloutBatch) -> Metrics:
        """The gradient of a minibatch, with that of the loss for its hidden states, where there is one."""
        if not isinstance(self.representation, RepresentationLoss):
            return self.policy.forward_backward(minibatch, self.objective)
        return self.representation(self.policy, minibatch, self.objective, self.model.prompt)

    # ---- Lightning -------------------------------------------------------------------------------------------------

    @property
    def policy(self) -> Policy:
        """The student."""
        return self._policy[0]

    def configure_model(self) -> None:
        if self._policy:
            return
        build_model, build_policy, _, _ = self._builders
        self.model = build_model()
        self._check_vocabularies()
        keep_start = self.objective.needs_reference or self.representation is not None
        if self.representation is not None:
            self.representation.check_layers(self.model.config.num_layers)
        self._policy.append(build_policy(model=self.model, keep_start=keep_start))

    def _check_vocabularies(self) -> None:
        """Refuse, with a ``ValueError``, who would read the student's token ids as other words."""
        readers = {f"reward.parts.{name}: ": words for name, words in self.reward.vocabularies().items()}
        if self._teacher[0] is not None:
            readers[""] = self._teacher[0].vocabulary()
        for where, vocabulary in readers.items():
            try:
                check_same_vocabulary(vocabulary, self.model.prompt.vocabulary())
            except ValueError as error:
                raise ValueError(f"{where}{error}") from None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return PolicyOptimizer(self.policy, self.controls)

    def train_dataloader(self):
        return self._builders[2](prompt=self.model.prompt, sampling_rate=self.model.sampling_rate)

    def val_dataloader(self):
        return self._builders[3](prompt=self.model.prompt, sampling_rate=self.model.sampling_rate)

    def training_step(self, batch: SpeechBatch, batch_idx: int) -> None:
        optimizer = self.optimizers()

        def take_step() -> Metrics:
            optimizer.step()  # through Lightning, which counts it
            return optimizer.optimizer.metrics

        metrics = self.align(batch, take_step)
        self.log_dict(metrics, batch_size=len(batch))
        self.log("reward", metrics["reward/mean"], prog_bar=True, logger=False, batch_size=len(batch))
        self.controls.watch(metrics)

    def validation_step(self, batch: SpeechBatch, batch_idx: int) -> None:
        rollouts, scores = self._dev_answered(batch, "val/")
        if self.validation_typed:
            _, read = self._dev_answered(typed_batch(batch, self.model.prompt), "val/typed/")
            heard = {name: scores[name.replace("typed/", "", 1)] for name in read}
            scores |= read | {name.replace("typed", "both", 1): (heard[name] + read[name]) / 2 for name in read}
        teacher_rewards, _ = self.reward.score(TeacherRollouts()(self.policy, batch, seed=0))
        self._validation.append(scores | {"val/teacher": teacher_rewards})
        self._dev_answers += rollouts if self.validation_task is not None else []

    def _dev_answered(self, batch: SpeechBatch, prefix: str) -> tuple[list[Rollout], dict[str, Tensor]]:
        """The student's answers, and their reward and its parts (B,), named with the prefix."""
        rollouts = self.policy.generate(batch, group_size=1, params=self.validation_params)
        rewards, parts = self.reward.score(rollouts)
        return rollouts, {f"{prefix}{name}": values for name, values in {"reward": rewards, **parts}.items()}

    def on_validation_epoch_end(self) -> None:
        scores = self._dev_scores() | self._task_scores()
        student, teacher = scores["val/reward"], scores["val/teacher"]
        if self.start_reward is None:
            self.start_reward = student
        for name, value in scores.items():
            self.log(name, value, prog_bar=name == "val/reward")
        self.controls.watch(scores)
        if teacher > self.start_reward:  # otherwise there is no gap to close
            gap_closed = (student - self.start_reward) / (teacher - self.start_reward)
            self.log("val/gap_closed", gap_closed, prog_bar=True)

    def _dev_scores(self) -> Metrics:
        """Mean over the dev set of every reward, over the items of all data-parallel ranks."""
        asked = ["val/", "val/typed/", "val/both/"] if self.validation_typed else ["val/"]
        names = ["val/teacher", *(f"{prefix}{name}" for prefix in asked for name in ("reward", *self.reward.names()))]
        sums = [sum(batch[name].double().sum() for batch in self._validation) for name in names]
        count = sum(len(batch["val/reward"]) for batch in self._validation)
        self._validation.clear()
        *totals, count = data_parallel_sum(torch.tensor([*sums, count], dtype=torch.float64)).tolist()
        return {name: total / count for name, total in zip(names, totals, strict=True)}

    def _task_scores(self) -> Metrics:
        """What the task makes of the dev answers of all data-parallel ranks, by the first of them: judges are paid."""
        if self.validation_task is None:
            return {}
        answers = [answer for share in data_parallel_lists(self._dev_answers) for answer in share]
        self._dev_answers = []
        found = [self.validation_task.score(answers)] if data_parallel_rank() == 0 else []
        (scores,) = data_parallel_lists(found)[0]
        return {f"val/task/{name}": value for name, value in scores.items()}

    def transfer_batch_to_device(self, batch: SpeechBatch, device, dataloader_idx: int) -> SpeechBatch:
        return batch  # the policy moves what it needs

    def sharded_state_dict(self, *, is_loading: bool) -> dict:
        """Weights and optimizer, for ``MegatronStrategy``."""
        return self.policy.sharded_state_dict(is_loading=is_loading)

    def load_sharded_state_dict(self, state_dict: dict) -> None:
        """As ``sharded_state_dict``."""
        self.policy.load_sharded_state_dict(state_dict)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["rba"] = {
            "controls": self.controls.state_dict(),
            "num_batches": self.num_batches,
            "start_reward": self.start_reward,
        }

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.controls.load_state_dict(checkpoint["rba"]["controls"])
        self.controls.begin(self.objective)
        self.num_batches = checkpoint["rba"]["num_batches"]
        self.start_reward = checkpoint["rba"]["start_reward"]


class PolicyOptimizer(torch.optim.Optimizer):
    """megatron's optimizer where Lightning expects torch's: ``step`` is ``policy.step`` at the scheduled rate."""

    def __init__(self, policy: Policy, controls: Controls):
        self._policy, self._schedule = policy, controls.schedule
        self.metrics: Metrics = {}
        super().__init__(policy.parameters(), {"lr": controls.schedule.value})

    def step(self, closure: Callable | None = None) -> None:
        if closure is not None:
            closure()
        self.metrics = self._policy.step(self._schedule.value)


def describe(answers: Answers) -> Metrics:
    """What a step's answers were like: rewards, lengths, and how many groups had nothing to compare.

    Where the teacher's answers stand among the student's own, rewards and lengths are of the own ones.
    """
    own = is_own(answers.rollouts)
    own = own if own.any() else ~own
    lengths = torch.tensor([len(rollout.token_ids) for rollout in answers.rollouts], dtype=torch.float32)
    truncated = torch.tensor([rollout.truncated for rollout in answers.rollouts], dtype=torch.float32)
    values = {
        "reward/mean": answers.rewards[own].mean(),
        "rollout/length": lengths[own].mean(),
        "rollout/truncated": truncated[own].mean(),
        "rollout/constant_groups": group_is_constant(answers.rewards, prompt_index(answers.rollouts)).float().mean(),
    }
    values |= {f"reward/{name}": scores[own].mean() for name, scores in answers.parts.items()}
    return {name: float(value) for name, value in values.items()}


def _mean(steps: Sequence[Metrics]) -> Metrics:
    """Mean over a batch's optimiser steps; ``health/`` of the first, when the sampler still was the policy."""
    mean = {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
    return mean | {name: value for name, value in steps[0].items() if name.startswith("health/")}
