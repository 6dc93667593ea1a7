# SPDX-License-Identifier: Apache-2.0
"""LoRA under tensor, sequence and pipeline parallelism gives what it gives on one process, in fp32 on CPU with gloo."""

import lora_worker
import pytest
import torch
from forked import run_ranks
from lora_worker import LAYOUTS

PARALLEL = [layout for layout in LAYOUTS if layout != "one"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict:
    """Layout -> what each of its processes measured."""
    folder = tmp_path_factory.mktemp("lora")
    run_ranks(lora_worker.main, folder, num_ranks=2, folder=folder)
    return {
        layout: [torch.load(folder / f"{layout}.{rank}.pt", weights_only=False) for rank in range(tp * pp)]
        for layout, (tp, pp, _) in LAYOUTS.items()
    }


@pytest.fixture
def one(measured) -> dict:
    return measured["one"][0]


def assert_same_update(found: dict, want: dict) -> None:
    """Gradients are compared before clipping, so their error grows with their norm."""
    size = max(1.0, want["grad_norm"])
    assert found["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-5)
    assert found["gradients"].keys() == found["weights"].keys() == want["weights"].keys()
    for name, value in want["gradients"].items():
        torch.testing.assert_close(found["gradients"][name], value, atol=1e-5 * size, rtol=0, msg=f"gradient of {name}")
    for name, value in want["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, atol=2e-6, rtol=0, msg=name)
    torch.testing.assert_close(found["logits"], want["logits"], atol=1e-4, rtol=0)


def test_the_reference_would_notice(one):
    assert one["first"]["grad_norm"] > 1.0
    assert all(value.abs().max() > 1e-3 for value in one["first"]["gradients"].values())
    assert (one["adapted"] - one["start"]).abs().max() > 0.1
    assert (one["first"]["logits"] - one["adapted"]).abs().max() > 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_new_adapters_change_nothing_and_start_alike(one, measured, layout):
    for rank in measured[layout]:
        assert torch.equal(rank["start"], rank["base"])
        assert rank["start_factors"].keys() == one["start_factors"].keys()
        for name, value in one["start_factors"].items():
            assert torch.equal(rank["start_factors"][name], value)


@pytest.mark.parametrize("layout", PARALLEL)
def test_logits_and_answers_are_the_same_on_every_rank(one, measured, layout):
    for rank in measured[layout]:
        torch.testing.assert_close(rank["adapted"], one["adapted"], atol=1e-5, rtol=0)
        assert rank["answers"][0] == one["answers"][0]
        torch.testing.assert_close(rank["answers"][1], one["answers"][1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", PARALLEL)
def test_an_update_is_the_same_on_every_rank(one, measured, layout):
    for rank in measured[layout]:
        for step in ("first", "second"):
            assert_same_update(rank[step], one[step])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_merged_is_the_same_model_and_exactly_undone(measured, layout):
    for rank in measured[layout]:
        torch.testing.assert_close(rank["merged"]["logits"], rank["first"]["logits"], atol=1e-5, rtol=0)
        assert torch.equal(rank["unmerged"], rank["first"]["logits"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_of_tp2_goes_on_under_every_layout(measured, layout):
    saved = measured["tp2"][0]
    for rank in measured[layout]:
        assert rank["resumed"]["weights"].keys() == saved["first"]["weights"].keys()
        for name, value in saved["first"]["weights"].items():
            assert torch.equal(rank["resumed"]["weights"][name], value)
        assert_same_update(rank["resumed"]["update"], saved["second"])
