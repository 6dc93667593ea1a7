# SPDX-License-Identifier: Apache-2.0
"""megatron-core on a machine without CUDA.

megatron-core 0.16 names CUDA in about forty places that have nothing to do with kernels: buffers made on
``device="cuda"``, ``torch.cuda.current_device()``, tensor types compared with ``torch.cuda.FloatTensor``. Two things
make the same code run on CPU with gloo:

* ``install()`` replaces a handful of ``torch.cuda`` functions once per process; it does nothing where CUDA is present;
* ``redirect_cuda()`` is a scope in which tensors asked for on CUDA are made on the CPU. Its cost is one Python call per
  torch function, so it is entered around the schedule, the optimizer and checkpoint I/O, never around a forward pass.
"""

import sys
from contextlib import contextmanager, nullcontext

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_OPTIMIZER_SOURCES = "/megatron/core/optimizer/"
_installed = False


def _names_cuda(device) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


def _called_from_optimizer() -> bool:
    return _OPTIMIZER_SOURCES in sys._getframe(2).f_code.co_filename


class _CudaToCpu(TorchFunctionMode):
    """Sends every request for a CUDA tensor to the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs and _called_from_optimizer():
            return func(*args).replace("torch.", "torch.cuda.", 1)  # the optimizer sorts gradients by this name
        if "device" in kwargs and _names_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": _CPU}
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        return func(*args, **kwargs)


def install() -> None:
    """Replace the ``torch.cuda`` functions that megatron-core calls on every path. Idempotent; no-op with CUDA."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    import megatron.core.tensor_parallel.random as megatron_random

    torch.cuda.current_device = lambda: _CPU
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    torch.cuda.manual_seed = torch.manual_seed
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    _installed = True


def redirect_cuda():
    """Scope in which CUDA tensors are made on the CPU; does nothing where CUDA is present."""
    return nullcontext() if torch.cuda.is_available() else _CudaToCpu()


@contextmanager
def plain_torch():
    """Leave ``redirect_cuda()`` for a while: a forward pass inside a schedule pays no Python call per operation."""
    with nullcontext() if torch.cuda.is_available() else torch._C.DisableTorchFunction():
        yield
