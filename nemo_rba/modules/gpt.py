# SPDX-License-Identifier: Apache-2.0
"""megatron-core's GPTModel as the language model of a SpeechLM: built here, run from embeddings by a plan.

Nothing of the model is ours but its core attention (``modules/attention.py``). The three steps of a forward pass are
separate functions, because a speech prompt enters as embeddings and only answer positions need logits.
"""

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_rba.modules.attention import DecodePlan, GroupPlan, PlannedAttention, PrefixPlan, Rotary


def have_transformer_engine() -> bool:
    """True where Transformer Engine is importable and there is a GPU to run it on."""
    from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE

    return HAVE_TE and torch.cuda.is_available()


def build_gpt(
    *, transformer: dict, vocab_size: int, max_sequence_length: int, rotary_base: float, rope_scaling: bool,
    rope_scaling_factor: float, tied_embeddings: bool, params_dtype: torch.dtype,
) -> GPTModel:  # fmt: skip
    """This rank's share of the model, with random weights.

    ``transformer`` holds the TransformerConfig fields that describe the architecture (``conversion.families``).
    """
    config = TransformerConfig(
        **transformer,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        params_dtype=params_dtype,
        pipeline_dtype=params_dtype,
        bf16=params_dtype == torch.bfloat16,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=not torch.cuda.is_available(),
        batch_p2p_sync=torch.cuda.is_available(),
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )
    make_spec = get_gpt_layer_with_transformer_engine_spec if have_transformer_engine() else get_gpt_layer_local_spec
    spec = make_spec(qk_layernorm=config.qk_layernorm, **({} if have_transformer_engine() else _RMS))
    spec.submodules.self_attention.submodules.core_attention = PlannedAttention
    return GPTModel(
        config,
        spec,
        vocab_size=vocab_size,
        max_sequence_length=max_sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
        rotary_base=rotary_base,
        rope_scaling=rope_scaling,
        rope_scaling_factor=rope_scaling_factor,
        share_embeddings_and_output_weights=tied_embeddings,
        parallel_output=True,
    )


_RMS = {"normalization": "RMSNorm"}


def rotary_table(gpt: GPTModel, length: int) -> Rotary:
    """Rotary tables for positions 0 .. length - 1."""
    cos, sin = gpt.rotary_pos_emb.get_cos_sin(length)  # (S, d / 2)
    weight = next(gpt.parameters())
    return Rotary(*(torch.cat((x, x), -1).to(weight.device) for x in (cos, sin)))


def embed(gpt: GPTModel, ids: Tensor) -> Tensor:
    """Word embeddings of ids (b, s): (s, b, H)."""
    return gpt.embedding(input_ids=ids, position_ids=None)


def run(gpt: GPTModel, embeddings: Tensor, plan: PrefixPlan | GroupPlan | DecodePlan) -> Tensor:
    """Hidden states (s, b, H) of embeddings (s, b, H) after this stage's layers."""
    return gpt.decoder(hidden_states=embeddings, attention_mask=None, attention_bias=plan)


def logits(gpt: GPTModel, hidden: Tensor, *, gather: bool) -> Tensor:
    """Next-token logits of hidden (s, b, H): (s, b, V / tp), or (s, b, V) on every rank when ``gather``."""
    weight = gpt.shared_embedding_or_output_weight() if gpt.share_embeddings_and_output_weights else None
    out, _ = gpt.output_layer(hidden, weight=weight)
    return tensor_parallel.gather_from_tensor_model_parallel_region(out) if gather else out


def answer_logits(
    gpt: GPTModel, prompts: Tensor, valid: Tensor, response_ids: Tensor, response_mask: Tensor, group_size: int
) -> Tensor:
    """Teacher-forced logits of every real answer token, the prompt computed once for its G answers.

    prompts (P, B, H) left padded with valid (B, P); response_ids and response_mask (N, T), N = B * G ordered by prompt.
    Returns (M, V / tp), M = real tokens in the row-major order of ``response_mask``.
    """
    (prefix, num_prompts, hidden_size), (num_rows, num_tokens) = prompts.shape, response_ids.shape
    fed = num_tokens - 1  # the last token of an answer predicts nothing
    answers = embed(gpt, response_ids[:, :fed]).view(fed, num_prompts, group_size, hidden_size)
    answers = answers.permute(2, 0, 1, 3).reshape(group_size * fed, num_prompts, hidden_size)
    plan = GroupPlan(rotary_table(gpt, prefix + fed), valid, group_size, fed)
    hidden = run(gpt, torch.cat((prompts, answers)), plan)
    first = hidden[prefix - 1].expand(group_size, 1, num_prompts, hidden_size)
    hidden = torch.cat((first, hidden[prefix:].view(group_size, fed, num_prompts, hidden_size)), 1)
    hidden = hidden.permute(2, 0, 1, 3).reshape(num_rows, num_tokens, hidden_size)  # (B, G, T, H) -> (N, T, H)
    return logits(gpt, hidden[response_mask][:, None], gather=False)[:, 0]
