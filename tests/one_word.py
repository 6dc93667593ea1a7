# SPDX-License-Identifier: Apache-2.0
"""A policy of one number and a teacher who wants to hear "yes": a loop with numbers one can do in the head."""

from types import SimpleNamespace

import torch

from nemo_rba.algorithms.advantage import LeaveOneOut
from nemo_rba.algorithms.alignment import RBAAlignment
from nemo_rba.algorithms.controllers import WarmupDecay
from nemo_rba.algorithms.controls import Controls
from nemo_rba.algorithms.objectives import ClippedPolicyLoss
from nemo_rba.algorithms.rollout import PolicyRollouts
from nemo_rba.rewards.mixture import RewardMixture
from nemo_rba.types import Instruction, Rollout, SamplingParams, SpeechBatch

VOCABULARY = {"yes": 0, "no": 1, "<end>": 2}


class FakePolicy:
    """A policy with one number: the logit of "yes" against "no"; answers are one word and the end."""

    def __init__(self):
        self.logit = torch.zeros(1, requires_grad=True)
        self.seen = []
        self.scored = []  # how many answers each time

    def _word_logprobs(self):
        return torch.cat((self.logit, -self.logit)).log_softmax(0)

    def generate(self, batch, *, group_size, params, rows=None):
        generator = torch.Generator().manual_seed(abs(params.seed))
        rollouts = []
        for row, instruction in enumerate(batch.instructions):
            if rows is not None and row not in rows:
                continue
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
        self.scored.append(len(batch))
        words = self._word_logprobs().detach() if not reference else torch.full((2,), 0.5).log()
        return torch.stack((words[batch.response_ids[:, 0]], torch.zeros(len(batch))), 1)

    def agreement(self, heard, read, layers):
        self.compared = (heard, read, layers)
        return torch.where(heard.response_ids[:, 0] == VOCABULARY["no"], 0.75, 0.25)

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


class FakePrompt:
    """One number a word."""

    pad_id = 0

    def encode_typed(self, instruction):
        return [len(word) for word in instruction.text.split()]


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
    objective, source=None, advantage=None, teacher=None, num_minibatches=1, ppo_epochs=1, importance=None,
    representation=None, schedule=None, validation_typed=False, **steering,
):  # fmt: skip
    module = RBAAlignment(
        build_model=None, build_policy=None, build_loader=None, build_validation_loader=None, teacher=teacher,
        source=source or PolicyRollouts(group_size=4, max_new_tokens=2, temperature=1.0, top_p=1.0),
        reward=RewardMixture(parts={"yes": SaysYes()}, weights={"yes": 1.0}), advantage=advantage or LeaveOneOut(),
        objective=objective, controls=Controls(schedule=schedule or constant_rate(), **steering), importance=importance,
        validation_params=SamplingParams(max_new_tokens=2), num_minibatches=num_minibatches,
        ppo_epochs=ppo_epochs, seed=3,
        representation=representation, validation_typed=validation_typed,
    )  # fmt: skip
    module.model = SimpleNamespace(prompt=FakePrompt())
    module._policy.append(FakePolicy())
    return module, lambda: module.policy.step(module.controls.schedule.value)
