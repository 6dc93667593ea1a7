# SPDX-License-Identifier: Apache-2.0
"""megatron-core's GPTModel as the language model of a SpeechLM: built here, run from embeddings by a plan.

Nothing of the model is ours but its core attention (``modules/attention.py``). The three steps of a forward pass are
separate functions, because a speech prompt enters as embeddings and only answer positions need logits.

Under pipeline parallelism a stage without embeddings gets hidden states by ``set_input_tensor``, from megatron's
schedule or from generation. Under sequence parallelism embeddings are scattered after the splice and hidden states
gathered after the last layer, so that everything outside of the layers sees all positions.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_rba.distributed import cpu, parallel
from nemo_rba.modules.attention import DecodePlan, FixedPlan, GroupPlan, PlannedAttention, PrefixPlan, Rotary

_LINEAR = (tensor_parallel.ColumnParallelLinear, tensor_parallel.RowParallelLinear)
_IMPOSSIBLE = -1e30  # logit of what is no word: its probability is 0, and so is 0 times its log-probability


def have_transformer_engine() -> bool:
    """True where Transformer Engine is importable and there is a GPU to run it on."""
    from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE

    return HAVE_TE and torch.cuda.is_available()


def build_gpt(
    *, transformer: dict, vocab_size: int, max_sequence_length: int, rotary_base: float, rope_scaling: bool,
    rope_scaling_factor: float, tied_embeddings: bool, params_dtype: torch.dtype, sequence_parallel: bool,
) -> GPTModel:  # fmt: skip
    """This rank's share of the model, with random weights.

    ``transformer`` holds the TransformerConfig fields that describe the architecture (``conversion.families``).
    """
    tp = parallel_state.get_tensor_model_parallel_world_size()
    pp = parallel_state.get_pipeline_model_parallel_world_size()
    check_layout(
        transformer=transformer, tensor_parallel_size=tp, pipeline_parallel_size=pp,
        sequence_parallel=sequence_parallel, world_size=dist.get_world_size(),
    )  # fmt: skip
    config = TransformerConfig(
        **transformer,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        sequence_parallel=sequence_parallel,
        variable_seq_lengths=pp > 1,  # stages tell each other the shape of every microbatch
        moe_token_dispatcher_type="alltoall",  # asked for by variable_seq_lengths; there are no experts
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
    with cpu.redirect_cuda():  # the last stage copies tied embeddings from the first
        gpt = GPTModel(
            config,
            _spec(config),
            vocab_size=vocab_size + -vocab_size % tp,
            max_sequence_length=max_sequence_length,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            position_embedding_type="rope",
            rotary_base=rotary_base,
            rope_scaling=rope_scaling,
            rope_scaling_factor=rope_scaling_factor,
            share_embeddings_and_output_weights=tied_embeddings,
            parallel_output=True,
            scatter_embedding_sequence_parallel=False,
        )
    gpt.num_words = vocab_size  # the rest of the embedding only makes it divide by tp
    gpt.fixed_decode = None  # see ``fixed_decode.fix_decode``
    for parameter in gpt.parameters():  # conversion reads on every parameter whether it is sharded
        tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    if sequence_parallel and gpt.post_process:  # its input, a selection of positions, is whole
        gpt.output_layer.sequence_parallel, gpt.output_layer.allreduce_dgrad = False, True
    return gpt


def check_layout(
    *, transformer: dict, tensor_parallel_size: int, pipeline_parallel_size: int, sequence_parallel: bool,
    world_size: int,
) -> None:  # fmt: skip
    """Refuse what cannot be cut evenly.

    Raises:
        ValueError: a size that is no number of ranks, or every number that does not divide.
    """
    parallel.check_sizes(tensor_parallel_size, pipeline_parallel_size)
    tp, pp = tensor_parallel_size, pipeline_parallel_size
    sizes = {name: transformer[name] for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size")}
    wrong = [
        f"{name} {size} does not divide by tensor_model_parallel_size {tp}" for name, size in sizes.items() if size % tp
    ]
    if transformer["num_layers"] % pp:
        wrong.append(f"num_layers {transformer['num_layers']} does not divide by pipeline_model_parallel_size {pp}")
    if world_size % (tp * pp):
        wrong.append(
            f"{world_size} processes do not divide into groups of tensor_model_parallel_size {tp} x "
            f"pipeline_model_parallel_size {pp}: change trainer.devices or trainer.num_nodes"
        )
    if sequence_parallel and tp == 1:
        wrong.append("sequence_parallel needs tensor_model_parallel_size above 1, got 1")
    if wrong:
        raise ValueError("; ".join(wrong) + "; change the model.*_parallel keys")


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm where megatron builds norms; its own wrapper of it refuses sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **kwargs):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # its gradient is summed over tensor-parallel ranks


def _spec(config: TransformerConfig):
    """Layers of Transformer Engine on a GPU that has it, else of torch; always with our core attention."""
    if have_transformer_engine():
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
        spec.submodules.self_attention.submodules.core_attention = PlannedAttention
        return spec
    spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = PlannedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[spec] * get_num_layers_to_build(config), layer_norm=RMSNorm)


@contextmanager
def whole_sequences(gpt: GPTModel) -> Iterator[None]:
    """Scope without sequence parallelism, same weights and no gradients: one new token cannot be cut into parts."""
    if not gpt.config.sequence_parallel:
        yield
        return
    owners = [gpt.config, *(m for m in gpt.modules() if hasattr(m, "sequence_parallel") and m.sequence_parallel)]
    try:
        for owner in owners:
            owner.sequence_parallel = False
        yield
    finally:
        for owner in owners:
            owner.sequence_parallel = True


def rotary_table(gpt: GPTModel, length: int) -> Rotary:
    """Rotary tables for positions 0 .. length - 1."""
    cos, sin = gpt.rotary_pos_emb.get_cos_sin(length)  # (S, d / 2)
    weight = next(gpt.parameters())
    return Rotary(*(torch.cat((x, x), -1).to(weight.device) for x in (cos, sin)))


def embed(gpt: GPTModel, ids: Tensor) -> Tensor:
    """Word embeddings of ids (b, s): (s, b, H)."""
    return gpt.embedding(input_ids=ids, position_ids=None)


def run(gpt: GPTModel, embeddings: Tensor | None, plan: PrefixPlan | GroupPlan | DecodePlan | FixedPlan) -> Tensor:
    """Hidden states after this stage's layers: (s, b, H) after the last one.

    ``embeddings`` (s, b, H) is None beyond the first stage. Sequence-parallel ranks hand on (s / tp, b, H).
    """
    if isinstance(plan, DecodePlan | FixedPlan):
        return _run_decode(gpt, embeddings, plan)
    sequence_parallel = gpt.config.sequence_parallel
    if gpt.pre_process and gpt.training and gpt.config.recompute_granularity and torch.is_grad_enabled():
        embeddings = embeddings if embeddings.requires_grad else embeddings.requires_grad_()  # or nothing is recomputed
    if sequence_parallel and gpt.pre_process:
        embeddings = tensor_parallel.scatter_to_sequence_parallel_region(embeddings)
    hidden = gpt.decoder(hidden_states=embeddings, attention_mask=None, attention_bias=plan)
    if sequence_parallel and gpt.post_process:  # what follows is the same on every rank, and so is its gradient
        hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
    return hidden


def _run_decode(gpt: GPTModel, embeddings: Tensor | None, plan: DecodePlan | FixedPlan) -> Tensor:
    """``run`` for one position and no gradient: the layers' own modules without megatron's wrappers around them.

    With so little to compute, those wrappers cost more than the arithmetic of a small model.
    """
    hidden = embeddings if gpt.pre_process else gpt.decoder.input_tensor
    for layer in gpt.decoder.layers:
        attention, mlp = layer.self_attention, layer.mlp
        mixed = _linear(attention.linear_qkv, layer.input_layernorm(hidden))
        mixed = mixed.unflatten(2, (attention.num_query_groups_per_partition, -1))  # (1, n, q, (r + 2) * d)
        d = attention.hidden_size_per_attention_head
        query, key, value = mixed.split((mixed.shape[3] - 2 * d, d, d), 3)
        query = query.reshape(*mixed.shape[:2], -1, d)
        if attention.q_layernorm is not None:
            query, key = attention.q_layernorm(query), attention.k_layernorm(key)
        hidden = hidden + _linear(attention.linear_proj, plan.attend(layer.layer_number, query, key, value))
        gate, up = _linear(mlp.linear_fc1, layer.pre_mlp_layernorm(hidden)).chunk(2, -1)
        hidden = hidden + _linear(mlp.linear_fc2, gpt.config.activation_func(gate) * up)
    return hidden if gpt.decoder.final_layernorm is None else gpt.decoder.final_layernorm(hidden)


def _linear(module: torch.nn.Module, x: Tensor) -> Tensor:
    """A parallel linear layer; where there is nothing to communicate, a plain one."""
    if type(module) in _LINEAR and parallel_state.get_tensor_model_parallel_world_size() == 1:
        return F.linear(x, module.weight, module.bias)
    out, bias = module(x)
    return out if bias is None else out + bias


def logits(gpt: GPTModel, hidden: Tensor, *, gather: bool) -> Tensor:
    """Next-token logits of hidden (s, b, H): (s, b, V / tp), or (s, b, V) on every rank when ``gather``."""
    weight = gpt.shared_embedding_or_output_weight() if gpt.share_embeddings_and_output_weights else None
    out, _ = gpt.output_layer(hidden, weight=weight)
    if gather:
        return tensor_parallel.gather_from_tensor_model_parallel_region(out)[..., : gpt.num_words]
    first = parallel_state.get_tensor_model_parallel_rank() * out.shape[-1]
    if first + out.shape[-1] <= gpt.num_words:
        return out
    no_word = torch.arange(first, first + out.shape[-1], device=out.device) >= gpt.num_words
    return out.masked_fill(no_word, _IMPOSSIBLE)


def answer_logits(
    gpt: GPTModel, prompts: Tensor | None, valid: Tensor, response_ids: Tensor, response_mask: Tensor, group_size: int
) -> Tensor:
    """Teacher-forced logits of every real answer token, the prompt computed once for its G answers.

    prompts (P, B, H) left padded with valid (B, P), None beyond the first stage; response_ids and response_mask (N, T),
    N = B * G ordered by prompt. Returns (M, V / tp), M = real tokens in the row-major order of ``response_mask``, or
    before the last stage the hidden states to hand on.
    """
    fed = response_ids.shape[1] - 1  # the last token of an answer predicts nothing
    if gpt.config.sequence_parallel:  # positions that divide by tp
        padding = -(valid.shape[1] + group_size * fed) % gpt.config.tensor_model_parallel_size
        valid = F.pad(valid, (padding, 0))
        prompts = None if prompts is None else F.pad(prompts, (0, 0, 0, 0, padding, 0))
    (num_prompts, prefix), hidden_size = valid.shape, gpt.config.hidden_size
    embeddings = None
    if gpt.pre_process:
        answers = embed(gpt, response_ids[:, :fed]).view(fed, num_prompts, group_size, hidden_size)
        answers = answers.permute(2, 0, 1, 3).reshape(group_size * fed, num_prompts, hidden_size)
        embeddings = torch.cat((prompts, answers))
    plan = GroupPlan(rotary_table(gpt, prefix + fed), valid, group_size, fed)
    hidden = run(gpt, embeddings, plan)
    if not gpt.post_process:
        return hidden
    return logits(gpt, answer_states(hidden, plan)[response_mask][:, None], gather=False)[:, 0]


def answer_states(hidden: Tensor, plan: GroupPlan) -> Tensor:
    """Of hidden states (S, B, H) of a pass by ``plan``, those that predict the answers' tokens: (N, T, H).

    The first token of all answers to a prompt is predicted where the prompt ends.
    """
    (num_prompts, prefix), group_size, fed = plan.valid.shape, plan.group_size, plan.num_tokens
    first = hidden[prefix - 1].expand(group_size, 1, num_prompts, -1)
    hidden = torch.cat((first, hidden[prefix:].view(group_size, fed, num_prompts, hidden.shape[2])), 1)
    return hidden.permute(2, 0, 1, 3).flatten(0, 1)  # (B, G, T, H) -> (N, T, H)
