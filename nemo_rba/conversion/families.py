# SPDX-License-Identifier: Apache-2.0
"""Which Hugging Face decoders we can run on megatron-core, and what their options mean there."""

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from nemo_rba.conversion.mapping import FusedQKV, GatedMLP, HeadLayout, Rule, Same


@dataclass(frozen=True, slots=True)
class Family:
    """What sets one architecture apart from the common decoder."""

    qkv_bias: bool = False
    qk_norm: bool = False


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm=True),
}


def family_of(config: PretrainedConfig) -> Family:
    """The family of a Hugging Face config; refuses what would be converted wrongly.

    Raises:
        ValueError: an architecture or option outside the tested set, by name.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(f"architecture {config.model_type!r} is not supported; expected one of {sorted(FAMILIES)}")
    options, rope = config.to_dict(), _rope(config)
    refused = {
        "hidden_act": options["hidden_act"] != "silu",
        "attention_bias": bool(options.get("attention_bias")),
        "mlp_bias": bool(options.get("mlp_bias")),
        "sliding_window": bool(options.get("sliding_window")) and bool(options.get("use_sliding_window", True)),
        "layer_types": any(kind != "full_attention" for kind in options.get("layer_types") or ()),
        "rope_parameters": any(isinstance(value, dict) for value in rope.values()),  # by layer type
        "rope_type": rope["rope_type"] not in ("default", "llama3"),
        "partial_rotary_factor": (options.get("partial_rotary_factor") or rope.get("partial_rotary_factor", 1.0))
        != 1.0,
        "quantization_config": bool(options.get("quantization_config")),
    }
    wrong = [f"{name}={options.get(name, rope.get(name))!r}" for name, bad in refused.items() if bad]
    if wrong:
        raise ValueError(f"{config.model_type} with {', '.join(wrong)} is not supported by this conversion")
    return FAMILIES[config.model_type]


def _rope(config: PretrainedConfig) -> dict:
    """Rotary settings, wherever this version of transformers keeps them."""
    options = config.to_dict()
    rope = dict(options.get("rope_parameters") or options.get("rope_scaling") or {})
    rope.setdefault("rope_theta", options.get("rope_theta") or 10000.0)
    rope.setdefault("rope_type", rope.pop("type", "default"))
    return rope


def old_rope_keys(config: PretrainedConfig) -> dict:
    """The rotary settings under the names of transformers 4, which transformers 5 reads too.

    Raises:
        ValueError: settings by layer type, which transformers 4 has no common names for.
    """
    rope = _rope(config)
    if any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"{config.model_type} with rope_parameters by layer type needs transformers 5 or newer")
    keys = {key: rope.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    return keys | {"rope_scaling": None if rope["rope_type"] == "default" else rope}


def with_rope(config: PretrainedConfig) -> PretrainedConfig:
    """``config``, with the rotary settings where this version of transformers reads them.

    Transformers 4 leaves what 5 wrote, ``rope_parameters``, unread in the config, without a word. 5 reads both.
    """
    if hasattr(config, "rope_theta") and getattr(config, "rope_parameters", None):
        for key, value in old_rope_keys(config).items():
            setattr(config, key, value)
    return config


def head_layout(config: PretrainedConfig) -> HeadLayout:
    """Heads of a Hugging Face config."""
    head_dim = config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads
    return HeadLayout(config.num_attention_heads, config.num_key_value_heads, head_dim)


def gpt_arguments(config: PretrainedConfig) -> dict:
    """Arguments of ``modules.gpt.build_gpt`` that give this architecture.

    Raises:
        ValueError: llama3 rope scaling with constants other than megatron-core's.
    """
    family, heads, rope = family_of(config), head_layout(config), _rope(config)
    scaled = rope["rope_type"] == "llama3"
    if scaled:
        constants = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        different = {key: rope.get(key) for key, value in constants.items() if rope.get(key) != value}
        if different:
            raise ValueError(f"llama3 rope scaling with {different} is not supported; megatron-core has {constants}")
    return {
        "transformer": {
            "num_layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "ffn_hidden_size": config.intermediate_size,
            "num_attention_heads": heads.num_heads,
            "num_query_groups": heads.num_groups,
            "kv_channels": heads.head_dim,
            "normalization": "RMSNorm",
            "layernorm_epsilon": config.rms_norm_eps,
            "gated_linear_unit": True,
            "activation_func": torch.nn.functional.silu,
            "add_bias_linear": False,
            "add_qkv_bias": family.qkv_bias,
            "qk_layernorm": family.qk_norm,
        },
        "vocab_size": config.vocab_size,
        "max_sequence_length": config.max_position_embeddings,
        "rotary_base": rope["rope_theta"],
        "rope_scaling": scaled,
        "rope_scaling_factor": rope["factor"] if scaled else 1.0,
        "tied_embeddings": config.tie_word_embeddings,
    }


def rules(config: PretrainedConfig) -> dict[str, Rule]:
    """Every megatron tensor of this architecture, by megatron name with ``{}`` for the layer."""
    family = family_of(config)
    layer, block = "decoder.layers.{}.", "model.layers.{}."
    table: list[Rule] = [
        Same("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        Same("decoder.final_layernorm.weight", "model.norm.weight"),
        Same("output_layer.weight", "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"),
        Same(layer + "input_layernorm.weight", block + "input_layernorm.weight"),
        Same(layer + "pre_mlp_layernorm.weight", block + "post_attention_layernorm.weight"),
        FusedQKV(layer + "self_attention.linear_qkv.weight", block + "self_attn.{part}_proj.weight"),
        Same(layer + "self_attention.linear_proj.weight", block + "self_attn.o_proj.weight"),
        GatedMLP(layer + "mlp.linear_fc1.weight", block + "mlp.gate_proj.weight", block + "mlp.up_proj.weight"),
        Same(layer + "mlp.linear_fc2.weight", block + "mlp.down_proj.weight"),
        # Transformer Engine keeps these two norms inside the linear layer that follows them
        Same(layer + "self_attention.linear_qkv.layer_norm_weight", block + "input_layernorm.weight"),
        Same(layer + "mlp.linear_fc1.layer_norm_weight", block + "post_attention_layernorm.weight"),
    ]
    if family.qkv_bias:
        table.append(FusedQKV(layer + "self_attention.linear_qkv.bias", block + "self_attn.{part}_proj.bias"))
    if family.qk_norm:
        table += [
            Same(layer + f"self_attention.{part}_layernorm.weight", block + f"self_attn.{part}_norm.weight")
            for part in "qk"
        ]
    return {rule.megatron: rule for rule in table}
