# SPDX-License-Identifier: Apache-2.0
"""What a model makes of an answer between its layers: hidden states of two passes, compared layer by layer.

The layers are megatron's and stay as they are; their outputs are seen by forward hooks. A state is the residual stream
after a layer, before the final norm, at the position that predicts an answer's token. Layers are numbered from 1 over
all pipeline stages, and each stage sees its own.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from nemo_rba.modules.gpt import answer_states


def chosen_layers(layers: Sequence[int], num_layers: int) -> list[int]:
    """The layers that are meant, of a model of ``num_layers``: all of them for [].

    Raises:
        ValueError: a number is out of range, or there twice.
    """
    wrong = [layer for layer in layers if layer not in range(1, num_layers + 1)]
    if wrong or len(set(layers)) < len(layers):
        raise ValueError(
            f"layers {list(layers)} must be different numbers from 1 to {num_layers}, the number of layers of this "
            "model, or [] for all of them: change representation.layers"
        )
    return list(layers) or list(range(1, num_layers + 1))


@contextmanager
def watched(gpt: GPTModel, layers: Sequence[int], mask: Tensor, receive: Callable[[int, Tensor], None]):
    """Scope in which every teacher-forced pass through this stage calls ``receive(layer, states)``, layer by layer.

    States are (M, H), M = real tokens in the row-major order of ``mask`` (N, T), on every tensor-parallel rank.
    """

    def hook(layer, args, kwargs, output) -> None:
        hidden = output[0]
        if gpt.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden)
        receive(layer.layer_number, answer_states(hidden, kwargs["attention_bias"])[mask])

    own = [layer for layer in gpt.decoder.layers if layer.layer_number in layers]
    hooks = [layer.register_forward_hook(hook, with_kwargs=True) for layer in own]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


class Agreement:
    """Cosines of N answers' states under two passes, added up over tokens and over this stage's layers.

    Between the passes it keeps the first one's states, (layers of this stage, M, H) in the model's precision; those of
    the second are compared as they come.

    Args:
        gpt: this rank's share of the model.
        layers: see ``chosen_layers``.
        mask: (N, T), the answers' real tokens, on the model's device.
    """

    def __init__(self, gpt: GPTModel, layers: Sequence[int], mask: Tensor):
        self._gpt, self._layers, self._mask = gpt, layers, mask
        self._kept: dict[int, Tensor] = {}
        self.total = torch.zeros(len(mask), device=mask.device)  # (N,)

    @contextmanager
    def keep(self) -> Iterator[None]:
        """Scope of the first pass."""
        with watched(self._gpt, self._layers, self._mask, self._kept.__setitem__):
            yield

    @contextmanager
    def compare(self) -> Iterator[None]:
        """Scope of the second pass."""
        with watched(self._gpt, self._layers, self._mask, self._add):
            yield

    def _add(self, layer: int, states: Tensor) -> None:
        cosines = torch.zeros(self._mask.shape, device=states.device)
        cosines[self._mask] = F.cosine_similarity(self._kept.pop(layer).float(), states.float(), dim=-1)
        self.total += cosines.sum(1)  # not index_add: on a GPU its order, and so its rounding, differs between ranks
