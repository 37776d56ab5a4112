"""What each kernel takes to hash a linear layer's gradients, and what the choice among them loses.

    python benchmarks/sketch/kernels.py --device cpu
    python benchmarks/sketch/kernels.py --device cuda

Times every kernel on a list of shapes, fits the coefficients of ``gradients/kernels/costs.py``, and
prints the table, the coefficients as a literal to be put there, and the time of the kernel chosen
over that of the fastest, by the coefficients that are there and by those just fitted. Pieces are in
float32 on a CPU and in bfloat16 on a GPU. On a CPU what counts is the processor time of one thread:
other work on the machine adds little to it.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

import numpy as np
import scipy.optimize
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from megatron_direct.gradients.hashes import Hashes
from megatron_direct.gradients.kernels import KERNELS, costs
from megatron_direct.gradients.kernels.costs import Coefficients
from megatron_direct.gradients.kernels.kernel import Kernel, Work
from megatron_direct.gradients.pieces import OuterProducts
from megatron_direct.mcore.shards import ParameterShard

BAR = 1.15  # the kernel chosen over the fastest, on every shape


@dataclass(frozen=True)
class Shape:
    outputs: int
    inputs: int
    tokens: int
    samples: int
    size: int = 2048
    of_vocabulary: bool = False


# Layers 128 to 1024 wide, narrow and wide in either direction.
_WIDTHS = ((128, 128), (512, 128), (1024, 192), (256, 256), (1024, 256), (512, 512), (1536, 512),
           (512, 1408), (1024, 1024))
SHAPES = {
    "cpu": [*(Shape(o, i, t, 2) for o, i in _WIDTHS for t in (128, 512, 2048)),
            *(Shape(o, i, 512, 2, 512) for o, i in _WIDTHS),
            *(Shape(o, i, t, 2) for o, i in ((2816, 512), (3072, 1024), (1024, 2752))
              for t in (128, 512)),
            *(Shape(o, i, t, 2, of_vocabulary=True) for o, i in ((4096, 192), (8192, 512),
                                                                 (8192, 1024))
              for t in (128, 512))],
    "cuda": [*(Shape(o, i, t, 8) for o, i in _WIDTHS for t in (128, 512, 2048)),
             *(Shape(o, i, 1024, 8) for o, i in ((3072, 1024), (1024, 1024), (5504, 1024),
                                                 (1024, 2752))),
             Shape(50304, 1024, 1024, 8, of_vocabulary=True),
             *(Shape(o, i, 4096, 2) for o, i in ((6144, 4096), (28672, 4096), (4096, 14336),
                                                 (512, 4096), (4096, 512)))],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=list(SHAPES),
                        default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print_kernels(arguments.device, arguments.rounds)


def print_kernels(device: str, rounds: int) -> None:
    shapes = SHAPES[device]
    print(f"{'outputs':>8}{'inputs':>8}{'tokens':>8}{'samples':>8}{'k':>6}",
          *(f"{kernel.name + ' ms':>12}" for kernel in KERNELS), "  chosen    over the fastest",
          sep="")
    timed = []
    for shape in shapes:
        timed.append(_milliseconds(shape, device, rounds))
        chosen = _chosen(shape, device, costs.of(device))
        print(f"{shape.outputs:8}{shape.inputs:8}{shape.tokens:8}{shape.samples:8}{shape.size:6}",
              *(f"{timed[-1].get(kernel.name, float('nan')):12.3f}" for kernel in KERNELS),
              f"  {chosen:9}{timed[-1][chosen] / min(timed[-1].values()):18.2f}", sep="",
              flush=True)
    fitted = _fit(shapes, timed, device)
    print(f'"{device}": {_literal(fitted)}')
    for name, table in (("in use", costs.of(device)), ("just fitted", fitted)):
        losses = [of_shape[_chosen(shape, device, table)] / min(of_shape.values())
                  for shape, of_shape in zip(shapes, timed, strict=True)]
        print(f"coefficients {name}: the kernel chosen takes at worst {max(losses):.2f} times what "
              f"the fastest takes (bar {BAR}), {np.mean(losses):.3f} times on average")


def _milliseconds(shape: Shape, device: str, rounds: int) -> dict[str, float]:
    """Of each kernel, for all samples of a piece; the fastest of some rounds, in turns."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16

    def draw(width: int) -> torch.Tensor:
        return torch.randn(shape.tokens, shape.samples, width, generator=generator, device=device,
                           dtype=dtype)

    piece = OuterProducts(draw(shape.inputs), draw(shape.outputs))
    hashes = _hashes(shape, device)
    kernels = [kind(shape.samples, shape.size, torch.device(device))
               for kind in _able(shape, device)]
    times = {kernel.name: [] for kernel in kernels}
    # On a GPU several layers one after another: a launch is not waited for, and what a kernel puts
    # off until a buffer is full comes as often as it does in a pass.
    layers = 1 if device == "cpu" else 8
    for kernel in kernels:
        _seconds(kernel, piece, hashes, layers)
    for _ in range(rounds):
        for kernel in kernels:
            times[kernel.name].append(_seconds(kernel, piece, hashes, layers))
    return {name: 1e3 * min(of_kernel) / layers for name, of_kernel in times.items()}


def _seconds(kernel: Kernel, piece: OuterProducts, hashes: Hashes, layers: int) -> float:
    if piece.inputs.is_cuda:
        torch.cuda.synchronize()
    clock = time.perf_counter if piece.inputs.is_cuda else time.process_time
    begun = clock()
    for _ in range(layers):
        kernel.add(0, piece, hashes)
    if piece.inputs.is_cuda:
        torch.cuda.synchronize()
    return clock() - begun


@functools.cache
def _hashes(shape: Shape, device: str) -> Hashes:
    weight = torch.nn.Parameter(torch.empty(shape.outputs, shape.inputs, device="meta"))
    return Hashes.draw(ParameterShard(
        "weight", weight, torch.arange(shape.outputs, device=device),
        torch.arange(shape.inputs, device=device), (shape.outputs, shape.inputs), owned=True,
        adds_gradient=True, of_vocabulary=shape.of_vocabulary), shape.size, seed=1)


def _able(shape: Shape, device: str) -> list[type[Kernel]]:
    """The kernels that take such a layer's pieces."""
    piece = OuterProducts(torch.empty(0, 1, shape.inputs), torch.empty(0, 1, shape.outputs))
    return [kernel for kernel in KERNELS if kernel.takes(piece, _hashes(shape, device), device)]


def _work(shape: Shape, device: str) -> Work:
    hashes = _hashes(shape, device)
    return Work(shape.tokens, shape.outputs, shape.inputs, hashes.rows.size, hashes.columns.size,
                shape.size, shape.samples, device, bf16=device != "cpu")


def _chosen(shape: Shape, device: str, table: Coefficients) -> str:
    work = _work(shape, device)
    return min(_able(shape, device), key=lambda kernel: kernel.cost(work, table)).name


def _fit(shapes: Sequence[Shape], timed: Sequence[dict[str, float]], device: str) -> Coefficients:
    """The least squares of relative errors, over coefficients that are not negative.

    A cost is linear in the coefficients, so that its counts are the costs of unit vectors; where it
    is the least of several, the way is chosen by the coefficients of the step before.
    """
    names = [field.name for field in fields(Coefficients)]
    fitted = costs.of(device)
    for _ in range(20):
        rows = []
        for shape, of_shape in zip(shapes, timed, strict=True):
            work = _work(shape, device)
            for kernel in _able(shape, device):
                slopes = np.array([_slope(kernel, work, fitted, name) for name in names])
                rows.append(slopes / (1e6 * of_shape[kernel.name]))
        counts = np.array(rows)
        scales = np.maximum(np.linalg.norm(counts, axis=0), np.finfo(float).tiny)
        found = scipy.optimize.nnls(counts / scales, np.ones(len(counts)))[0] / scales
        # One that nothing depends on stays; none vanishes because others make up for it.
        in_use = np.array(astuple(costs.of(device)))
        found = np.where(np.abs(counts).max(0) > 0, np.maximum(found, 0.1 * in_use), in_use)
        before, fitted = fitted, Coefficients(*(float(f"{value:.3g}") for value in found))
        if fitted == before:
            break
    if device == "cpu":  # where bfloat16 is multiplied in float32
        fitted = replace(fitted, bf16_multiply_add=fitted.multiply_add)
    return fitted


def _slope(kernel: type[Kernel], work: Work, table: Coefficients, name: str) -> float:
    """What a unit of one coefficient adds to a cost."""
    value = getattr(table, name)
    step = 1e-6 * (value or 1.0)
    more = replace(table, **{name: value + step})
    return (kernel.cost(work, more) - kernel.cost(work, table)) / step


def _literal(table: Coefficients) -> str:
    values = ", ".join(f"{field.name}={getattr(table, field.name):g}" for field in fields(table))
    return f"Coefficients({values})"


if __name__ == "__main__":
    main()
