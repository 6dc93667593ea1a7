# SPDX-License-Identifier: Apache-2.0
"""A plan's arithmetic against a real model: its parameters, buffers, optimizer, activations and caches are counted."""

import dataclasses
import json

import forked
import pytest
import torch
from tiny_models import load_speech_lm, make_batch

import nemo_rba.modules.generation as generation
from nemo_rba.algorithms.objectives import DistillationLoss
from nemo_rba.algorithms.policy import MegatronPolicy
from nemo_rba.modules.attention import DecodePlan
from nemo_rba.modules.fixed_decode import FixedDecode
from nemo_rba.plan.memory import cache_capacity
from nemo_rba.types import RolloutBatch, SamplingParams

B, G, T, V = 2, 3, 40, 64
FREEZE = [r"^perception\.(preprocessor|encoder)"]
ACTIVATION_TOLERANCE = 0.02
TINY = [
    "--config-name=rba_tiny", "trainer.devices=1", f"data.batch_size={B}", f"data.validation_batch_size={B}",
    f"policy.micro_batch_size={B}", f"rollouts.group_size={G}", f"rollouts.max_new_tokens={T}", "num_minibatches=1",
    "validation.max_new_tokens=8", "data.max_duration_seconds=2.0", "plan.prompt_tokens=7", "rollouts=policy",
    "objective=rba",
]  # fmt: skip
SPREAD = ["trainer.devices=4", "model.tensor_model_parallel_size=2"]
TP2_PP2 = ["model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2", "data.batch_size=32"]
AS_RIVAL = ["rollouts=teacher"]
EIGHT_BILLION = {
    "8b": ["--config-name=rba_8b"],
    "8b_tp2_pp2": ["--config-name=rba_8b", *TP2_PP2],
    "8b_forward_kl": ["--config-name=rba_8b", *AS_RIVAL, "objective=forward_kl"],
    "8b_sft": ["--config-name=rba_8b", *AS_RIVAL, "objective=distillation"],
    "8b_mixed": ["--config-name=rba_8b", "rollouts=mixed_fresh", "objective=rba_judged"],
    "8b_2_nodes": ["--config-name=rba_8b", "trainer.num_nodes=2", "data.batch_size=16"],
    "8b_lora": ["--config-name=rba_8b_lora"],
    "8b_lora_tp2_pp2": ["--config-name=rba_8b_lora", *TP2_PP2],
}
RUNS = EIGHT_BILLION | {
    "llama": TINY,
    "qwen3": TINY,
    "llama_fixed": [*TINY, "+decode@policy=fixed", "policy.decode.prompt_multiple=16"],
    "llama_fixed_freed": [*TINY, "+decode@policy=fixed", "policy.decode.keep=false"],
    "llama_compared": [*TINY, "representation=cosine_loss"],
    "llama_compared_again": [*TINY, "representation=cosine_loss", "policy.recompute=true"],
    "tp2_sp": [*TINY, *SPREAD, "model.sequence_parallel=true"],
    "tp2_pp2": [*TINY, *SPREAD, "model.pipeline_model_parallel_size=2"],
    "8b_wasteful": ["--config-name=rba_8b", "policy.recompute=false"],
    "8b_roomy": ["--config-name=rba_8b", "plan.gpu_gib=100000"],
    "unfrozen": [*TINY, "policy.freeze=[perception.proj]"],
    "8b_thrifty": ["--config-name=rba_8b", "policy.recompute=true", "policy.distributed_optimizer=true"],
    "odd": [*TINY, "trainer.devices=3", "model.tensor_model_parallel_size=2"],
}


@pytest.fixture(scope="module")
def plans(tmp_path_factory, llama_salm, qwen3_salm):
    """Every run's plan by name, and what was printed: all by the command, in one process."""
    folder = tmp_path_factory.mktemp("plans")
    lines = []
    for name, overrides in RUNS.items():
        salm = (qwen3_salm if name == "qwen3" else llama_salm)[0]
        where = [] if name.startswith("8b") else [f"model.folder={salm}"]
        lines.append([*overrides, *where, f"plan.json={folder / name}.json"])
    log = folder / "log"
    process = forked.start(run_plans, lines, log=log, env={"HYDRA_FULL_ERROR": "1"})
    process.join()
    assert process.exitcode == 0, log.read_text()[-3000:]
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}, log.read_text()


def run_plans(lines: list[list[str]]) -> None:
    for arguments in lines:
        try:
            forked.run_script(str(forked.ROOT / "examples" / "rba_plan.py"), *arguments)
        except SystemExit as stop:
            print(stop)


def item(plan: dict, name: str) -> int:
    """Bytes of one line of the memory table."""
    (found,) = [line["bytes"] for line in plan["memory"] if line["name"] == name]
    return found


def storages(value, found: dict[int, int] | None = None) -> dict[int, int]:
    """Bytes of every storage below a nest of dicts and lists, by storage."""
    found = {} if found is None else found
    if isinstance(value, torch.Tensor):
        found[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            storages(part, found)
    return found


def fake_rollouts(model) -> RolloutBatch:
    """B prompts of two seconds, each with G answers of T tokens."""
    prompts = make_batch(model.prompt, [2.0] * B, ["transcribe"] * B, ["paris"] * B)
    assert prompts.prompt_lens.tolist() == [7] * B
    return RolloutBatch(
        prompts=prompts,
        prompt_index=torch.arange(B).repeat_interleave(G),
        response_ids=torch.randint(4, 40, (B * G, T), generator=torch.Generator().manual_seed(0)),
        response_mask=torch.ones(B * G, T, dtype=torch.bool),
        advantages=torch.ones(B * G),
        num_loss_tokens=B * G * T,
        num_loss_rollouts=B * G,
    )


def make_policy(model) -> MegatronPolicy:
    return MegatronPolicy(
        model=model, keep_start=True, lora=None, freeze=FREEZE, micro_batch_size=B, generation_batch_size=B,
        weight_decay=0.0, betas=(0.9, 0.98), epsilon=1e-8, max_grad_norm=1.0, recompute=False,
        distributed_optimizer=False,
    )  # fmt: skip


def saved_bytes(model, policy, **settings) -> int:
    """Bytes that one real ``forward_backward`` saves for its gradient."""
    weights, saved, alive = storages([*model.parameters(), *policy._start]), {}, []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage.nbytes()
            alive.append(tensor)  # so that no other tensor takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy.forward_backward(fake_rollouts(model), DistillationLoss(), **settings)
    return sum(saved.values())


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def updated(request, llama_salm, qwen3_salm):
    """(family, model, policy, bytes saved for backward) after one real update."""
    model = load_speech_lm({"llama": llama_salm, "qwen3": qwen3_salm}[request.param][0])
    policy = make_policy(model)
    saved = saved_bytes(model, policy)
    policy.step(1e-3)
    return request.param, model, policy, saved


def test_parameters_are_those_of_the_real_model(plans, updated):
    family, model, _, _ = updated
    plan = plans[0][family]
    parts = {"encoder": 0, "adapter": 0, "LLM": 0}
    for name, parameter in model.named_parameters():
        inside = name.startswith(("perception.encoder.", "perception.preprocessor."))
        parts["encoder" if inside else "adapter" if name.startswith("perception.") else "LLM"] += parameter.numel()
    assert {part: plan["parameters"][part]["per_gpu"] for part in parts} == parts
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan["parameters"]["all"]["trained"] == trained
    assert item(plan, "weights") == sum(x.nbytes for x in [*model.parameters(), *model.buffers()])


def test_gradients_and_optimizer_state_are_exact(plans, updated):
    family, _, policy, _ = updated
    assert item(plans[0][family], "reference weights") == sum(x.nbytes for x in policy._start)
    assert item(plans[0][family], "gradients") == sum(buffer.grad_data.nbytes for buffer in policy._ddp.buffers)
    (inner,) = policy.optimizer.chained_optimizers
    state = storages(list(inner.optimizer.state.values()))
    assert item(plans[0][family], "optimizer state") == sum(state.values())


def test_activations_are_close(plans, updated):
    family, _, _, saved = updated
    log_softmax = B * G * T * (4 * V + 8)
    planned = item(plans[0][family], "activations") + log_softmax
    assert planned == pytest.approx(saved, rel=ACTIVATION_TOLERANCE)


def test_kv_cache_is_exact(plans, updated, monkeypatch):
    family, model, _, _ = updated
    made = []

    class Recorded(DecodePlan):
        def __post_init__(self):
            super().__post_init__()
            made.append(self)

    monkeypatch.setattr(generation, "DecodePlan", Recorded)
    prompts = fake_rollouts(model).prompts
    embeddings, valid = model.embed_prompts(prompts, model.encode(prompts))
    generation.generate(
        model.llm, embeddings, valid, ids=["a", "b"], group_size=G, end_id=-1, banned_ids=torch.tensor([0]),
        params=SamplingParams(max_new_tokens=T, temperature=1.0, top_p=1.0, seed=0),
    )  # fmt: skip
    (cache,) = made
    tensors = [x for layer in (*cache.prefix.values(), *cache.own.values()) for x in layer]
    plan = plans[0][family]
    assert item(plan, "KV cache") == sum(x.nbytes for x in tensors)
    held = sum(storages(tensors).values())
    assert item(plan, "KV cache") == held


def test_memory_of_a_fixed_decode_is_exact(plans, llama_salm):
    model = load_speech_lm(llama_salm[0])
    decode = FixedDecode(check_every=16, prompt_multiple=16, keep=True)
    prompts = fake_rollouts(model).prompts
    embeddings, valid = model.embed_prompts(prompts, model.encode(prompts))
    decode.generate(
        model.llm, embeddings, valid, noise=torch.rand(B, G, T, dtype=torch.float64), end_id=1,
        banned_ids=torch.tensor([0]), params=SamplingParams(max_new_tokens=T, temperature=1.0, top_p=1.0, seed=0),
    )  # fmt: skip
    kept = {field.name: getattr(decode.kept, field.name) for field in dataclasses.fields(decode.kept)}
    tensors = [*kept.values(), kept["rotary"].cos, kept["rotary"].sin]
    plan, freed = plans[0]["llama_fixed"], plans[0]["llama_fixed_freed"]
    assert item(plan, "KV cache of fixed shape") == sum(storages(tensors).values())
    assert [line["phase"] for line in plan["memory"] if line["name"] == "KV cache of fixed shape"] == ["always"]
    assert freed["peak"]["bytes"] < plan["peak"]["bytes"]


def test_compared_states_are_counted(plans, llama_salm):
    model = load_speech_lm(llama_salm[0])
    policy = make_policy(model)
    without, prompts = saved_bytes(model, policy), fake_rollouts(model).prompts
    read = dataclasses.replace(prompts, audio=prompts.audio[:, :0], audio_lens=torch.zeros_like(prompts.audio_lens))
    more = saved_bytes(model, policy, read=read, layers=(), weight=0.1) - without
    plan, again = plans[0]["llama_compared"], plans[0]["llama_compared_again"]
    assert item(plan, "compared states") == pytest.approx(more, rel=ACTIVATION_TOLERANCE)
    assert item(again, "compared states") < item(plan, "compared states")


@pytest.mark.parametrize(("tokens", "expected"), [(0, 0), (1, 32), (32, 32), (33, 66), (67, 134)])
def test_cache_capacity_grows_as_the_cache_does(tokens, expected):
    assert cache_capacity(tokens) == expected


@pytest.mark.parametrize("layout", ["tp2_sp", "tp2_pp2"])
def test_a_layout_spreads_the_same_parameters(plans, layout):
    whole, spread = plans[0]["llama"], plans[0][layout]
    for part, counts in whole["parameters"].items():
        assert {**spread["parameters"][part], "per_gpu": 0} == {**counts, "per_gpu": 0}
    assert spread["parameters"]["LLM"]["per_gpu"] < counts["per_gpu"]
    assert item(spread, "gradients") < item(whole, "gradients")
    assert item(spread, "activations") < item(whole, "activations")


def test_the_8b_recipe_is_planned_without_downloads(plans):
    plan = plans[0]["8b"]
    assert plan["parameters"]["LLM"]["total"] == 8_030_261_248  # as published
    assert plan["tokens"]["answer tokens trained"] == 64 * 8 * 1024
    assert plan["peak"]["bytes"] == max(plan["stage_peaks"])
    assert plan["fits"] == (plan["peak"]["bytes"] <= 80 * 2**30)
    assert plans[0]["8b_roomy"]["fits"]
    thrifty = plans[0]["8b_thrifty"]
    assert item(thrifty, "optimizer state") <= item(plan, "optimizer state")
    assert item(thrifty, "activations") <= item(plan, "activations")


def test_the_table_says_what_does_not_fit_and_what_to_change(plans):
    made, text = plans
    assert "plan.llm (model.folder is not there)" in text
    assert f"{made['8b']['parameters']['all']['total']:,}" in text
    if not made["8b"]["fits"]:
        assert "DOES NOT FIT" in text
        assert f"to make it smaller: {made['8b']['largest']['advice']}" in text
    assert "FITS: " in text


def test_a_layout_that_does_not_divide_is_refused(plans):
    assert "odd" not in plans[0]
    assert "no plan: 3 GPUs (trainer.devices x trainer.num_nodes) do not divide by 2" in plans[1]


def test_what_is_left_out_is_said(plans):
    assert plans[0]["llama"]["notes"] == []
    (note,) = plans[0]["unfrozen"]["notes"]
    assert "encoder" in note
    assert plans[0]["unfrozen"]["parameters"]["encoder"]["frozen"] == 0
    assert f"note: {note}" in plans[1]


@pytest.mark.parametrize("name", EIGHT_BILLION)
def test_8b_recipes_fit_80_gib_by_the_plan(plans, name):
    plan = plans[0][name]
    assert plan["fits"], plan["largest"]
    assert plan["peak"]["bytes"] < 0.8 * plan["gpu_bytes"], "the plan is arithmetic, not a measurement: leave room"
    assert plan["tokens"]["prompts"] == 64
    assert plan["notes"] == []
    assert plan["layout"]["sequence_parallel"]


def test_a_plan_can_say_no(plans):
    assert not plans[0]["8b_wasteful"]["fits"]


def test_lora_trains_the_factors_and_the_adapter_only(plans):
    parameters = plans[0]["8b_lora"]["parameters"]
    assert parameters["LLM"]["trained"] == 0
    assert parameters["LoRA"]["frozen"] == parameters["adapter"]["frozen"] == 0
    assert parameters["LoRA"]["trained"] < 0.01 * parameters["LLM"]["total"]
