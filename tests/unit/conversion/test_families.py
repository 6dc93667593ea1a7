# SPDX-License-Identifier: Apache-2.0
"""Every decoder family on megatron-core against transformers: the same logits, and the same weights back."""

import json

import pytest
import torch
from megatron.core import parallel_state
from safetensors.torch import load_file, save_file
from tiny_models import randomize
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from nemo_rba.conversion.families import gpt_arguments, old_rope_keys
from nemo_rba.conversion.hf import SafetensorsFolder, config_from_dict, export_weights, load_hf_config, load_weights
from nemo_rba.distributed import parallel
from nemo_rba.modules.attention import PrefixPlan
from nemo_rba.modules.gpt import build_gpt, embed, logits, rotary_table, run

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
LLAMA32_ROPE = {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"} | {"factor": 32.0}
CASES = [
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"tie_word_embeddings": False, "rope_parameters": LLAMA3_ROPE, "max_position_embeddings": 16384}),
    ("llama", {"rope_scaling": LLAMA32_ROPE, "rope_theta": 500000.0, "max_position_embeddings": 16384}),  # Llama-3.2
    ("mistral", {"tie_word_embeddings": False, "sliding_window": None}),
    ("mistral", {"sliding_window": None, "head_dim": 24, "rms_norm_eps": 1e-3, "rope_theta": 1e6}),  # Mistral-Nemo
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1, "vocab_size": 128}),  # Qwen2.5
    ("qwen3", {"tie_word_embeddings": False, "head_dim": 32}),
    ("qwen3", {"tie_word_embeddings": True, "head_dim": 8, "num_key_value_heads": 1, "eos_token_id": [2, 3]}),
]


def make_folder(folder, family, options):
    """A random model with every kind of weight different from its default."""
    torch.manual_seed(0)
    config = config_from_dict(
        {
            "model_type": family, "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
            "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, **options,
        }
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).float().eval()
    randomize(model)
    model.save_pretrained(folder)
    return model


def convert(folder):
    parallel.initialize(tensor_parallel_size=1, pipeline_parallel_size=1, seed=0)
    config = load_hf_config(folder)
    gpt = build_gpt(**gpt_arguments(config), params_dtype=torch.float32, sequence_parallel=False).eval()
    load_weights(gpt, SafetensorsFolder(folder), config, tp_size=1, tp_rank=0)
    return gpt, config


@torch.no_grad()
@pytest.mark.parametrize(("family", "options"), CASES, ids=[f"{f}-{i}" for i, (f, _) in enumerate(CASES)])
def test_logits_equal_transformers_and_weights_come_back(tmp_path, family, options):
    model = make_folder(tmp_path, family, options)
    gpt, config = convert(tmp_path)
    ids = torch.randint(1, 96, (2, 40), generator=torch.Generator().manual_seed(1))
    plan = PrefixPlan(rotary_table(gpt, 40), torch.ones(2, 40, dtype=torch.bool))
    ours = logits(gpt, run(gpt, embed(gpt, ids), plan), gather=True).transpose(0, 1)
    torch.testing.assert_close(ours, model(ids).logits, atol=2e-5, rtol=1e-5)
    back = dict(export_weights(gpt, config, tp_group=parallel_state.get_tensor_model_parallel_group()))
    stored = load_file(tmp_path / "model.safetensors")
    assert back.keys() == stored.keys()
    assert all(torch.equal(back[name], stored[name]) for name in stored)


def test_both_names_of_the_rotary_settings_give_one_model(tmp_path):
    """transformers 5 writes ``rope_parameters``, which 4 leaves unread; 5 reads the old names too."""
    values = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}
    new = {"rope_parameters": LLAMA3_ROPE}
    old = {"rope_theta": 500000.0, "rope_scaling": {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}}
    frequencies, arguments = [], []
    for rope in (new, old, new | old):
        (tmp_path / "config.json").write_text(json.dumps(values | {"max_position_embeddings": 16384} | rope))
        config = load_hf_config(tmp_path)
        assert old_rope_keys(config) == old
        arguments.append(gpt_arguments(config))
        frequencies.append(LlamaRotaryEmbedding(config).inv_freq)
    assert arguments[0] == arguments[1] == arguments[2]
    assert arguments[0]["rotary_base"] == 500000.0
    assert arguments[0]["rope_scaling_factor"] == 8.0
    assert torch.equal(frequencies[0], frequencies[1])
    assert torch.equal(frequencies[0], frequencies[2])
    with pytest.raises(ValueError, match="by layer type"):
        old_rope_keys(PretrainedConfig(rope_parameters={"full_attention": {"rope_theta": 1e6}}))


def test_sharded_folder_reads_the_same(tmp_path):
    make_folder(tmp_path, "llama", {"tie_word_embeddings": True})
    whole = load_file(tmp_path / "model.safetensors")
    files = {}
    for i, names in enumerate((sorted(whole)[::2], sorted(whole)[1::2])):
        save_file({name: whole[name] for name in names}, tmp_path / f"model-{i}.safetensors")
        files |= dict.fromkeys(names, f"model-{i}.safetensors")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    read = SafetensorsFolder(tmp_path)
    assert all(torch.equal(read(name), whole[name]) for name in whole)
    (tmp_path / "model-1.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"model-1\.safetensors"):
        SafetensorsFolder(tmp_path)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"names \['model-1\.safetensors'\], not in this folder"):
        SafetensorsFolder(tmp_path)
    for weight_map in ({"a": "../model-0.safetensors"}, {"a": 1}, ["a"], None):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
            SafetensorsFolder(tmp_path)


@pytest.mark.parametrize(
    ("family", "options", "named"),
    [
        ("gpt2", {}, "gpt2"),
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("mistral", {"sliding_window": 64}, "sliding_window"),
        ("mistral", {}, "sliding_window=4096"),  # Mistral-7B-v0.1
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, "sliding_window"),
        ("qwen2", {"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("mistral", {"sliding_window": None, "layer_types": ["sliding_attention"] * 32}, "layer_types"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
        ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type='yarn'"),
        ("qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn'"),
        ("llama", {"rope_parameters": {**LLAMA3_ROPE, "low_freq_factor": 2.0}}, "low_freq_factor"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("llama", {"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
    ],
)
def test_what_would_be_converted_wrongly_is_named_and_refused(family, options, named):
    with pytest.raises(ValueError, match=named):
        gpt_arguments(AutoConfig.for_model(family, **options))


def test_rotary_settings_by_layer_type_are_named_and_refused():
    """transformers 5 keeps them in a dictionary of dictionaries, in which no ``rope_type`` would be found."""
    config = AutoConfig.for_model("qwen3")
    config.rope_parameters = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}
    with pytest.raises(ValueError, match=r"rope_parameters=.*full_attention"):
        gpt_arguments(config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_weights_come_back_bit_equal_from_float32_and_their_own_type(tmp_path, dtype):
    make_folder(tmp_path, "qwen2", {"tie_word_embeddings": False})
    stored = {name: value.to(dtype) for name, value in load_file(tmp_path / "model.safetensors").items()}
    save_file(stored, tmp_path / "model.safetensors")
    gpt, config = convert(tmp_path)
    group = parallel_state.get_tensor_model_parallel_group()
    for model in (gpt, gpt.to(dtype)):
        back = dict(export_weights(model, config, tp_group=group))
        assert back.keys() == stored.keys()
        assert all(torch.equal(back[name].to(dtype), stored[name]) for name in stored)


def test_missing_tensor_and_wrong_shape_are_named(tmp_path):
    make_folder(tmp_path, "llama", {"tie_word_embeddings": True})
    whole = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    save_file({k: v for k, v in whole.items() if k != name}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="down_proj"):
        convert(tmp_path)
    save_file(whole | {name: whole[name][:, :8].contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="shape"):
        convert(tmp_path)
    with pytest.raises(ValueError, match="no-such-folder"):
        SafetensorsFolder(tmp_path / "no-such-folder")
