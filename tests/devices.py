"""The same function on a GPU and on the CPU.

Each call has a process of its own: a process that has seen the GPU computes there for good.
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor


def on_device(device: str, function, *arguments):
    """``function(*arguments)`` on one rank of its own, on "cuda" or "cpu"."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _choose, (device,)) as pool:
        return pool.submit(_run, function, arguments).result()


def _choose(device: str) -> None:
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _run(function, arguments):
    from megatron_direct.config import ParallelConfig
    from megatron_direct.mcore import grid
    from megatron_direct.mcore.without_gpu import megatron_runtime
    from megatron_direct.runtime import parallel

    with megatron_runtime(), parallel.process_group(), grid.model_parallel(ParallelConfig()):
        return function(*arguments)
