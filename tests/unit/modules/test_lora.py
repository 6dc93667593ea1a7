# SPDX-License-Identifier: Apache-2.0
"""LoRA on one process; ``tests/distributed/test_lora_layouts.py`` has the other layouts."""

import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from transformers import AutoConfig, AutoModelForCausalLM

from nemo_rba.conversion.families import gpt_arguments
from nemo_rba.conversion.hf import export_weights, load_weights
from nemo_rba.distributed import parallel
from nemo_rba.modules.attention import PrefixPlan
from nemo_rba.modules.gpt import build_gpt, embed, logits, rotary_table, run
from nemo_rba.modules.lora import TARGET_MODULES, _with_lora, add_lora, disabled, lora_parameters, merged

IDS = torch.randint(0, 64, (3, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def hf():
    config = AutoConfig.for_model(
        "qwen2", vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def gpt(hf):
    parallel.initialize(tensor_parallel_size=1, pipeline_parallel_size=1, seed=0)
    gpt = build_gpt(**gpt_arguments(hf.config), params_dtype=torch.float32, sequence_parallel=False).eval()
    load_weights(gpt, hf.state_dict().__getitem__, hf.config, tp_size=1, tp_rank=0)
    return gpt


def adapt(gpt, targets=tuple(TARGET_MODULES), seed=0):
    return add_lora(gpt, rank=4, alpha=8, target_modules=targets, seed=seed)


def randomize(parameters) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in parameters.items():
        if name.endswith("lora_b"):
            parameter.data.normal_(0, 0.3, generator=generator)


@torch.no_grad()
def scores(gpt):
    valid = torch.ones(IDS.shape, dtype=torch.bool)
    hidden = run(gpt, embed(gpt, IDS), PrefixPlan(rotary_table(gpt, IDS.shape[1]), valid, cache=None))
    return logits(gpt, hidden, gather=True).transpose(0, 1)


def test_new_adapters_change_nothing(gpt):
    before, names = scores(gpt), [name for name, _ in gpt.named_parameters()]
    factors = adapt(gpt)
    assert torch.equal(scores(gpt), before)
    assert [name for name, _ in gpt.named_parameters() if name not in factors] == names
    assert all(parameter.requires_grad for parameter in gpt.parameters())
    assert factors.keys() == {
        f"decoder.layers.{layer}.{path}.lora_{factor}" for layer in (0, 1) for path in TARGET_MODULES.values()
        for factor in "ab"
    }  # fmt: skip
    for name, factor in factors.items():
        size = factor.shape[1]
        if name.endswith("lora_b"):
            assert not factor.any()
        else:  # kaiming uniform with a = sqrt(5), as in peft
            assert 0.9 * size**-0.5 < factor.abs().max() <= size**-0.5


def test_start_values_come_from_the_seed_and_the_name(gpt, hf):
    first = {name: value.clone() for name, value in adapt(gpt, ["linear_qkv", "linear_fc1"]).items()}
    with merged(gpt):
        pass
    others = build_gpt(**gpt_arguments(hf.config), params_dtype=torch.float32, sequence_parallel=False)
    again = adapt(others, ["linear_fc2", "linear_fc1"])
    for name in first.keys() & again.keys():
        assert torch.equal(first[name], again[name])
    values = [value for name, value in first.items() if name.endswith("lora_a")]
    assert all(not torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])
    third = build_gpt(**gpt_arguments(hf.config), params_dtype=torch.float32, sequence_parallel=False)
    name = "decoder.layers.1.mlp.linear_fc1.lora_a"
    assert not torch.equal(adapt(third, seed=1)[name], first[name])


def test_merged_is_the_same_model_and_exactly_undone(gpt, hf):
    before = scores(gpt)
    randomize(adapt(gpt))
    names = list(gpt.state_dict())
    adapted, state = scores(gpt), {name: (p.data_ptr(), p.clone()) for name, p in gpt.named_parameters()}
    assert (adapted - before).abs().max() > 0.1
    with merged(gpt):
        torch.testing.assert_close(scores(gpt), adapted, atol=1e-5, rtol=0)
        assert lora_parameters(gpt) == {}
        assert not [name for name in gpt.state_dict() if "lora" in name]
        group = torch.distributed.group.WORLD
        exported = {name: value.clone() for name, value in export_weights(gpt, hf.config, tp_group=group)}
    assert list(gpt.state_dict()) == names
    for name, parameter in gpt.named_parameters():
        assert (parameter.data_ptr(), True) == (state[name][0], torch.equal(parameter, state[name][1]))
    assert torch.equal(scores(gpt), adapted)
    model = AutoModelForCausalLM.from_config(hf.config).eval()
    model.load_state_dict(exported)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, adapted, atol=2e-5, rtol=0)


def test_merged_is_undone_after_an_error(gpt):
    randomize(adapt(gpt))
    adapted, names = scores(gpt), list(gpt.state_dict())
    with pytest.raises(RuntimeError, match="disk full"), merged(gpt):
        raise RuntimeError("disk full")
    assert torch.equal(scores(gpt), adapted)
    assert list(gpt.state_dict()) == names


def test_disabled_is_the_base_model(gpt):
    before = scores(gpt)
    randomize(adapt(gpt))
    adapted = scores(gpt)
    with disabled(gpt):
        assert torch.equal(scores(gpt), before)
        with merged(gpt):  # what the model computes, adapters off
            assert torch.equal(scores(gpt), before)
    assert torch.equal(scores(gpt), adapted)


def test_bfloat16_keeps_its_type(hf):
    parallel.initialize(tensor_parallel_size=1, pipeline_parallel_size=1, seed=0)
    gpt = build_gpt(**gpt_arguments(hf.config), params_dtype=torch.bfloat16, sequence_parallel=False).eval()
    factors = adapt(gpt)
    assert {factor.dtype for factor in factors.values()} == {torch.bfloat16}
    linear = gpt.decoder.layers[0].mlp.linear_fc2
    x = torch.ones(2, 1, 96, dtype=torch.bfloat16)
    assert linear(x)[0].dtype == torch.bfloat16
    with merged(gpt):
        assert linear.weight.dtype == linear(x)[0].dtype == torch.bfloat16


class FusedNorm(ColumnParallelLinear):
    """A linear layer that normalises its input itself, as Transformer Engine's does."""

    eps, zero_centered_gamma = 1e-3, True

    def forward(self, input_):
        weight = self.layer_norm_weight + 1
        return super().forward(torch.nn.functional.rms_norm(input_, weight.shape, weight, self.eps))


def test_a_norm_inside_the_linear_layer_comes_before_the_factors(gpt):
    linear = gpt.decoder.layers[0].self_attention.linear_qkv
    linear.__class__ = FusedNorm
    linear.layer_norm_weight = torch.nn.Parameter(torch.linspace(-0.5, 0.5, 64))
    randomize(adapt(gpt, ["linear_qkv"]))
    assert type(linear) is _with_lora(FusedNorm)
    x = torch.randn(5, 2, 64, generator=torch.Generator().manual_seed(2))
    adapted = linear(x)[0]
    with merged(gpt):
        assert type(linear) is FusedNorm
        torch.testing.assert_close(linear(x)[0], adapted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rank": 0}, "lora.rank is 0"),
        ({"alpha": 0}, "lora.alpha is 0"),
        ({"target_modules": ["q_proj"]}, r"lora.target_modules is \['q_proj'\]; .*linear_qkv"),
        ({"target_modules": "linear_qkv"}, "is 'linear_qkv'; expected a list"),
        ({"target_modules": []}, r"is \[\]"),
        ({"target_modules": ["linear_fc1", "linear_fc1"]}, "different names"),
    ],
)
def test_add_lora_refuses(gpt, wrong, message):
    arguments = {"rank": 4, "alpha": 8, "target_modules": ["linear_qkv"], "seed": 0}
    with pytest.raises(ValueError, match=message):
        add_lora(gpt, **(arguments | wrong))
    assert lora_parameters(gpt) == {}


def test_add_lora_twice_is_refused(gpt):
    adapt(gpt, ["linear_qkv"])
    with pytest.raises(ValueError, match="already"):
        adapt(gpt, ["linear_fc1"])
