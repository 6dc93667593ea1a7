# SPDX-License-Identifier: Apache-2.0
"""What all ranks of a model-parallel group need and one of them can do: rewards, and the teacher's judgement.

The ranks that share one copy of the student see the same prompts and the same answers. A teacher of 8B on each of
them would be the same work, and the same memory, many times over.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from nemo_rba.distributed import parallel


class OncePerModel:
    """Stands for an object that exists on the first rank of each model-parallel group, by its methods only.

    Every call is collective over the group: the first rank makes it, and all get the answer, or the error.

    Args:
        build: makes the object; called on the first rank of the group.
    """

    def __init__(self, build: Callable[[], Any]):
        self._object: Any = None
        self._everywhere(partial(self._make, build))

    def _make(self, build: Callable[[], Any]) -> None:
        self._object = build()

    def __getattr__(self, name: str) -> Callable:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self._everywhere(lambda: getattr(self._object, name)(*args, **kwargs))

    def _everywhere(self, call: Callable[[], Any]) -> Any:
        """The first rank's outcome, on all ranks of the group."""
        group, outcome = parallel_state.get_model_parallel_group(), [None, None]
        if parallel.model_parallel_rank() == 0:
            try:
                outcome[0] = call()
            except Exception as error:
                _share(group, [None, f"{type(error).__name__} on the first rank of the model: {error}"])
                raise
        value, problem = _share(group, outcome)
        if problem:
            raise ValueError(problem)
        return value


def once_per_model(build: Callable[[], Any]) -> Any:
    """``build()``; where several processes share one copy of the weights, an ``OncePerModel`` of it."""
    return build() if parallel.model_parallel_size() == 1 else OncePerModel(build)


def _share(group: dist.ProcessGroup, outcome: list) -> list:
    dist.broadcast_object_list(outcome, dist.get_process_group_ranks(group)[0], group=group, device=parallel.device())
    return outcome
