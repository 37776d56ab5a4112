"""Memory of this rank: on its GPU where there is one, else of its process."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_direct.runtime import host


def resident_bytes(field: str = "VmRSS") -> int:
    """Of this process, as the kernel counts them: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def peak_bytes(call: Callable[[], object]) -> int:
    """Most memory of this rank during a call, above what it held before."""
    gc.collect()
    if host.has_gpu():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # gives freed memory back, so that it is not counted as held
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak of resident memory
    earlier = resident_bytes()
    call()
    return resident_bytes("VmHWM") - earlier
