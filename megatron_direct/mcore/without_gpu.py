"""Lets megatron-core run where there is no GPU.

megatron-core asks for CUDA in a handful of places (the current device, the CUDA random states, the
type string of a tensor). On a machine without a GPU, :func:`megatron_runtime` answers these
questions with the CPU for as long as it is entered, and puts everything back when it is left. On a
machine with a GPU it makes the rank's own the current one, and asks torch for sums in one order,
whatever the order in which threads end: a run that was killed ends with the bytes of an unbroken
one, and a selection can be made again.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_direct.runtime.host import device, has_gpu

_CUDA_TENSOR_TYPES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.float64: "torch.cuda.DoubleTensor",
}


@contextlib.contextmanager
def megatron_runtime():
    """Everything that uses megatron-core runs inside this context, on any machine."""
    if has_gpu():
        torch.cuda.set_device(device())
        with _sums_in_one_order():
            yield
        return
    _import_uncompiled()
    with contextlib.ExitStack() as stack:
        for owner, name, stand_in in _stand_ins():
            stack.enter_context(_replaced(owner, name, stand_in))
        stack.enter_context(_CudaMeansCpu())
        yield


def _import_uncompiled() -> None:
    """megatron-core, whose small functions then run on the CPU as they are written.

    It has torch compile them (its ``jit_fuser``; its ``disable_jit_fuser`` comes too late, when
    they have been imported). That takes a C++ compiler, and a third of the time in which a process
    starts. Where megatron-core has been imported already, it stays as it is.
    """
    if "megatron.core" not in sys.modules:
        with _replaced(torch, "compile", lambda function: function):
            import megatron.core  # noqa: F401  (jit_fuser is what torch.compile is now)


@contextlib.contextmanager
def _sums_in_one_order():
    """What has no such kernel runs unchanged: the attention and the sums of this package have."""
    # cuBLAS reads it when it is first used; of this size its workspace is what torch gives it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    enabled = torch.are_deterministic_algorithms_enabled()
    memory: Any = torch.utils.deterministic
    fills = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False  # that would cost time for nothing
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have a deterministic")
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=True)
        memory.fill_uninitialized_memory = fills


class _CudaMeansCpu(TorchFunctionMode):
    """Factories asked for a CUDA device build on the CPU; ``Tensor.type()`` names the CUDA type.

    megatron-core's gradient clipping and distributed optimizer compare that type string to decide
    whether a gradient may be used.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if not kwargs:  # nearly all operations, and all of them come by here
            if func is torch.Tensor.type and len(args) == 1:
                return _CUDA_TENSOR_TYPES.get(args[0].dtype, func(*args))
            return func(*args)
        if "cuda" in str(kwargs.get("device", "")):
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


def operations_of_torch() -> contextlib.AbstractContextManager:
    """A context without the stand-ins for operations, for code of ours that makes many small ones:
    each operation that goes through them takes some microseconds longer.
    """
    return torch._C.DisableTorchFunction()


@contextlib.contextmanager
def _replaced(owner, name, stand_in):
    original = getattr(owner, name)
    setattr(owner, name, stand_in)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _stand_ins():
    """(owner, attribute, what stands in for it) for every CUDA function megatron-core calls."""
    from megatron.core.tensor_parallel import random as megatron_random

    cpu = torch.device("cpu")

    def get_rng_state(*_args, **_kwargs):
        return torch.get_rng_state()

    def set_rng_state(state, *_args, **_kwargs):
        torch.set_rng_state(state)

    yield torch.cuda, "current_device", lambda: cpu
    # Asked for before gradients are summed, and used only where CUDA graphs are.
    yield torch.cuda, "current_stream", lambda *_args, **_kwargs: None
    yield torch.cuda, "synchronize", lambda *_args, **_kwargs: None
    yield torch.cuda, "get_rng_state", get_rng_state
    yield torch.cuda, "set_rng_state", set_rng_state
    yield torch.cuda, "manual_seed", lambda seed: torch.manual_seed(seed) and None
    yield torch.Tensor, "cuda", lambda self, *_args, **_kwargs: self
    yield megatron_random, "_get_cuda_rng_state", get_rng_state
    yield megatron_random, "_set_cuda_rng_state", set_rng_state
