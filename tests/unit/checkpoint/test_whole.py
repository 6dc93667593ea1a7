# SPDX-License-Identifier: Apache-2.0
"""What a ``.nemo`` holds does not depend on which layers the machine that wrote it has."""

import pytest
import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from tiny_models import load_speech_lm

from nemo_rba.checkpoint.whole import gather_state, load_state
from nemo_rba.models.rba_speech_lm import RBASpeechLM
from nemo_rba.types import SamplingParams


class FusedLinear(ColumnParallelLinear):
    """Transformer Engine's way: the norm inside the layer, and an extra state, an empty tensor without FP8."""

    def forward(self, input_, *args, **kwargs):
        normed = F.rms_norm(input_, self.layer_norm_weight.shape, self.layer_norm_weight, self.eps)
        return super().forward(normed, *args, **kwargs)

    def get_extra_state(self):
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state):
        assert state.numel() == 0


def fused(folder):
    """A model with such layers."""
    model = load_speech_lm(folder)
    for layer in model.llm.decoder.layers:
        for name, linear in (
            ("input_layernorm", layer.self_attention.linear_qkv),
            ("pre_mlp_layernorm", layer.mlp.linear_fc1),
        ):
            norm = getattr(layer, name)
            linear.__class__, linear.eps, linear.layer_norm_weight = FusedLinear, norm.eps, norm.weight
            setattr(layer, name, IdentityOp())
    return model


def greedy(model, batch):
    params = SamplingParams(max_new_tokens=8, temperature=0)
    return [r.token_ids.tolist() for r in model.generate(batch, model.encode(batch), group_size=1, params=params)]


def test_transformer_engine_writes_what_is_read_without_it(llama_salm, batch, tmp_path):
    model = fused(llama_salm[0])
    assert any(name.endswith("linear_qkv.layer_norm_weight") for name in model.state_dict())
    assert any(isinstance(value, torch.Tensor) for name, value in model.state_dict().items() if "_extra_state" in name)
    model.save_to(tmp_path / "fused.nemo")
    restored = RBASpeechLM.restore_from(tmp_path / "fused.nemo")
    assert greedy(restored, batch) == greedy(model, batch)
    expected = gather_state(load_speech_lm(llama_salm[0]))
    found = gather_state(restored)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_transformer_engine_reads_what_was_written_without_it(llama_salm, speech_lm, batch):
    model = fused(llama_salm[0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load_state(model, gather_state(speech_lm))
    assert greedy(model, batch) == greedy(speech_lm, batch)


def test_a_tensor_that_is_missing_is_named(speech_lm):
    state = gather_state(speech_lm)
    del state["llm.decoder.layers.0.input_layernorm.weight"]
    with pytest.raises(ValueError, match=r"1 missing tensors \['llm\.decoder\.layers\.0\.input_layernorm\.weight'\]"):
        load_state(speech_lm, state)
