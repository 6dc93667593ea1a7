# SPDX-License-Identifier: Apache-2.0
"""A model that nobody uses any more makes room for the next one."""

import gc
import weakref

from tiny_models import load_speech_lm


def test_what_lies_in_cycles_is_freed_when_another_model_is_built(llama_salm):
    """As a trained model does: hooks, schedules and Lightning refer to it and it to them."""
    gc.collect()
    gc.disable()
    try:
        cycle = [load_speech_lm(llama_salm[0])]
        weights = weakref.ref(next(cycle[0].parameters()))
        cycle.append(cycle)
        del cycle
        assert weights() is not None
        load_speech_lm(llama_salm[0])
        assert weights() is None
    finally:
        gc.enable()
