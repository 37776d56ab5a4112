"""The device of this rank, and what carries its messages."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import psutil
import torch

from megatron_direct.runtime import ranks


def has_gpu() -> bool:
    return torch.cuda.is_available()


def device() -> torch.device:
    """The device of this rank: its own GPU where there is one, else the CPU.

    Slurm may show each task its own GPU alone (``--gpus-per-task``), which then is number 0.
    """
    if has_gpu():
        number = ranks.discover().local_rank if torch.cuda.device_count() > 1 else 0
        return torch.device("cuda", number)
    return torch.device("cpu")


def free_bytes() -> int:
    """Memory that nothing uses: of this rank's GPU, else its share of this machine's, as if all
    ranks were on it."""
    if has_gpu():
        return torch.cuda.mem_get_info(device())[0]
    return psutil.virtual_memory().available // ranks.discover().world_size


def to_device(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the host, on this rank's device. By pinned memory, so that the host does not
    wait for what the GPU still has to do."""
    return tensor.pin_memory().to(device(), non_blocking=True) if has_gpu() else tensor


class HostCopy:
    """The tensor that ``make()`` returns, on its way to the host.

    A GPU makes it beside what is queued later, once it has done what was queued before; on a CPU it
    is made when it is wanted.
    """

    def __init__(self, make: Callable[[], torch.Tensor]):
        self._make = make  # and with it the tensors that the GPU makes it of
        self._arrived = None
        if has_gpu():
            # At once: with CUDA_DEVICE_MAX_CONNECTIONS=1 it would have to wait for later work.
            stream = _side_stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                made = make()
                self._copy = torch.empty(made.shape, dtype=made.dtype, pin_memory=True)
                self._copy.copy_(made, non_blocking=True)
                self._arrived = torch.cuda.Event()
                self._arrived.record()

    def numpy(self) -> np.ndarray:
        """Waits for this copy, and for nothing that was queued since."""
        if self._arrived is None:
            return self._make().numpy()
        self._arrived.synchronize()
        return self._copy.numpy().copy()  # pinned memory is scarce, and the next pass's


@functools.cache
def _side_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream(device())


def collective_backend() -> str:
    return "nccl" if has_gpu() else "gloo"
