"""The device of this rank, and what carries its messages."""

from __future__ import annotations

import torch

from megatron_direct.runtime import ranks


def has_gpu() -> bool:
    return torch.cuda.is_available()


def device() -> torch.device:
    """The device of this rank: its own GPU where there is one, else the CPU."""
    if has_gpu():
        return torch.device("cuda", ranks.discover().local_rank)
    return torch.device("cpu")


def collective_backend() -> str:
    return "nccl" if has_gpu() else "gloo"
