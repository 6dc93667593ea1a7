# SPDX-License-Identifier: Apache-2.0
"""Layouts that cannot run are refused before anything is built, with the numbers that do not fit."""

import pytest

from nemo_rba.modules.gpt import check_layout

SIZES = {"num_attention_heads": 6, "num_query_groups": 2, "ffn_hidden_size": 96, "num_layers": 3}


@pytest.mark.parametrize(
    ("tp", "pp", "sequence_parallel", "message"),
    [
        (4, 1, False, "num_attention_heads 6 does not divide by tensor_model_parallel_size 4"),
        (3, 1, False, "num_query_groups 2 does not divide by tensor_model_parallel_size 3"),
        (5, 1, False, "ffn_hidden_size 96 does not divide by tensor_model_parallel_size 5"),
        (1, 2, False, "num_layers 3 does not divide by pipeline_model_parallel_size 2"),
        (1, 1, True, "sequence_parallel needs tensor_model_parallel_size above 1"),
    ],
)
def test_uneven_layouts_are_refused_with_the_numbers(tp, pp, sequence_parallel, message):
    with pytest.raises(ValueError, match=message):
        check_layout(
            transformer=SIZES, tensor_parallel_size=tp, pipeline_parallel_size=pp,
            sequence_parallel=sequence_parallel, world_size=tp * pp,
        )  # fmt: skip


def test_a_world_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="6 processes do not divide into groups of tensor_model_parallel_size 2 x"):
        check_layout(
            transformer=SIZES | {"num_layers": 4}, tensor_parallel_size=2, pipeline_parallel_size=2,
            sequence_parallel=False, world_size=6,
        )  # fmt: skip
