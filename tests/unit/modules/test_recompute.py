# SPDX-License-Identifier: Apache-2.0
"""Recomputation is done, and gives the same gradient: every layer's attention runs twice, once for the way back."""

import pytest
import torch
from transformers import AutoConfig

from nemo_rba.conversion.families import gpt_arguments
from nemo_rba.distributed import cpu, parallel
from nemo_rba.modules.attention import PlannedAttention
from nemo_rba.modules.gpt import answer_logits, build_gpt, embed

NUM_LAYERS, GROUP_SIZE = 3, 2
CONFIG = AutoConfig.for_model(
    "llama", vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=NUM_LAYERS, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
)  # fmt: skip


def gradient(gpt, monkeypatch) -> tuple[dict, list[int]]:
    """(gradient by name, layers in the order in which their attention ran)"""
    ran, attend = [], PlannedAttention.forward

    def forward(self, *args, **kwargs):
        ran.append(self.layer_number)
        return attend(self, *args, **kwargs)

    monkeypatch.setattr(PlannedAttention, "forward", forward)
    generator = torch.Generator().manual_seed(0)
    prompts, answers = (torch.randint(0, 64, size, generator=generator) for size in ((2, 5), (2 * GROUP_SIZE, 4)))
    mask = torch.ones(answers.shape, dtype=torch.bool)
    gpt.zero_grad()
    with cpu.redirect_cuda():
        out = answer_logits(gpt, embed(gpt, prompts), torch.ones(2, 5, dtype=torch.bool), answers, mask, GROUP_SIZE)
        out.square().sum().backward()
    monkeypatch.undo()
    return {name: parameter.grad.clone() for name, parameter in gpt.named_parameters() if parameter.requires_grad}, ran


@pytest.mark.parametrize("frozen_embeddings", [False, True])
def test_every_layer_is_computed_again_for_its_gradient(frozen_embeddings, monkeypatch):
    parallel.initialize(tensor_parallel_size=1, pipeline_parallel_size=1, seed=0)
    gpt = build_gpt(**gpt_arguments(CONFIG), params_dtype=torch.float32, sequence_parallel=False).train()
    gpt.embedding.requires_grad_(not frozen_embeddings)
    layers = list(range(1, NUM_LAYERS + 1))
    kept, ran = gradient(gpt, monkeypatch)
    assert ran == layers
    gpt.config.recompute_granularity, gpt.config.recompute_method = "full", "uniform"
    gpt.config.recompute_num_layers = 1
    again, ran = gradient(gpt, monkeypatch)
    assert ran == layers + layers[::-1]
    for name, value in kept.items():
        torch.testing.assert_close(again[name], value, atol=1e-6, rtol=1e-6, msg=name)
