# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from nemo_rba.rewards.mixture import RewardMixture
from nemo_rba.types import Instruction, Rollout


def rollouts(*responses: str) -> list[Rollout]:
    instruction = Instruction(id="i7", text="hello", response="hi", task="open")
    return [
        Rollout(
            prompt_index=0,
            instruction=instruction,
            response=response,
            token_ids=torch.tensor([1]),
            logprobs=None,
            truncated=False,
        )
        for response in responses
    ]


def length(answers):
    return torch.tensor([float(len(answer.response)) for answer in answers])


def constant(answers):
    return torch.ones(len(answers), dtype=torch.float64)


def test_weighted_sum_and_parts():
    mixture = RewardMixture(parts={"length": length, "one": constant}, weights={"length": 0.5, "one": -2.0})
    total, parts = mixture.score(rollouts("ab", "abcd"))
    assert total.tolist() == [-1.0, 0.0]
    assert total.dtype == torch.float32
    assert parts["length"].tolist() == [2.0, 4.0]
    assert mixture(rollouts("ab", "abcd")).tolist() == [-1.0, 0.0]


def test_names_and_weights_are_checked_at_construction():
    with pytest.raises(ValueError, match=r"\['length'\] and weights \['lenght'\].*reward\.weights"):
        RewardMixture(parts={"length": length}, weights={"lenght": 1.0})
    for weight in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite and not all 0"):
            RewardMixture(parts={"length": length}, weights={"length": weight})


def test_a_bad_score_names_the_part_and_the_response():
    def broken(answers):
        return torch.tensor([1.0, torch.nan])

    with pytest.raises(ValueError, match=r"'broken' gave nan for response 'second' to instruction 'i7'"):
        RewardMixture(parts={"broken": broken}, weights={"broken": 1.0})(rollouts("first", "second"))
    with pytest.raises(ValueError, match=r"shape \(2,\), expected \(3,\)"):
        RewardMixture(parts={"broken": broken}, weights={"broken": 1.0})(rollouts("a", "b", "c"))
