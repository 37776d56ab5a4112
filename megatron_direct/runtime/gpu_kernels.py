"""Whether kernels written in Triton can run here.

Each has operations of torch beside it that compute the same, for the CPU and for machines on which
Triton is missing or cannot compile (it needs a C compiler).
"""

from __future__ import annotations

import functools
import warnings

import torch


def apply_to(tensor: torch.Tensor) -> bool:
    """Whether our kernels take such a tensor: in float32 or bfloat16, on a GPU."""
    return tensor.is_cuda and tensor.dtype in (torch.float32, torch.bfloat16) and can_compile()


@functools.cache
def can_compile() -> bool:
    """Tries the smallest kernel, once a process; says so if it cannot be compiled."""
    if not torch.cuda.is_available():
        return False
    try:
        from megatron_direct.runtime import smallest_kernel

        return smallest_kernel.runs()
    except Exception as error:
        warnings.warn(f"kernels of our own cannot be compiled here, and torch's operations take "
                      f"their place, which are slower: {type(error).__name__}: {error}",
                      stacklevel=2)
        return False
