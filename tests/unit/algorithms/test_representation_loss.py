# SPDX-License-Identifier: Apache-2.0
"""The loss for hidden states like a reader's: its gradient against plain autograd, and its place in the loop."""

import dataclasses
import itertools
import math

import pytest
import recipe_checks
import recipe_parts
import torch
from one_word import FakePolicy, clipped, make, speech_batch
from test_configs import load
from tiny_models import load_speech_lm, make_batch, move

from nemo_rba.algorithms.advantage import NoAdvantage
from nemo_rba.algorithms.objectives import DistillationLoss
from nemo_rba.algorithms.policy import MegatronPolicy
from nemo_rba.algorithms.representation import RepresentationLoss
from nemo_rba.algorithms.rollout import PolicyRollouts, TeacherRollouts
from nemo_rba.data.prompt import typed_batch
from nemo_rba.modules.states import watched
from nemo_rba.types import RolloutBatch

SAID = ["what is the capital of france", "say hello again please", "name a red cat"]
ANSWERS = [[[9, 13, 2], [9, 2]], [[15, 16, 17, 18, 2], [7]], [[24, 2], [27, 24, 14, 2]]]  # prompt, answer, token
ADAPTER, ALL = ["^llm", "^perception\\.(preprocessor|encoder)"], []  # frozen, where those are trained


class Nothing:
    """An objective without a gradient: what is left is that of the loss on states."""

    needs_advantages = needs_old = needs_reference = needs_teacher = False
    teacher_topk = 0

    def __call__(self, logprobs, batch):
        return 0.0 * logprobs.sum(), {"loss/nothing": logprobs.detach().sum() * 0.0}


def answered(prompt):
    """Two answers of different lengths to each of three spoken prompts: 17 tokens."""
    batch = make_batch(prompt, [0.7, 1.3, 1.0], ["", "in french", ""], ["paris", "a b", "one two"])
    said = [dataclasses.replace(item, text=text) for item, text in zip(batch.instructions, SAID, strict=True)]
    rows = [torch.tensor(ids) for group in ANSWERS for ids in group]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    return RolloutBatch(
        prompts=dataclasses.replace(batch, instructions=tuple(said)), prompt_index=torch.arange(6) // 2,
        response_ids=ids, response_mask=mask, advantages=torch.linspace(-1, 1, 6), num_loss_tokens=int(mask.sum()),
        num_loss_rollouts=6,
    )  # fmt: skip


def make_policy(folder, freeze=ALL, micro_batch_size=8, recompute=False, keep_start=True):
    return MegatronPolicy(
        model=load_speech_lm(folder), keep_start=keep_start, lora=None, freeze=freeze, generation_batch_size=2,
        micro_batch_size=micro_batch_size, weight_decay=0.0, betas=(0.9, 0.98), epsilon=1e-8, max_grad_norm=1.0,
        recompute=recompute, distributed_optimizer=False,
    )  # fmt: skip


def gradients(policy):
    return {name: p.main_grad.clone() for name, p in policy.model.named_parameters() if p.requires_grad}


def read(policy, heard):
    return typed_batch(heard.prompts, policy.model.prompt)


def learn(policy, heard, objective=None, layers=(), weight=0.5):
    """(metrics, gradients) of the loss on states, and of ``objective``."""
    metrics = policy.forward_backward(
        heard, objective or Nothing(), read=read(policy, heard), layers=layers, weight=weight
    )
    return metrics, gradients(policy)


@pytest.fixture(scope="module", params=["llama_salm", "qwen3_salm"])
def folder(request):
    return request.getfixturevalue(request.param)[0]


def plain_loss(policy, heard, layers, weight):
    """The same by autograd on the whole batch, with the states seen by hooks of torch's own."""
    seen = {}

    def states(prompts, speech):
        seen.clear()
        with watched(policy.model.llm, layers, heard.response_mask, seen.__setitem__):
            policy.model(prompts, speech, heard.response_ids, heard.response_mask, 2)
        return dict(seen)

    with torch.no_grad(), policy.at_start():
        reader = states(read(policy, heard), None)
    listener = states(heard.prompts, None)
    cosines = [(torch.nn.functional.cosine_similarity(listener[n], reader[n], dim=-1)).sum() for n in layers]
    return weight * (1 - sum(cosines) / (len(layers) * heard.num_loss_tokens))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("freeze", [ADAPTER, ALL], ids=["adapter", "all"])
def test_the_gradient_is_that_of_plain_autograd(folder, freeze, recompute):
    policy = make_policy(folder, freeze, micro_batch_size=2, recompute=recompute)
    move(policy)
    heard = answered(policy.model.prompt)
    for layers in ([1, 2], [1]):
        metrics, ours = learn(policy, heard, layers=layers)
        policy._zero_grad()
        loss = plain_loss(policy, heard, layers, 0.5)
        trained = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
        expected = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        assert metrics["loss/representation"] == pytest.approx(loss.item(), abs=1e-6)
        for (name, parameter), gradient in zip(trained.items(), expected, strict=True):
            gradient = torch.zeros_like(parameter) if gradient is None else gradient
            torch.testing.assert_close(ours[name], gradient, atol=2e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        assert max(gradient.abs().max() for gradient in ours.values()) > 1e-3


def test_the_gradient_is_that_of_a_small_step(folder):
    policy = make_policy(folder, ADAPTER)
    heard = answered(policy.model.prompt)
    _, ours = learn(policy, heard)
    weight, gradient = policy.model.perception.proj.weight, ours["perception.proj.weight"]
    row, column = divmod(int(gradient.abs().argmax()), gradient.shape[1])
    losses = []
    for step in (1e-2, -1e-2):
        with torch.no_grad():
            weight[row, column] += step
        losses.append(learn(policy, heard)[0]["loss/representation"])
        with torch.no_grad():
            weight[row, column] -= step
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(gradient[row, column].item(), rel=0.02)


@pytest.mark.parametrize("recompute", [False, True])
def test_microbatches_add_up_exactly(folder, recompute):
    found = []
    for size in (3, 2, 1):
        policy = make_policy(folder, micro_batch_size=size, recompute=recompute)
        move(policy)
        found.append(learn(policy, answered(policy.model.prompt), DistillationLoss()))
    for metrics, parts in found[1:]:
        assert metrics == pytest.approx(found[0][0], abs=1e-5)
        for name, gradient in found[0][1].items():
            torch.testing.assert_close(parts[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_it_is_added_to_the_objective_and_measures_what_the_reward_measures(folder):
    policy = make_policy(folder, micro_batch_size=1)
    move(policy)
    heard = answered(policy.model.prompt)
    alone, term = learn(policy, heard, weight=0.5)
    policy._zero_grad()
    metrics = policy.forward_backward(heard, DistillationLoss())
    without = gradients(policy)
    policy._zero_grad()
    both, together = learn(policy, heard, DistillationLoss(), weight=2.0)
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, without[name] + 4 * term[name], atol=1e-5, rtol=1e-4)
    assert both["loss/distillation"] == pytest.approx(metrics["loss/distillation"], abs=1e-6)
    assert both["loss/representation"] == pytest.approx(4 * alone["loss/representation"], abs=1e-6)
    agreement = policy.agreement(heard, dataclasses.replace(heard, prompts=read(policy, heard)), [])
    mean = (agreement * heard.response_mask.sum(1)).sum() / heard.num_loss_tokens
    assert both["representation/cosine"] == pytest.approx(mean.item(), abs=1e-5)
    assert both["representation/cosine"] < 0.99


def test_without_it_a_step_is_bit_for_bit_what_it_was(folder):
    """Before it was ever asked for, and after."""
    steps = []
    for asked in (False, True):
        policy = make_policy(folder, recompute=True)
        heard = answered(policy.model.prompt)
        if asked:
            learn(policy, heard)
            policy._zero_grad()
        metrics = policy.forward_backward(heard, DistillationLoss())
        assert not any(layer._forward_hooks for layer in policy.model.llm.decoder.layers)
        steps.append((metrics, gradients(policy)))
    assert steps[0][0] == steps[1][0]
    assert all(torch.equal(steps[1][1][name], gradient) for name, gradient in steps[0][1].items())


def test_the_adapter_learns_to_be_heard_as_it_is_read(folder):
    policy = make_policy(folder, ADAPTER)
    heard = answered(policy.model.prompt)
    cosines = []
    for _ in range(15):
        cosines.append(learn(policy, heard, weight=1.0)[0]["representation/cosine"])
        policy.step(1e-2)
    assert cosines[-1] > cosines[0] + 0.02
    assert sum(later > earlier for earlier, later in itertools.pairwise(cosines)) >= 12


def test_lora_in_bfloat16_learns_it_too(folder):
    """The start model, which reads, is the one without what the factors have learned."""
    lora = {"rank": 4, "alpha": 8, "target_modules": ["linear_qkv", "linear_fc1", "linear_fc2"], "seed": 0}
    policy = MegatronPolicy(
        model=load_speech_lm(folder, params_dtype="bfloat16"), keep_start=True, lora=lora, micro_batch_size=2,
        freeze=["^(?!.*\\.lora_[ab]$)"], generation_batch_size=2, weight_decay=0.0, betas=(0.9, 0.98), epsilon=1e-8,
        max_grad_norm=1.0, recompute=True, distributed_optimizer=False,
    )  # fmt: skip
    heard = answered(policy.model.prompt)
    typed = dataclasses.replace(heard, prompts=read(policy, heard))
    start = policy.logprobs(typed)
    cosines = []
    for _ in range(12):
        cosines.append(learn(policy, heard, weight=1.0)[0]["representation/cosine"])
        policy.step(1e-2)
    assert cosines[-1] > cosines[0] + 0.02
    assert (policy.logprobs(typed) - start).abs().max() > 0.01
    assert torch.equal(policy.logprobs(typed, reference=True), start)


def test_layers_and_a_start_model_are_asked_for(folder):
    policy = make_policy(folder, keep_start=False)
    heard = answered(policy.model.prompt)
    with pytest.raises(ValueError, match=r"layers \[3\] must be different numbers from 1 to 2"):
        learn(policy, heard, layers=[3])
    with pytest.raises(ValueError, match="no start model"):
        learn(policy, heard)


@pytest.mark.parametrize(
    ("objective", "source", "advantage"),
    [
        (clipped(), PolicyRollouts(group_size=4, max_new_tokens=5, temperature=1.0, top_p=1.0), None),
        (DistillationLoss(), TeacherRollouts(), NoAdvantage()),
    ],
    ids=["reinforcement", "distillation"],
)
def test_it_stands_beside_every_loss_in_the_loop(folder, objective, source, advantage):
    module, _ = make(
        objective, source=source, advantage=advantage, num_minibatches=2,
        representation=RepresentationLoss(weight=10.0, layers=[2]),
    )  # fmt: skip
    module._policy[0] = make_policy(folder, ADAPTER)
    module.model = module.policy.model
    spoken = answered(module.model.prompt).prompts
    history = [module.align(spoken, lambda: module.policy.step(1e-2)) for _ in range(6)]
    for line in history:
        assert line["loss/representation"] == pytest.approx(10 - 10 * line["representation/cosine"], abs=1e-6)
        assert "reward/representation" not in line
    if isinstance(objective, DistillationLoss):  # the same answers each time
        assert history[-1]["representation/cosine"] > history[0]["representation/cosine"]


def test_the_loop_hands_the_typed_prompts_to_the_policy():
    class Drawn(FakePolicy):
        def forward_backward(self, batch, objective, **asked):
            self.asked = asked
            return super().forward_backward(batch, objective)

    module, step = make(clipped(), representation=RepresentationLoss(weight=0.3, layers=[2]))
    module._policy[0] = Drawn()
    module.align(speech_batch(), step)
    assert module.policy.asked["read"].prompt_ids[0].tolist() == [3, 3, 1], "say yes 0"
    assert (module.policy.asked["layers"], module.policy.asked["weight"]) == ((2,), 0.3)
    module.representation = None
    module.align(speech_batch(), step)
    assert module.policy.asked == {}


def test_a_weight_that_does_nothing_is_refused():
    for weight in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="weight must be finite and above 0"):
            RepresentationLoss(weight=weight, layers=[])


def test_recipes_choose_it_beside_any_loss():
    for more in ([], ["objective=distillation", "rollouts=teacher", "advantage=none"]):
        chosen = load("rba_tiny", "representation=cosine_loss", "representation.layers=[1,2]", *more)
        recipe_checks.preflight(chosen)
        main, *rivals = recipe_parts.arms(chosen).values()
        assert main.representation.layers == [1, 2]
        assert not any("representation" in rival for rival in rivals)
