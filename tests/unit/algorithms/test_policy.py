# SPDX-License-Identifier: Apache-2.0
"""The policy: gradients against plain autograd, and the invariances of its batches."""

import dataclasses
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from tiny_models import load_speech_lm, make_batch

from nemo_rba.algorithms.collate import collate, prompt_index
from nemo_rba.algorithms.frozen_policy import FrozenPolicy
from nemo_rba.algorithms.objectives import ClippedPolicyLoss, DistillationLoss
from nemo_rba.algorithms.policy import FixedDecodePolicy, MegatronPolicy
from nemo_rba.algorithms.rollout import MixedRollouts, PolicyRollouts, TeacherRollouts
from nemo_rba.algorithms.speech_cache import SpeechCache
from nemo_rba.models.rba_speech_lm import RBASpeechLM
from nemo_rba.types import SamplingParams

SETTINGS = dict(
    weight_decay=0.0,
    betas=(0.9, 0.98),
    epsilon=1e-8,
    max_grad_norm=1.0,
    generation_batch_size=8,
    recompute=False,
    distributed_optimizer=False,
)
CONF = Path(__file__).resolve().parents[3] / "conf"
FROZEN_ENCODER = ["^perception\\.(preprocessor|encoder)"]


def make_policy(folder, micro_batch_size=8, freeze=FROZEN_ENCODER, keep_start=False):
    return MegatronPolicy(
        model=load_speech_lm(folder),
        keep_start=keep_start,
        lora=None,
        freeze=freeze,
        micro_batch_size=micro_batch_size,
        **SETTINGS,
    )


def policy_gradient(kl=0.0):
    return ClippedPolicyLoss(
        clip_low=0.2, clip_high=0.2, kl_coefficient=kl, kl_estimator="k3", dense_weight=0.0, dense_clip=5.0,
        aggregation="token_mean",
    )  # fmt: skip


def rollout_batch(policy, batch, objective, group_size=4):
    source = PolicyRollouts(group_size=group_size, max_new_tokens=12, temperature=1.0, top_p=1.0)
    rollouts = source(policy, batch, seed=1)
    advantages = torch.linspace(-1, 1, len(rollouts))
    (whole,) = collate(batch, rollouts, advantages, policy=policy, objective=objective, teacher=None, num_minibatches=1)
    return rollouts, whole


def gradients(policy):
    return {n: p.main_grad.clone() for n, p in policy.model.named_parameters() if p.requires_grad}


@pytest.fixture
def speech_batch(speech_lm):
    contexts = ["", "transcribe", "in french please", ""]
    return make_batch(speech_lm.prompt, [0.7, 1.3, 1.0, 0.9], contexts, ["paris", "hello again", "a b c", "one two"])


def test_gradient_equals_plain_autograd(llama_salm, speech_batch):
    policy = make_policy(llama_salm[0], micro_batch_size=2)
    rollouts, whole = rollout_batch(policy, speech_batch, policy_gradient())
    metrics = policy.forward_backward(whole, policy_gradient())
    ours = gradients(policy)
    plain = load_speech_lm(llama_salm[0])
    loss, tokens = 0.0, whole.num_loss_tokens
    for rollout, advantage in zip(rollouts, whole.advantages, strict=True):
        row = rollout.prompt_index
        alone = make_batch_row(speech_batch, row)
        ids = rollout.token_ids[None]
        logits = plain(alone, None, ids, torch.ones_like(ids, dtype=torch.bool), 1)
        logprobs = logits.log_softmax(-1).gather(1, ids.T)[:, 0]
        loss = loss - (advantage * (logprobs - logprobs.detach()).exp()).sum() / tokens
    loss.backward()
    for name, parameter in plain.named_parameters():
        if name in ours:
            torch.testing.assert_close(ours[name], parameter.grad, atol=2e-6, rtol=1e-4, msg=name)
    assert abs(metrics["loss/policy"] - loss.item()) < 1e-5
    assert not any(name.startswith("perception.encoder") for name in ours)


def make_batch_row(batch, row):
    from nemo_rba.algorithms.collate import select_prompts

    return select_prompts(batch, torch.tensor([row]))


def test_microbatches_give_the_same_gradient(llama_salm, speech_batch):
    whole_policy, split_policy = make_policy(llama_salm[0], 4), make_policy(llama_salm[0], 1)
    _, whole = rollout_batch(whole_policy, speech_batch, policy_gradient())
    one = whole_policy.forward_backward(whole, policy_gradient())
    four = split_policy.forward_backward(whole, policy_gradient())
    a, b = gradients(whole_policy), gradients(split_policy)
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=1e-4, msg=name)  # padding moves rounding
    assert one.keys() == four.keys()
    for name in one:
        assert one[name] == pytest.approx(four[name], abs=1e-5)


def test_generation_batch_size_changes_nothing(llama_salm, speech_batch):
    policy = make_policy(llama_salm[0])
    params = SamplingParams(max_new_tokens=10, seed=4)
    together = policy.generate(speech_batch, group_size=3, params=params)
    policy.generation_batch_size = 1
    apart = policy.generate(speech_batch, group_size=3, params=params)
    assert [r.token_ids.tolist() for r in together] == [r.token_ids.tolist() for r in apart]
    assert [r.prompt_index for r in apart] == [i // 3 for i in range(12)]


def test_teacher_forced_equals_sampled_and_reference_stays(llama_salm, speech_batch):
    policy = make_policy(llama_salm[0], keep_start=True)
    objective = policy_gradient(kl=0.1)
    _, whole = rollout_batch(policy, speech_batch, objective)
    torch.testing.assert_close(policy.logprobs(whole), whole.old_logprobs, atol=1e-4, rtol=0)
    torch.testing.assert_close(whole.ref_logprobs, whole.old_logprobs, atol=1e-4, rtol=0)
    policy.forward_backward(whole, objective)
    policy.step(1e-2)
    moved = policy.logprobs(whole)
    assert (moved - whole.old_logprobs).abs().max() > 1e-2
    torch.testing.assert_close(policy.logprobs(whole, reference=True), whole.ref_logprobs, atol=1e-6, rtol=0)


def test_answers_of_both_kinds_have_the_students_log_probabilities(llama_salm, speech_batch):
    policy = make_policy(llama_salm[0], micro_batch_size=6)
    source = MixedRollouts(group_size=3, max_new_tokens=12, temperature=1.0, top_p=1.0)
    (whole,) = collate(
        speech_batch, source(policy, speech_batch, seed=1), torch.zeros(12), policy=policy, objective=policy_gradient(),
        teacher=None, num_minibatches=1,
    )  # fmt: skip
    forced, mask = policy.logprobs(whole), whole.response_mask
    torch.testing.assert_close(whole.old_logprobs[mask], forced[mask], atol=1e-4, rtol=0)


def test_distillation_learns_the_teachers_words(llama_salm, speech_batch):
    policy = make_policy(llama_salm[0])
    rollouts = TeacherRollouts()(policy, speech_batch, seed=0)
    (whole,) = collate(
        speech_batch, rollouts, torch.zeros(4), policy=policy, objective=DistillationLoss(), teacher=None,
        num_minibatches=1,
    )  # fmt: skip
    losses = []
    for _ in range(30):
        losses.append(policy.forward_backward(whole, DistillationLoss())["loss/distillation"])
        policy.step(5e-3)
    assert losses[-1] < 0.1 * losses[0]
    greedy = policy.generate(speech_batch, group_size=1, params=SamplingParams(max_new_tokens=8, temperature=0))
    assert [r.response for r in greedy] == [i.response for i in speech_batch.instructions]


def test_minibatches_keep_groups_and_count_their_own_tokens(llama_salm, speech_batch):
    policy = make_policy(llama_salm[0])
    objective = policy_gradient()
    rollouts, _ = rollout_batch(policy, speech_batch, objective)
    parts = list(
        collate(
            speech_batch, rollouts, torch.zeros(16), policy=policy, objective=objective, teacher=None, num_minibatches=2
        )
    )
    assert [p.prompt_index.unique().tolist() for p in parts] == [[0, 1], [2, 3]]
    assert [p.num_loss_rollouts for p in parts] == [8, 8]
    assert sum(p.num_loss_tokens for p in parts) == sum(len(r.token_ids) for r in rollouts)
    assert prompt_index(rollouts).tolist() == [i // 4 for i in range(16)]


def test_trainable_encoder_gets_a_gradient(llama_salm, speech_batch):
    policy = make_policy(llama_salm[0], freeze=["^llm\\."])
    _, whole = rollout_batch(policy, speech_batch, policy_gradient())
    policy.forward_backward(whole, policy_gradient())
    grads = gradients(policy)
    assert any(n.startswith("perception.encoder") and g.abs().max() > 0 for n, g in grads.items())
    assert not any(n.startswith("llm.") for n in grads)


def test_bad_gradient_leaves_the_weights(llama_salm, speech_batch):
    policy = make_policy(llama_salm[0])
    _, whole = rollout_batch(policy, speech_batch, policy_gradient())
    before = {n: p.clone() for n, p in policy.model.named_parameters()}
    policy.forward_backward(dataclasses.replace(whole, advantages=whole.advantages * torch.inf), policy_gradient())
    with pytest.raises(FloatingPointError, match="nan"):
        policy.step(1e-3)
    assert all(torch.equal(p, before[n]) for n, p in policy.model.named_parameters())


def test_freeze_patterns_are_checked(llama_salm):
    with pytest.raises(ValueError, match="matches no parameter"):
        make_policy(llama_salm[0], freeze=["^encoder"])
    with pytest.raises(ValueError, match="nothing to train"):
        make_policy(llama_salm[0], freeze=["."])


def test_speech_cache_hears_what_the_encoder_hears(llama_salm, speech_batch):
    cache, model = SpeechCache(), load_speech_lm(llama_salm[0])
    params = SamplingParams(max_new_tokens=8, temperature=0)

    def answers(model, batch, cache):
        policy = FrozenPolicy(model=model, generation_batch_size=8, speech_cache=cache)
        return [r.token_ids.tolist() for r in policy.generate(batch, group_size=1, params=params)]

    other = load_speech_lm(llama_salm[0])
    with torch.no_grad():
        other.llm.decoder.final_layernorm.weight.mul_(-1)
    alone = [answers(each, speech_batch, None) for each in (model, other)]
    calls = []
    for each in (model, other):
        each.encode = lambda batch, encode=each.encode: calls.append(1) or encode(batch)
    assert [answers(each, speech_batch, cache) for each in (model, other)] == alone
    assert len(calls) == 1
    louder = dataclasses.replace(speech_batch, audio=speech_batch.audio * 2)
    answers(model, louder, cache)
    with torch.no_grad():
        next(other.perception.encoder.parameters()).add_(0.1)
    answers(other, speech_batch, cache)
    assert len(calls) == 3, "other audio or another encoder is heard anew"


def test_weight_decay_spares_norms_and_biases(llama_salm):
    policy = MegatronPolicy(
        model=load_speech_lm(llama_salm[0]), keep_start=False, lora=None, freeze=FROZEN_ENCODER, micro_batch_size=8,
        **SETTINGS | {"weight_decay": 0.1},
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    policy.step(1e-1)  # no gradient: what moves is decay
    for name, parameter in policy.model.named_parameters():
        shrink = 0.99 if parameter.dim() > 1 and parameter.requires_grad else 1.0
        torch.testing.assert_close(parameter.detach(), shrink * before[name], msg=name)


def test_what_is_frozen_has_no_gradient_and_no_optimizer_state(llama_salm, speech_batch):
    policy = make_policy(llama_salm[0], freeze=["^llm\\.", "^perception\\.(preprocessor|encoder)"])
    _, whole = rollout_batch(policy, speech_batch, policy_gradient())
    policy.forward_backward(whole, policy_gradient())
    policy.step(1e-3)
    trained = {name for name, p in policy.model.named_parameters() if hasattr(p, "main_grad")}
    assert trained == {"perception.proj.weight", "perception.proj.bias"}
    states = policy.optimizer.state_dict()["state"].values()
    assert sum(state["exp_avg"].numel() for state in states) == sum(p.numel() for p in policy.parameters())


@pytest.mark.parametrize("recompute", [False, True])
def test_lora_alone_learns_and_is_merged_into_what_is_saved(llama_salm, speech_batch, tmp_path, recompute):
    lora = {"rank": 4, "alpha": 8, "target_modules": ["linear_qkv", "linear_fc1", "linear_fc2"], "seed": 0}
    policy = MegatronPolicy(
        model=load_speech_lm(llama_salm[0]), keep_start=True, lora=lora, freeze=["^(?!.*\\.lora_[ab]$)"],
        micro_batch_size=8, **SETTINGS | {"recompute": recompute},
    )  # fmt: skip
    params = SamplingParams(max_new_tokens=10, temperature=0)
    words = [[r.response for r in policy.generate(speech_batch, group_size=1, params=params)]]
    _, whole = rollout_batch(policy, speech_batch, policy_gradient())
    start = policy.logprobs(whole)
    for step in range(4):
        policy.forward_backward(whole, policy_gradient())
        assert step == 0 or all(gradient.abs().max() > 0 for gradient in gradients(policy).values())
        policy.step(3e-2)
    torch.testing.assert_close(policy.logprobs(whole, reference=True), start, atol=1e-5, rtol=0)
    answers = policy.generate(speech_batch, group_size=1, params=params)
    words.append([r.response for r in answers])
    assert words[0] != words[1]
    policy.model.save_to(tmp_path / "merged.nemo")
    restored = RBASpeechLM.restore_from(tmp_path / "merged.nemo")
    assert not any("lora" in name for name in restored.state_dict())
    again = FrozenPolicy(model=restored, generation_batch_size=8, speech_cache=None)
    found = again.generate(speech_batch, group_size=1, params=params)
    for one, other in zip(answers, found, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("distributed_optimizer", [False, True])
def test_bfloat16_learns_with_float32_main_weights(qwen3_salm, speech_batch, distributed_optimizer):
    losses = {}
    for dtype in ("float32", "bfloat16"):
        policy = MegatronPolicy(
            model=load_speech_lm(qwen3_salm[0], params_dtype=dtype), keep_start=False, lora=None, micro_batch_size=2,
            freeze=FROZEN_ENCODER, **SETTINGS | {"distributed_optimizer": distributed_optimizer, "recompute": True},
        )  # fmt: skip
        rollouts = TeacherRollouts()(policy, speech_batch, seed=0)
        (whole,) = collate(
            speech_batch, rollouts, torch.zeros(4), policy=policy, objective=DistillationLoss(), teacher=None,
            num_minibatches=1,
        )  # fmt: skip
        losses[dtype] = []
        for _ in range(8):
            losses[dtype].append(policy.forward_backward(whole, DistillationLoss())["loss/distillation"])
            policy.step(2.5e-3)  # at twice that rounding grows, to 4 % on some processors
    assert {p.dtype for p in policy.parameters()} == {torch.bfloat16}
    assert {p.dtype for group in policy.optimizer.param_groups for p in group["params"]} == {torch.float32}
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.03)
    assert losses["bfloat16"][-1] < 0.2 * losses["bfloat16"][0]


def composed(recipe, *overrides):
    with initialize_config_dir(str(CONF), version_base=None):
        return compose(recipe, overrides=list(overrides)).policy


def test_one_override_makes_any_policy_sample_in_fixed_shapes():
    for recipe, overrides in {"rba_tiny": [], "rba_8b_lora": ["policy.lora.rank=8"]}.items():
        plain, fixed = (
            composed(recipe, *overrides),
            composed(recipe, "+decode@policy=fixed", "policy.decode.keep=false", *overrides),
        )
        assert fixed._target_.endswith(".FixedDecodePolicy")
        assert fixed.decode.keep is False
        assert {key for key in fixed if key not in plain} == {"decode"}
        assert all(fixed[key] == value for key, value in plain.items() if key != "_target_")


def test_fixed_shapes_give_the_same_answers_before_and_after_an_update(llama_salm, speech_batch):
    cfg = composed("rba_tiny", "+decode@policy=fixed")
    plain, fixed = (
        instantiate(settings)(model=load_speech_lm(llama_salm[0]), keep_start=True)
        for settings in (composed("rba_tiny"), cfg)
    )
    assert (type(plain), type(fixed)) == (MegatronPolicy, FixedDecodePolicy)
    params, words = SamplingParams(max_new_tokens=20, seed=4), []

    def compare():
        both = [policy.generate(speech_batch, group_size=4, params=params) for policy in (plain, fixed)]
        for one, other in zip(*both, strict=True):
            assert one.token_ids.tolist() == other.token_ids.tolist()
            assert (one.prompt_index, one.truncated) == (other.prompt_index, other.truncated)
            torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-5, rtol=0)
        words.append([rollout.response for rollout in both[0]])

    compare()
    _, whole = rollout_batch(plain, speech_batch, policy_gradient())
    for policy in (plain, fixed):
        policy.forward_backward(whole, policy_gradient())
        policy.step(1e-2)
    compare()
    with plain.at_start(), fixed.at_start():
        compare()
    compare()
    assert words[0] == words[2] != words[1] == words[3]


def test_pipeline_stages_and_fixed_shapes_are_refused_when_a_policy_is_built(llama_salm, monkeypatch):
    model = load_speech_lm(llama_salm[0])
    monkeypatch.setattr("nemo_rba.distributed.pipeline.num_stages", lambda: 2)
    with pytest.raises(ValueError, match="leave `decode` out"):
        instantiate(composed("rba_tiny", "+decode@policy=fixed"))(model=model, keep_start=False)
