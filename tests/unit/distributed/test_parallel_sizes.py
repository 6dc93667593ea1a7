# SPDX-License-Identifier: Apache-2.0
"""What cannot be a layout is refused in words, wherever it comes in."""

import pytest

from nemo_rba.distributed import parallel
from nemo_rba.modules.gpt import check_layout
from nemo_rba.plan.shapes import Layout

SIZES = {"num_attention_heads": 6, "num_query_groups": 2, "ffn_hidden_size": 96, "num_layers": 3}


@pytest.mark.parametrize("wrong", [0, -1, 1.0, "2", True, None])
@pytest.mark.parametrize("key", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_a_size_that_is_no_number_of_ranks_is_refused(key, wrong):
    sizes = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1} | {key: wrong}
    message = f"model.{key.replace('_parallel', '_model_parallel')} is {wrong!r}; expected a whole number of at least 1"
    for check in (
        lambda: check_layout(transformer=SIZES, sequence_parallel=False, world_size=1, **sizes),
        lambda: parallel.initialize(seed=0, **sizes),
        lambda: Layout(world_size=1, sequence_parallel=False, **sizes),
    ):
        with pytest.raises(ValueError, match=message):
            check()
