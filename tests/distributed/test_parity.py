# SPDX-License-Identifier: Apache-2.0
"""Every parallel layout gives what one process gives, in fp32 on CPU with gloo.

Tolerances. One rounding of a value around 1 is 6e-8; over two layers, a softmax and the backward pass some hundred of
them add up, in another order under every layout:

    1e-5   log-probabilities of the same weights; metrics
    1e-5   gradients, times the gradient norm where that is above 1: they are compared before clipping
    2e-6   updated weights: AdamW divides the gradient by its own size, so its error does not grow with it
    5e-5   log-probabilities after an update, whose weights differ by the above; what a loss on states gives then

The qwen3 case recomputes activations under every layout but the first; llama under dp2 has a distributed optimizer.
Tokens are compared exactly: a seeded sample changes only where a uniform number falls within 1e-6 of a token's edge.
"""

import parity
import pytest
import torch
from forked import run_ranks
from parity import CASES, GROUP_SIZE, LAYOUTS, SECONDS, WORLD_SIZES, shares_optimizer

SAME_WEIGHTS, AFTER_UPDATE, UPDATED_WEIGHTS = 1e-5, 5e-5, 2e-6
PARALLEL = [layout for layout in LAYOUTS if layout != "one"]


@pytest.fixture(scope="module")
def folder(llama_salm, qwen3_salm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity")
    for family, (salm, _) in {"llama": llama_salm, "qwen3": qwen3_salm}.items():
        (folder / family).symlink_to(salm)
    return folder


@pytest.fixture(scope="module")
def measured(folder) -> dict:
    """Layout -> what each of its processes measured."""
    run_ranks(parity.main, folder, num_ranks=max(WORLD_SIZES.values()), folder=folder)
    return {
        layout: [torch.load(folder / f"{layout}.{rank}.pt", weights_only=False) for rank in range(size)]
        for layout, size in WORLD_SIZES.items()
    }


@pytest.fixture
def one(measured) -> dict:
    return measured["one"][0]


def expected_rows(values: list, rows: list[int]) -> list:
    """Of a list over all prompts' answers, those of some prompts."""
    per_prompt = len(values) // len(SECONDS)
    return [values[row * per_prompt + i] for row in rows for i in range(per_prompt)]


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("layout", PARALLEL)
def test_answers_are_the_same_on_every_rank(one, measured, layout, case):
    for found in (rank[case] for rank in measured[layout]):
        for kind in ("start", "greedy", "sampled"):
            for part in ("tokens", "truncated"):
                assert found[kind][part] == expected_rows(one[case][kind][part], found["rows"])
            expected = expected_rows(one[case][kind]["logprobs"], found["rows"])
            tolerance = SAME_WEIGHTS if kind == "start" else AFTER_UPDATE
            torch.testing.assert_close(found[kind]["logprobs"], expected, atol=tolerance, rtol=0)
    assert len({tuple(tokens) for tokens in one[case]["sampled"]["tokens"]}) > GROUP_SIZE


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_decode_of_fixed_shapes_gives_the_same_answers_or_is_refused(one, measured, layout, case):
    for found in (rank[case] for rank in measured[layout]):
        if "pp" in layout:
            assert "model.pipeline_model_parallel_size is 2, expected 1" in found["fixed"]
            continue
        for part in ("tokens", "truncated"):
            assert found["fixed"][part] == expected_rows(one[case]["sampled"][part], found["rows"])
        expected = expected_rows(one[case]["sampled"]["logprobs"], found["rows"])
        torch.testing.assert_close(found["fixed"]["logprobs"], expected, atol=AFTER_UPDATE, rtol=0)


@pytest.mark.parametrize("step", ["distillation", "policy_gradient"])
@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("layout", PARALLEL)
def test_an_update_is_the_same_on_every_rank(one, measured, layout, case, step):
    want = one[case][step]
    size = max(1.0, want["metrics"]["grad_norm"])
    for rank in measured[layout]:
        found = rank[case][step]
        for kind in ("logprobs", "reference"):
            expected = expected_rows(want[kind], rank[case]["rows"])
            updated = kind == "logprobs" and step == "policy_gradient"
            tolerance = AFTER_UPDATE if updated else SAME_WEIGHTS
            torch.testing.assert_close(found[kind], expected, atol=tolerance, rtol=0)
        assert found["metrics"] == pytest.approx(want["metrics"], abs=SAME_WEIGHTS, rel=SAME_WEIGHTS)
        for kind, tolerance in (("gradients", SAME_WEIGHTS * size), ("weights", UPDATED_WEIGHTS)):
            if kind == "gradients" and shares_optimizer(layout, case):
                continue
            got = dict(found[kind])
            tied = got.pop("llm.output_layer.weight", None) if case != "qwen3" else None
            assert got.keys() == want[kind].keys()
            for name, value in want[kind].items():
                torch.testing.assert_close(got[name], value, atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
            if tied is not None:  # the last stage's copy of the embeddings
                torch.testing.assert_close(tied, got["llm.embedding.word_embeddings.weight"], atol=0, rtol=0)


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("layout", PARALLEL)
def test_hidden_states_agree_as_much_on_every_rank(one, measured, layout, case):
    for found in (rank[case] for rank in measured[layout]):
        for layers, values in one[case]["agreement"].items():
            expected = torch.stack(expected_rows(list(values), found["rows"]))
            torch.testing.assert_close(found["agreement"][layers], expected, atol=SAME_WEIGHTS, rtol=0)
    values = one[case]["agreement"]
    torch.testing.assert_close(values["all"], (values["first"] + values["last"]) / 2, atol=1e-6, rtol=0)
    assert values["all"].max() < 0.99
    assert values["all"].std() > 1e-3


@pytest.mark.parametrize("layers", ["all", "first", "last"])
@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("layout", PARALLEL)
def test_a_loss_on_hidden_states_is_the_same_on_every_rank(one, measured, layout, case, layers):
    want = one[case]["attraction", layers]
    size = max(1.0, sum(value.square().sum() for value in want["gradients"].values()).sqrt().item())
    for rank in measured[layout]:
        found = rank[case]["attraction", layers]
        assert found["metrics"] == pytest.approx(want["metrics"], abs=AFTER_UPDATE, rel=AFTER_UPDATE)
        if shares_optimizer(layout, case):
            continue
        for name, value in want["gradients"].items():
            torch.testing.assert_close(
                found["gradients"][name], value, atol=AFTER_UPDATE * size, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_the_reference_would_notice(one):
    """The measured step is a real one: gradients everywhere, a KL term that counts, clipping that acts."""
    for case in CASES:
        first, last = (one[case]["attraction", layers] for layers in ("first", "last"))
        assert first["metrics"]["loss/representation"] > 0.1
        differences = [(first["gradients"][name] - value).norm() for name, value in last["gradients"].items()]
        assert max(differences) > 100 * AFTER_UPDATE
        step = one[case]["policy_gradient"]
        assert one[case]["distillation"]["metrics"]["grad_norm"] > 1.0
        assert step["metrics"]["loss/kl"] > 1e-4
        if case != "speech_only":  # the bias of an encoder's attention keys has no gradient
            assert all(value.abs().max() > 1e-5 for value in step["gradients"].values())
