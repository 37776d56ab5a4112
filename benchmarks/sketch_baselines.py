"""What ``sketch/bench.py`` on a CPU and ``gpu.py`` on a GPU compare sketching passes with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch

from megatron_direct.data.samples import MicroBatchLimits, SampleSource
from megatron_direct.mcore import passes
from megatron_direct.mcore.shards import num_parameters


@contextlib.contextmanager
def without_weight_gradients(chunks: list[torch.nn.Module]) -> Iterator[None]:
    """Activations have gradients inside, weights have none."""
    for parameter in chunks[0].parameters():
        parameter.requires_grad_(False)
    handle = chunks[0].embedding.register_forward_hook(
        lambda _layer, _arguments, output: output.requires_grad_(True))
    try:
        yield
    finally:
        handle.remove()
        for parameter in chunks[0].parameters():
            parameter.requires_grad_(True)


def plain_sketch(chunks: list[torch.nn.Module], samples: SampleSource, numbers: np.ndarray,
                 size: int) -> Callable[[], None]:
    """A backward pass for each sample, and a signed sum of its gradient's entries in ``size``
    buckets: nothing that an afternoon could not write."""
    count, generator = num_parameters(chunks), torch.Generator().manual_seed(0)
    buckets = torch.randint(0, size, (count,), generator=generator, dtype=torch.int32)
    signs = torch.randint(0, 2, (count,), generator=generator, dtype=torch.int8) * 2 - 1
    device, one = next(chunks[0].parameters()).device, MicroBatchLimits(1)
    buckets, signs = buckets.to(device), signs.to(device)

    def run() -> None:
        for micro_batches in passes.of_samples(chunks, samples, numbers, one):
            for parameter in chunks[0].parameters():
                parameter.grad = None
            passes.run_pass(chunks, micro_batches, backward=True)
            row, first = torch.zeros(size, device=device), 0
            for parameter in chunks[0].parameters():
                entries = slice(first, first + parameter.numel())
                row.index_add_(0, buckets[entries],
                               parameter.grad.flatten().float() * signs[entries])
                first = entries.stop

    return run
