# SPDX-License-Identifier: Apache-2.0
"""What a model makes of an answer between its layers: hidden states of two passes, compared layer by layer.

The layers are megatron's and stay as they are; their outputs are seen by forward hooks. A state is the residual stream
after a layer, before the final norm, at the position that predicts an answer's token. Layers are numbered from 1 over
all pipeline stages, and each stage sees its own. ``Agreement`` measures; ``Attraction`` is a loss.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from nemo_rba.modules.attention import GroupPlan
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
        receive(layer.layer_number, _states(gpt, output[0], kwargs["attention_bias"], mask))

    with _hooked(gpt, layers, hook):
        yield


@contextmanager
def _hooked(gpt: GPTModel, layers: Sequence[int], hook: Callable) -> Iterator[None]:
    """Scope in which this stage's layers among ``layers`` have a forward hook."""
    own = [layer for layer in gpt.decoder.layers if layer.layer_number in layers]
    hooks = [layer.register_forward_hook(hook, with_kwargs=True) for layer in own]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def _states(gpt: GPTModel, hidden: Tensor, plan: GroupPlan, mask: Tensor) -> Tensor:
    """Of a layer's output in a pass by ``plan``, the states (M, H) that predict the real tokens of ``mask`` (N, T)."""
    if gpt.config.sequence_parallel:  # what is made of it is the same on every rank, and so is its gradient
        hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
    return answer_states(hidden, plan)[mask]


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


class Attraction:
    """A loss on the states of passes with a gradient: that they be like those of other passes without one.

        scale * sum over this stage's layers and over tokens of (1 - cosine)

    Its gradient joins that of a layer's output as the layer is run, carried by what megatron carries the losses of
    mixtures of experts with. So it is there on every pipeline stage, and where activations are computed again. A pass
    is known by its plan, since stages begin the next microbatch before the gradient of the last one comes back.

    Of every microbatch that waits or is on its way it keeps the states to be like, (layers of this stage, M, H) in the
    model's precision, until each has been compared.

    Args:
        gpt: this rank's share of the model.
        layers: see ``chosen_layers``.
        scale: of the loss, by which it stands beside the one that megatron goes back from.
    """

    def __init__(self, gpt: GPTModel, layers: Sequence[int], *, scale: float):
        self._gpt, self._layers, self._scale = gpt, layers, scale
        self._waiting: deque[tuple[Tensor, dict[int, Tensor]]] = deque()
        self._current: tuple[Tensor, dict[int, Tensor]] | None = None
        self._passes: dict[int, tuple[GroupPlan, Tensor, dict[int, Tensor]]] = {}
        self.total = torch.zeros((), device=next(gpt.parameters()).device)  # of the cosines

    @contextmanager
    def keep(self, mask: Tensor) -> Iterator[None]:
        """Scope of the pass to be like, of a microbatch with the real tokens ``mask`` (N, T), on the model's device."""
        self._current, kept = None, {}
        with watched(self._gpt, self._layers, mask, kept.__setitem__), torch.no_grad():
            yield
        self._waiting.append((mask, kept))

    def begin(self) -> None:
        """The next pass with a gradient is that of the microbatch kept first."""
        self._current = self._waiting.popleft()

    @contextmanager
    def draw(self) -> Iterator[None]:
        """Scope of all passes with a gradient, forward and back."""
        with _hooked(self._gpt, self._layers, self._join):
            yield
        self._passes.clear()

    def _join(self, layer, args, kwargs, output):
        """A hook: the layer's output, whose gradient will bring that of the loss along."""
        plan = kwargs["attention_bias"]
        if id(plan) not in self._passes:
            if self._current is None:
                return None  # a pass to be like
            self._passes[id(plan)] = (plan, *self._current)
        if not torch.is_grad_enabled():
            return None  # the layer will be computed again, for the gradient
        _, mask, kept = self._passes[id(plan)]
        states = _states(self._gpt, output[0], plan, mask)
        cosines = F.cosine_similarity(kept.pop(layer.layer_number).float(), states.float(), dim=-1).sum()
        self.total += cosines.detach()
        return MoEAuxLossAutoScaler.apply(output[0], -self._scale * cosines), *output[1:]
