# SPDX-License-Identifier: Apache-2.0
"""How a token is chosen."""

from types import SimpleNamespace

import torch

from nemo_rba.modules import generation
from nemo_rba.modules.generation import choose, uniforms
from nemo_rba.types import SamplingParams

PROBS = torch.tensor([0.1, 0.5, 0.0, 0.4])


def chosen(uniform, **params):
    params = SamplingParams(max_new_tokens=1, **params)
    return choose(
        PROBS.log()[None].expand(len(uniform), -1), torch.tensor(uniform, dtype=torch.float64), params
    ).tolist()


def test_inverse_transform_by_hand():
    assert chosen([0.0, 0.0999, 0.11, 0.59, 0.61, 0.999999]) == [0, 0, 1, 1, 3, 3]


def test_nucleus_keeps_the_likeliest():
    assert chosen([0.0, 0.5, 0.99], top_p=0.45) == [1, 1, 1]
    assert set(chosen([i / 50 for i in range(50)], top_p=0.8)) == {1, 3}


def test_greedy_and_temperature():
    assert chosen([0.0, 0.99], temperature=0) == [1, 1]
    uniform = [i / 1000 for i in range(1000)]
    cold = chosen(uniform, temperature=0.5).count(1) / 1000
    assert abs(cold - 0.25 / (0.01 + 0.25 + 0.16)) < 0.01


def test_frequencies_follow_the_distribution():
    draws = chosen(torch.rand(20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist())
    for token, probability in enumerate(PROBS.tolist()):
        assert abs(draws.count(token) / 20000 - probability) < 0.015


def test_randomness_belongs_to_seed_and_id():
    one, two = SamplingParams(max_new_tokens=5, seed=1), SamplingParams(max_new_tokens=5, seed=2)
    a = uniforms(["x", "y"], 3, one)
    assert a.shape == (2, 3, 5)
    assert torch.equal(a[1], uniforms(["y"], 3, one)[0])
    assert not torch.equal(a, uniforms(["x", "y"], 3, two))


def test_a_pipeline_works_on_as_many_groups_of_prompts_as_it_has_stages(monkeypatch):
    """All are on their way before the first one's tokens are awaited, and then they take turns."""
    log = []

    class Recorded:
        def __init__(self, gpt, rotary, valid, noise, **settings):
            self.num_prompts, self.steps, self.ids = len(valid), 2, noise[:, 0, 0].tolist()

        def prefill(self, prompts):
            log.append(("prefill", self.ids))

        def take_tokens(self):
            log.append(("take", self.ids))
            self.steps -= 1
            return self.steps > 0

        def decode(self):
            log.append(("decode", self.ids))
            return True

        def finished(self):
            return self.ids, self.ids, self.ids

    monkeypatch.setattr(generation, "_Answers", Recorded)
    monkeypatch.setattr(generation, "rotary_table", lambda gpt, length: None)
    monkeypatch.setattr(generation.pipeline, "num_stages", lambda: 3)
    monkeypatch.setattr(generation, "uniforms", lambda ids, *_: torch.arange(len(ids))[:, None, None])
    found = generation.generate(
        SimpleNamespace(fixed_decode=None), None, torch.ones(5, 4, dtype=torch.bool), ids=list("abcde"), group_size=1,
        end_id=0, banned_ids=torch.tensor([]), params=SamplingParams(max_new_tokens=2),
    )  # fmt: skip
    groups = [[0, 1], [2, 3], [4]]
    turns = [(step, group) for group in groups for step in ("take", "decode")]
    assert log == [*(("prefill", group) for group in groups), *turns, *(("take", group) for group in groups)]
    assert found.token_ids == [0, 1, 2, 3, 4]
