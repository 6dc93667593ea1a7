# SPDX-License-Identifier: Apache-2.0
"""The reward for hidden states like a reader's: its numbers against transformers, and its place in the loop."""

import dataclasses
from types import SimpleNamespace

import pytest
import recipe_checks
import recipe_parts
import torch
from one_word import clipped, make, speech_batch
from test_configs import load
from tiny_models import load_speech_lm, make_batch, move

from nemo_rba.algorithms.advantage import GreedyBaseline, LeaveOneOut, NoAdvantage, PerRewardNormalized
from nemo_rba.algorithms.collate import select, select_prompts
from nemo_rba.algorithms.objectives import DistillationLoss
from nemo_rba.algorithms.policy import MegatronPolicy
from nemo_rba.algorithms.representation import RepresentationReward
from nemo_rba.algorithms.rollout import MixedRollouts, PolicyRollouts, TeacherRollouts
from nemo_rba.data.prompt import typed_batch
from nemo_rba.modules.states import chosen_layers, watched
from nemo_rba.synthesis.teacher_salm import SALMTeacher
from nemo_rba.types import RolloutBatch

SAID = ["what is the capital of france", "say hello again please", "name a red cat"]
OTHERS = ["name a dog", "what is one two three please", "say the capital"]
ANSWERS = [[[9, 13, 2], [9, 2]], [[15, 16, 17, 18, 2], [7]], [[24, 2], [27, 24, 14, 2]]]  # prompt, answer, token


def answered(prompt, words):
    """Two answers of different lengths to each of three spoken prompts."""
    batch = make_batch(prompt, [0.7, 1.3, 1.0], ["", "in french", ""], ["a"] * 3)
    said = [dataclasses.replace(item, text=text) for item, text in zip(batch.instructions, words, strict=True)]
    rows = [torch.tensor(ids) for group in ANSWERS for ids in group]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    return RolloutBatch(
        prompts=dataclasses.replace(batch, instructions=tuple(said)), prompt_index=torch.arange(6) // 2,
        response_ids=ids, response_mask=mask, advantages=torch.zeros(6), num_loss_tokens=0, num_loss_rollouts=0,
    )  # fmt: skip


def read(heard, prompt):
    return dataclasses.replace(heard, prompts=typed_batch(heard.prompts, prompt))


def make_policy(folder, micro_batch_size=8, freeze="^perception", keep_start=True):
    return MegatronPolicy(
        model=load_speech_lm(folder), keep_start=keep_start, lora=None, freeze=[freeze], generation_batch_size=2,
        micro_batch_size=micro_batch_size, weight_decay=0.0, betas=(0.9, 0.98), epsilon=1e-8, max_grad_norm=1.0,
        recompute=True, distributed_optimizer=False,
    )  # fmt: skip


@pytest.fixture(scope="module", params=["llama_salm", "qwen3_salm"])
def folder(request):
    return request.getfixturevalue(request.param)[0]


@pytest.fixture(scope="module")
def policy(folder):
    return make_policy(folder)


@torch.no_grad()
def test_agreement_equals_plain_hidden_states_of_transformers(folder, policy):
    """The same answers after other words: every answer alone, in one sequence, by ``output_hidden_states``."""
    prompt, teacher = policy.model.prompt, SALMTeacher(path=str(folder), batch_size=2, device="cpu", dtype="float32")
    batches = [read(answered(prompt, words), prompt) for words in (SAID, OTHERS)]
    ours = policy.agreement(*batches, [1])
    for row, answer in enumerate(ids for group in ANSWERS for ids in group):
        states = []
        for batch in (batch.prompts for batch in batches):
            words = batch.prompt_ids[row // 2, : batch.prompt_lens[row // 2]]
            ids = torch.cat((words, torch.tensor(answer)))[None]
            outputs = teacher._model(ids, output_hidden_states=True)
            states.append(outputs.hidden_states[1][0, len(words) - 1 : -1])  # the position before each token
        first, second = (each / each.norm(dim=1, keepdim=True) for each in states)
        assert ours[row].item() == pytest.approx((first * second).sum(1).mean().item(), abs=2e-5)
    assert ours.max() < 0.999
    assert ours.std() > 1e-4


def test_agreement_with_itself_is_one_until_the_weights_move(folder):
    policy = make_policy(folder)
    typed = read(answered(policy.model.prompt, SAID), policy.model.prompt)
    torch.testing.assert_close(policy.agreement(typed, typed, []), torch.ones(6), atol=1e-5, rtol=0)
    move(policy)
    moved = [policy.agreement(typed, typed, layers) for layers in ([], [1], [2])]
    assert all(values.max() < 0.999 for values in moved), "the reader stays where it was"
    torch.testing.assert_close(moved[0], (moved[1] + moved[2]) / 2, atol=1e-6, rtol=0)


def last_states(policy, batch):
    """Of all real tokens after the last layer: (M, H)."""
    kept = []
    with watched(policy.model.llm, [2], batch.response_mask, lambda layer, states: kept.append(states)):
        policy.logprobs(batch)
    return torch.cat(kept)


def test_today_listens_and_the_start_model_reads(folder):
    """The way round matters: what is heard meets today's weights, what is read the first ones."""
    policy = make_policy(folder)
    one, other = (read(answered(policy.model.prompt, words), policy.model.prompt) for words in (SAID, OTHERS))
    start = last_states(policy, other)
    move(policy)
    cosines = torch.nn.functional.cosine_similarity(last_states(policy, one), start, dim=1)
    expected = torch.stack([part.mean() for part in cosines.split(one.response_mask.sum(1).tolist())])
    torch.testing.assert_close(policy.agreement(one, other, [2]), expected, atol=1e-5, rtol=0)
    assert (policy.agreement(other, one, [2]) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("freeze", ["^perception\\.(preprocessor|encoder)", "^llm"], ids=["encoder", "llm"])
def test_microbatches_padding_and_order_change_nothing(folder, freeze):
    policies = [make_policy(folder, size, freeze) for size in (3, 1)]
    for policy in policies:
        move(policy)
    prompt = policies[0].model.prompt
    heard = answered(prompt, SAID)
    together, apart = (policy.agreement(heard, read(heard, prompt), []) for policy in policies)
    torch.testing.assert_close(apart, together, atol=1e-5, rtol=0)
    for name in ("response_ids", "response_mask"):
        wide = torch.nn.functional.pad(getattr(heard, name), (0, 4))
        heard = dataclasses.replace(heard, **{name: wide})
    order = torch.tensor([2, 0, 1])
    rows = torch.cat([torch.arange(2) + 2 * row for row in order.tolist()])
    turned = dataclasses.replace(
        heard, prompts=select_prompts(heard.prompts, order), response_ids=heard.response_ids[rows],
        response_mask=heard.response_mask[rows],
    )  # fmt: skip
    found = policies[0].agreement(turned, read(turned, prompt), [])
    torch.testing.assert_close(found, together[rows], atol=1e-5, rtol=0)
    one = select(heard, torch.tensor([1]))
    found = policies[0].agreement(one, read(one, prompt), [])
    torch.testing.assert_close(found, together[2:4], atol=1e-5, rtol=0)
    assert together.max() < 0.999
    assert len(together.unique()) == 6


def test_it_leaves_the_model_as_it_was(policy):
    heard = answered(policy.model.prompt, SAID)
    before = policy.logprobs(heard)
    policy.agreement(heard, read(heard, policy.model.prompt), [2])
    assert torch.equal(policy.logprobs(heard), before)
    assert not any(layer._forward_hooks for layer in policy.model.llm.decoder.layers)


def test_layers_and_start_model_are_asked_for(folder, policy):
    assert chosen_layers([], 3) == [1, 2, 3]
    assert chosen_layers([3, 1], 3) == [3, 1]
    heard = answered(policy.model.prompt, SAID)
    with pytest.raises(
        ValueError, match=r"layers \[0, 3\] must be different numbers from 1 to 2.*representation\.layers"
    ):
        policy.agreement(heard, heard, [0, 3])
    with pytest.raises(ValueError, match=r"layers \[2, 2\] must be different"):
        chosen_layers([2, 2], 2)
    with pytest.raises(ValueError, match="no start model"):
        make_policy(folder, keep_start=False).agreement(heard, heard, [])


def test_the_loop_keeps_a_start_model_and_refuses_layers_that_are_not_there():
    asked = []

    def build_policy(*, model, keep_start):
        asked.append(keep_start)

    model = SimpleNamespace(config=SimpleNamespace(num_layers=4))
    for layers in ([], [5]):
        module, _ = make(clipped(), representation=RepresentationReward(weight=1.0, layers=layers))
        module._policy.clear()
        module._builders = (lambda: model, build_policy, None, None)
        if layers:
            with pytest.raises(ValueError, match=r"layers \[5\] must be different numbers from 1 to 4"):
                module.configure_model()
        else:
            module.configure_model()
    assert asked == [True]


def test_the_loop_learns_to_agree():
    """SaysYes gives 1 for "yes", the states 3 * 0.25 for "yes" and 3 * 0.75 for "no": 1.75 against 2.25."""
    module, step = make(clipped(), representation=RepresentationReward(weight=3.0, layers=[2]))
    history = [module.align(speech_batch(), step) for _ in range(40)]
    for line in (history[0], history[-1]):
        assert line["reward/representation"] == pytest.approx(0.75 - 0.5 * line["reward/yes"])
        assert line["reward/mean"] == pytest.approx(line["reward/yes"] + 3 * line["reward/representation"])
    assert sum(line["reward/representation"] for line in history[-5:]) / 5 > 0.7
    says_no = module.policy.seen[0].response_ids[:, 0] == 1
    assert (module.policy.seen[0].advantages[says_no] > 0).all()
    assert (module.policy.seen[0].advantages[~says_no] < 0).all()
    heard, words, layers = module.policy.compared
    assert (heard.prompts.is_typed, words.prompts.is_typed, layers) == (False, True, (2,))
    assert words.prompts.prompt_ids[0].tolist() == [3, 3, 1], "say yes 0"
    assert torch.equal(words.response_ids, heard.response_ids)


def test_a_real_student_gets_it_and_learns_from_it(folder):
    """Nothing else is rewarded: no answer of random weights is "yes"."""
    source = PolicyRollouts(group_size=4, max_new_tokens=5, temperature=1.0, top_p=1.0)
    module, _ = make(clipped(), source=source, representation=RepresentationReward(weight=2.0, layers=[]))
    module._policy[0] = make_policy(folder, freeze="^perception\\.(preprocessor|encoder)")
    module.model = module.policy.model
    spoken = answered(module.model.prompt, SAID).prompts
    metrics = module.align(spoken, lambda: module.policy.step(1e-3))
    assert metrics["reward/mean"] == pytest.approx(2 * metrics["reward/representation"])
    assert -1 < metrics["reward/representation"] < 1
    assert metrics["grad_norm"] > 0
    assert metrics["rollout/silent_groups"] < 1


@pytest.mark.parametrize(
    "advantage",
    [
        GreedyBaseline(),
        PerRewardNormalized(weights={"yes": 1.0, "representation": 3.0}, epsilon=1e-4, batch_normalize=True),
    ],
)
def test_every_estimator_sees_it(advantage):
    module, step = make(clipped(), advantage=advantage, representation=RepresentationReward(weight=3.0, layers=[]))
    history = [module.align(speech_batch(), step) for _ in range(40)]
    assert sum(line["reward/yes"] for line in history[-5:]) / 5 < 0.15


def test_a_greedy_answer_is_rewarded_alike():
    module, _ = make(clipped(), advantage=GreedyBaseline(), representation=RepresentationReward(weight=3.0, layers=[]))
    assert set(module._greedy_rewards(speech_batch()).tolist()) <= {1.75, 2.25}


def test_what_it_could_not_change_is_refused():
    reward = RepresentationReward(weight=1.0, layers=[])
    with pytest.raises(ValueError, match="representation is a reward, and DistillationLoss takes none"):
        make(DistillationLoss(), source=TeacherRollouts(), representation=reward)
    with pytest.raises(ValueError, match="representation is a reward, and NoAdvantage takes none"):
        make(clipped(), advantage=NoAdvantage(), representation=reward)
    mixed = MixedRollouts(group_size=3, max_new_tokens=2, temperature=1.0, top_p=1.0)
    with pytest.raises(ValueError, match="rewards the student's own answers, but MixedRollouts gives others as well"):
        make(clipped(), source=mixed, advantage=LeaveOneOut(), representation=reward)
    parts = PerRewardNormalized(weights={"yes": 1.0}, epsilon=1e-4, batch_normalize=True)
    with pytest.raises(ValueError, match=r"weights for \['yes'\], expected one for 'representation' as well"):
        make(clipped(), advantage=parts, representation=reward)
    with pytest.raises(ValueError, match="weight must be finite, got nan"):
        RepresentationReward(weight=float("nan"), layers=[])
    module, step = make(clipped(), representation=reward)
    module.reward.parts["representation"] = module.reward.parts["yes"]
    module.reward.weights["representation"] = 1.0
    with pytest.raises(ValueError, match="has a part named 'representation' already"):
        module.align(speech_batch(), step)


def test_recipes_choose_it_for_the_main_arm_alone():
    own = ["rollouts=policy", "representation=cosine"]
    plain, chosen = load("rba_tiny"), load("rba_tiny", *own, "representation.layers=[1,2]")
    assert "representation" not in recipe_parts.keys(plain, recipe_parts.ALIGNMENT), (
        "runs without it are what they were"
    )
    assert recipe_parts.keys(chosen, recipe_parts.ALIGNMENT)["representation"]["layers"] == [1, 2]
    main, *rivals = recipe_parts.arms(chosen).values()
    assert "representation" in main
    assert rivals
    assert not any("representation" in rival for rival in rivals)
    for arm in (main, *rivals):
        recipe_checks.check_arm(arm)
    weights = "advantage.weights={obeys:1.0,chrf:0.3,exact:0.2,representation:0.5}"
    recipe_checks.check_arm(load("rba_tiny", *own, "advantage=per_reward_normalized", weights))
    with pytest.raises(ValueError, match="ForwardKLLoss takes none"):
        recipe_checks.check_arm(load("rba_tiny", "representation=cosine", "objective=forward_kl", "rollouts=teacher"))
