# SPDX-License-Identifier: Apache-2.0
"""The decode of fixed shapes beside the one that drops finished rows, and what a CUDA graph asks of it."""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import AutoConfig, AutoModelForCausalLM

from nemo_rba.conversion.families import gpt_arguments
from nemo_rba.conversion.hf import load_weights
from nemo_rba.distributed import parallel, pipeline
from nemo_rba.modules import fixed_decode
from nemo_rba.modules.attention import Rotary
from nemo_rba.modules.fixed_decode import FixedDecode, fix_decode, step
from nemo_rba.modules.generation import generate
from nemo_rba.modules.gpt import build_gpt, embed
from nemo_rba.modules.lora import TARGET_MODULES, add_lora, disabled, lora_parameters, merged
from nemo_rba.types import SamplingParams

WORDS, BANNED = 64, [0, 5]
GREEDY = SamplingParams(max_new_tokens=24, temperature=0)
SAMPLED = SamplingParams(max_new_tokens=24, seed=3)


@pytest.fixture(params=["qwen3", "llama"])
def gpt(request):
    """Two layers with random weights; Qwen3 normalises queries and keys, the Llama's embeddings are tied."""
    config = AutoConfig.for_model(
        request.param, vocab_size=WORDS, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=512,
        tie_word_embeddings=request.param == "llama", initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(config)
    parallel.initialize(tensor_parallel_size=1, pipeline_parallel_size=1, seed=0)
    gpt = build_gpt(**gpt_arguments(hf.config), params_dtype=torch.float32, sequence_parallel=False).eval()
    load_weights(gpt, hf.state_dict().__getitem__, hf.config, tp_size=1, tp_rank=0)
    return gpt.to(parallel.device())


@torch.no_grad()
def answers(gpt, *, lengths=(9, 4, 6), group_size=4, end_id=2, params=SAMPLED, seed=0):
    ids = torch.randint(0, WORDS, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    valid = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    ids, valid, banned = (x.to(parallel.device()) for x in (ids, valid, torch.tensor(BANNED)))
    return generate(
        gpt, embed(gpt, ids), valid, ids=[f"prompt {i}" for i in range(len(lengths))], group_size=group_size,
        end_id=end_id, banned_ids=banned, params=params,
    )  # fmt: skip


def both(gpt, *, check_every=4, prompt_multiple=8, keep=True, **load):
    """Answers by the decode that drops finished rows, and by the one of fixed shapes, which stays chosen."""
    gpt.fixed_decode = None
    dropping = answers(gpt, **load)
    fix_decode(gpt, check_every=check_every, prompt_multiple=prompt_multiple, keep=keep)
    return dropping, answers(gpt, **load)


def assert_equal(found, expected, tolerance=1e-5):
    assert [row.tolist() for row in found.token_ids] == [row.tolist() for row in expected.token_ids]
    assert found.truncated == expected.truncated
    assert [row.dtype for row in found.logprobs] == [row.dtype for row in expected.logprobs]
    torch.testing.assert_close(found.logprobs, expected.logprobs, atol=tolerance, rtol=0)


def tensors(state) -> list[torch.Tensor]:
    caches = [x for cache in (state.prefix, state.own) for pair in cache.values() for x in pair]
    fields = [getattr(state, field.name) for field in dataclasses.fields(state)]
    return [state.rotary.cos, state.rotary.sin, *caches, *(x for x in fields if isinstance(x, torch.Tensor))]


def with_tensors(state, values):
    """A state of the same shape around other tensors, in the order of ``tensors``."""
    values = iter(values)
    rotary = Rotary(next(values), next(values))
    caches = [{layer: (next(values), next(values)) for layer in cache} for cache in (state.prefix, state.own)]
    names = [f.name for f in dataclasses.fields(state) if isinstance(getattr(state, f.name), torch.Tensor)]
    others = {name: next(values) for name in names}
    return dataclasses.replace(state, rotary=rotary, prefix=caches[0], own=caches[1], **others)


def recorded(gpt, state, one_step):
    """The operations of a step as a program, found without values; needing one to go on raises."""

    def program(*values):
        one_step(gpt, with_tensors(state, values))
        return values

    return make_fx(program, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors(state))


def imagine(gpt, state, one_step) -> None:
    """Run a step on tensors that have shapes and no values; asking for one raises."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        one_step(gpt, with_tensors(state, [mode.from_tensor(x) for x in tensors(state)]))


def places(state) -> list[tuple]:
    return [(x.data_ptr(), x.shape, x.stride()) for x in tensors(state)]


@pytest.mark.parametrize("lengths", [(9, 4, 6), (3,), (8, 8)])
@pytest.mark.parametrize("group_size", [1, 4])
def test_sampled_answers_are_those_of_the_decode_that_drops_rows(gpt, lengths, group_size):
    assert_equal(*reversed(both(gpt, lengths=lengths, group_size=group_size)))


def test_answers_that_stop_at_different_steps_or_never(gpt):
    dropping, fixed = both(gpt, lengths=(9, 4, 6, 7), group_size=8)
    assert_equal(fixed, dropping)
    sizes = {len(row) for row in fixed.token_ids}
    assert len(sizes) > 5
    assert {True, False} == set(fixed.truncated)
    assert all(row[-1] == 2 for row, cut in zip(fixed.token_ids, fixed.truncated, strict=True) if not cut)
    assert not any(banned in row for row in fixed.token_ids for banned in BANNED)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_new_tokens=1),
        SamplingParams(max_new_tokens=2, seed=1),
        SamplingParams(max_new_tokens=40, temperature=0.7, top_p=0.9, seed=5),
        SamplingParams(max_new_tokens=40, temperature=1.3, seed=6),
    ],
)
def test_every_way_of_sampling(gpt, params):
    assert_equal(*reversed(both(gpt, params=params)))


def test_greedy_answers_are_identical(gpt):
    endless = both(gpt, group_size=1, end_id=-1, params=GREEDY)[0]
    end_id = int(endless.token_ids[0][7])  # so the first answer stops there at the latest, and others elsewhere
    dropping, fixed = both(gpt, group_size=1, end_id=end_id, params=GREEDY)
    assert_equal(fixed, dropping)
    assert len(fixed.token_ids[0]) <= 8
    assert len({len(row) for row in fixed.token_ids}) > 1


def test_another_batch_is_answered_in_the_same_memory(gpt):
    both(gpt)
    decode, before = gpt.fixed_decode, places(gpt.fixed_decode.kept)
    kept, load = decode.kept, dict(lengths=(13, 7, 2), params=dataclasses.replace(SAMPLED, seed=8), seed=1)
    assert decode.kept.own[1][0].abs().max() > 0, "the first batch has left its keys"
    found = answers(gpt, **load)
    assert decode.kept is kept
    assert places(kept) == before
    gpt.fixed_decode = None
    assert_equal(found, answers(gpt, **load))


@pytest.mark.parametrize("change", [dict(lengths=(9, 4)), dict(lengths=(17, 4, 6)), dict(group_size=3), dict(end_id=3),
                                    dict(params=GREEDY), dict(params=SamplingParams(max_new_tokens=9))])  # fmt: skip
def test_other_shapes_get_memory_of_their_own(gpt, change):
    both(gpt)
    decode, kept = gpt.fixed_decode, gpt.fixed_decode.kept
    found = answers(gpt, **change)
    assert decode.kept is not kept
    gpt.fixed_decode = None
    assert_equal(found, answers(gpt, **change))


def test_memory_is_given_back_when_it_is_not_kept(gpt):
    dropping, fixed = both(gpt, keep=False)
    assert_equal(fixed, dropping)
    assert gpt.fixed_decode.kept is None


def test_values_that_are_no_numbers_do_not_reach_the_next_batch(gpt):
    dropping, _ = both(gpt)
    for tensor in tensors(gpt.fixed_decode.kept)[2:]:  # all but the rotary tables, which no step writes
        if tensor.is_floating_point():
            tensor.fill_(torch.nan)
    assert_equal(answers(gpt), dropping)


@pytest.mark.parametrize("check_every", [1, 7, 100])
def test_the_host_looks_only_now_and_then(gpt, check_every):
    params = SamplingParams(max_new_tokens=60, seed=3)
    dropping, fixed = both(gpt, group_size=2, end_id=1, check_every=check_every, params=params)
    assert_equal(fixed, dropping)
    longest = max(len(row) for row in fixed.token_ids)
    expected = min(60, -(-longest // check_every) * check_every)
    assert int(gpt.fixed_decode.kept.count) == expected


def test_a_step_recorded_once_without_values_gives_all_tokens(gpt, monkeypatch):
    """What a CUDA graph does, on a CPU: one fixed list of operations on fixed memory, run again and again."""
    seen = {}

    def replay(self, state, advance):
        before, program = places(state), recorded(gpt, state, step)
        values = [x.clone() for x in tensors(state)]
        for _ in range(state.shape.params.max_new_tokens - 1):
            program(*tensors(state))
        seen.update(same_places=places(state) == before, program=program)
        seen["moved"] = [not torch.equal(a, b) for a, b in zip(values, tensors(state), strict=True)]

    monkeypatch.setattr(FixedDecode, "_answer", replay)
    dropping, fixed = both(gpt, group_size=4, params=dataclasses.replace(SAMPLED, top_p=0.95))
    assert_equal(fixed, dropping)
    assert len({len(row) for row in fixed.token_ids}) > 3
    assert seen["same_places"]
    assert any(seen["moved"])
    called = {str(node.target) for node in seen["program"].graph.nodes}
    assert {"aten.index_copy_.default", "aten.searchsorted.Tensor"} <= called
    assert not [name for name in called if any(word in name for word in ("nonzero", "local_scalar", "unique"))]


@pytest.mark.parametrize(
    "look",
    [
        lambda state: bool(state.ended.all()),
        lambda state: state.count.item(),
        lambda state: state.tokens[:, : int(state.count)],
        lambda state: state.ended.nonzero(),
    ],
)
def test_no_step_asks_for_a_value_and_one_that_did_would_be_noticed(gpt, look):
    both(gpt)

    def looking(gpt, state):
        step(gpt, state)
        look(state)

    imagine(gpt, gpt.fixed_decode.kept, step)
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        imagine(gpt, gpt.fixed_decode.kept, looking)


def test_adapters_count_and_a_graph_of_other_weights_is_not_replayed(gpt):
    add_lora(gpt, rank=4, alpha=8, target_modules=tuple(TARGET_MODULES), seed=0)
    for name, parameter in lora_parameters(gpt).items():
        if name.endswith("lora_b"):
            parameter.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    dropping, fixed = both(gpt)
    assert_equal(fixed, dropping)
    found, shapes = {"adapted": fixed}, [gpt.fixed_decode.kept.shape]
    for name, scope in {"disabled": disabled, "merged": merged}.items():
        with scope(gpt):
            decode, found[name] = gpt.fixed_decode, answers(gpt)
            shapes.append(decode.kept.shape)
            gpt.fixed_decode = None
            assert_equal(found[name], answers(gpt))
            gpt.fixed_decode = decode
    assert len(set(shapes)) == 3
    words = [[row.tolist() for row in found[name].token_ids] for name in ("adapted", "disabled")]
    assert words[0] != words[1]
    assert_equal(found["merged"], found["adapted"], tolerance=1e-4)


def test_pipeline_stages_and_impossible_settings_are_refused(gpt, monkeypatch):
    for wrong in (dict(check_every=0, prompt_multiple=8), dict(check_every=8, prompt_multiple=0)):
        with pytest.raises(ValueError, match="expected at least 1"):
            fix_decode(gpt, keep=True, **wrong)
    monkeypatch.setattr(pipeline, "num_stages", lambda: 2)
    with pytest.raises(ValueError, match="pipeline_model_parallel_size is 2, expected 1"):
        fix_decode(gpt, check_every=8, prompt_multiple=8, keep=True)
    assert gpt.fixed_decode is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_cuda_graph_gives_the_same_answers(gpt, monkeypatch):
    records = []
    record = fixed_decode.record
    monkeypatch.setattr(fixed_decode, "record", lambda *args: records.append(1) or record(*args))
    dropping, fixed = both(gpt, group_size=8)
    assert_equal(fixed, dropping, tolerance=1e-4)
    again = answers(gpt, group_size=8, lengths=(13, 7, 2), seed=1)
    assert len(records) == 1
    gpt.fixed_decode = None
    assert_equal(again, answers(gpt, group_size=8, lengths=(13, 7, 2), seed=1), tolerance=1e-4)
