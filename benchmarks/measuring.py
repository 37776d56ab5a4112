"""What benchmarks measure with: random documents, time, peak memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from megatron_direct.runtime import host, memory, parallel


def random_documents(folder: str, count: int, length: int, vocab_size: int) -> str:
    """The prefix of an indexed dataset of documents of equal length; rank 0 calls this."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = str(Path(folder) / f"documents-{count}-{length}")
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=np.int32)
    generator = np.random.default_rng(0)
    for _ in range(count):
        document = generator.integers(0, vocab_size, length)
        builder.add_document(torch.from_numpy(document), [length])
    builder.finalize(prefix + ".idx")
    return prefix


def fastest_in_turns(calls: Mapping[str, Callable], rounds: int,
                     clock: Callable[[Callable], float] | None = None) -> dict[str, float]:
    """Seconds of each call, of its fastest round: other work on the machine only ever adds time.

    The calls take turns, so that a slow spell of the machine meets all of them. clock(call) makes
    the call and returns its seconds; None: ``seconds``.
    """
    clock = clock or seconds
    taken = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            taken[name].append(clock(call))
    return {name: min(times) for name, times in taken.items()}


def seconds(call: Callable) -> float:
    """Wall-clock time until every rank is done."""
    parallel.barrier()
    start = time.perf_counter()
    call()
    if host.has_gpu():
        torch.cuda.synchronize()
    parallel.barrier()
    return time.perf_counter() - start


def processor_seconds(call: Callable) -> float:
    """Of this process, to which other work on the machine adds little; on a GPU ``seconds``."""
    if host.has_gpu():
        return seconds(call)
    start = time.process_time()
    call()
    return time.process_time() - start


def peak_bytes(call: Callable) -> int:
    """Most memory of this rank during a call that all make, above what it held before."""
    parallel.barrier()
    return memory.peak_bytes(call)
