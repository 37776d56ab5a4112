"""What each of the kernels for a GPU saves, and where the time of a sketch goes.

For ``gpu.py``: contexts that put torch's operations in the place of a kernel, the kernels of one
call by their time, and the count sketch alone beside the bytes that it has to move.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from megatron_direct.gradients import hashes, layers
from megatron_direct.gradients.hashes import AxisHash, Hashes
from megatron_direct.gradients.kernels import frames
from megatron_direct.gradients.kernels.kept_axis import count_sketch_by_product
from megatron_direct.mcore.shards import ParameterShard
from megatron_direct.mcore.specs import fused

BYTES_PER_MS = 3e9  # what an H100's memory does
TOP = 25  # kernels that are listed
# (width, tokens) of the factors of both shapes' layers.
FACTORS = {"cuda": [(1024, 16384), (2752, 16384), (3072, 16384), (5504, 16384), (4096, 8192),
                    (6144, 8192), (14336, 8192), (28672, 8192), (50304, 8192)],
           "cpu": [(96, 64)]}


def variants() -> dict[str, AbstractContextManager]:
    """{what is different: a context in which it is}"""
    @contextlib.contextmanager
    def everything() -> Iterator[None]:
        with _torch_takes(hashes), _torch_takes(layers), _torch_takes(fused):
            yield

    return {
        "without the count sketch kernel": _torch_takes(hashes),
        "without any kernel of ours": everything(),
        "a buffer of 8192 tokens": mock.patch.object(
            frames, "BUFFERED_TOKENS", {**frames.BUFFERED_TOKENS, "cuda": 8192}),
    }


def _torch_takes(module: Any) -> AbstractContextManager:
    """What a module of the package would give to a kernel."""
    return mock.patch.object(module, "gpu_kernels", SimpleNamespace(apply_to=lambda tensor: False))


def write_profile(call: Callable[[], None], path: Path) -> None:
    """The kernels that take most of a call's time, as a table; on a CPU the operations."""
    on_gpu = torch.cuda.is_available()
    activity = torch.profiler.ProfilerActivity
    call()
    with torch.profiler.profile(activities=[activity.CUDA if on_gpu else activity.CPU]) as profile:
        call()
        if on_gpu:
            torch.cuda.synchronize()

    def milliseconds(event: Any) -> float:
        return (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3

    events = sorted(profile.key_averages(), key=milliseconds, reverse=True)
    total = sum(milliseconds(event) for event in events)
    lines = [f"{milliseconds(event):10.3f} ms {100 * milliseconds(event) / total:5.1f} % "
             f"{event.count:6} x {event.key[:150]}" for event in events[:TOP]]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([f"{total:10.3f} ms in all", *lines, ""]))


def count_sketches(size: int, milliseconds: Callable[[Callable[[], None]], float],
                   ) -> Iterator[dict[str, float]]:
    """Of one factor in bfloat16: by the kernel, by torch, and by its bytes; and that of a layer's
    longer axis, by a product."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for width, tokens in FACTORS[device]:
        values = torch.randn(tokens // 8, 8, width, device=device, dtype=torch.bfloat16)
        places = values.new_empty(8, tokens // 8, size).transpose(0, 1)
        axis = _axis(width, size, device)

        def write(axis=axis, values=values, places=places) -> None:
            axis.write_count_sketch(values, places)

        row = {"width": width, "tokens": tokens, "kernel": _fastest(write, milliseconds)}
        with _torch_takes(hashes):
            row["torch"] = _fastest(write, milliseconds)
        narrow = _axis(width, hashes.num_narrow_buckets(size), device)

        def write_narrow(axis=narrow, values=values) -> None:
            count_sketch_by_product(axis, values)

        yield row | {"bytes": 2 * tokens * (width + size) / BYTES_PER_MS,
                     "narrow": _fastest(write_narrow, milliseconds)}


def _axis(width: int, size: int, device: str) -> AxisHash:
    rows = torch.arange(width, device=device)
    shard = ParameterShard("w", torch.nn.Parameter(torch.empty(width, 1, device=device)), rows,
                           rows[:1], (width, 1), True, True)
    return Hashes.draw(shard, size, seed=1).rows


def _fastest(call: Callable[[], None], milliseconds: Callable[[Callable[[], None]], float],
             ) -> float:
    call()
    return min(milliseconds(call) for _ in range(5))
