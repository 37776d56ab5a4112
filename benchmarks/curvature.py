"""What a curvature product costs, against a gradient of the same batch, measured in one run.

    python benchmarks/curvature.py
    torchrun --nproc-per-node 4 benchmarks/curvature.py --tensor-model-parallel-size 2 \\
        --pipeline-model-parallel-size 2

Gradient and products take turns on the same micro-batches. Ratios are what to read, not times.
Memory is what a call takes above the memory at rest, in which the weights are. One rank also
measures what Lanczos takes beside the products, against ARPACK on the same operator.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from dataclasses import dataclass

import numpy as np
import scipy.sparse.linalg
import torch
from measuring import fastest_in_turns, peak_bytes, random_documents

from megatron_direct.cli import flags
from megatron_direct.cli import main as cli
from megatron_direct.config import Job, ModelConfig, ParallelConfig
from megatron_direct.curvature.fisher import FisherOperator
from megatron_direct.curvature.gauss_newton import GaussNewtonOperator
from megatron_direct.curvature.hessian import HessianOperator
from megatron_direct.curvature.krylov import SymmetricOperator
from megatron_direct.curvature.lanczos import leading_eigenpairs
from megatron_direct.curvature.thick_restart import Target
from megatron_direct.curvature.vectors import ParameterSpace
from megatron_direct.data.samples import MicroBatchLimits, Samples
from megatron_direct.mcore import grid, model, passes
from megatron_direct.mcore.shards import parameter_shards
from megatron_direct.mcore.without_gpu import megatron_runtime
from megatron_direct.runtime import host, parallel
from megatron_direct.steps.curvature_config import EXACT

OPERATORS = {"hessian": HessianOperator, "gauss-newton": GaussNewtonOperator,
             "fisher": FisherOperator}
# 6.0 M parameters, two thirds of them in the layers.
MODEL = ModelConfig(num_layers=6, hidden_size=256, num_attention_heads=4, vocab_size=4096,
                    seq_length=256)
LANCZOS_STEPS = 3
ROOM = 4 << 30  # enough for all that can be kept
# Lanczos against ARPACK: eigenvalues 1 / sqrt(j), and a tolerance that takes several restarts.
NUM_EIGENPAIRS, LANCZOS_TOL = 8, 1e-3


@dataclass(frozen=True)
class LayoutRequest:
    layout: ParallelConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_flags(parser, LayoutRequest)
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--num-samples", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    cli.quiet_imports()
    layout = flags.request_from(LayoutRequest, arguments).layout
    layout.require_fits(MODEL, parallel.world_size())
    with megatron_runtime(), parallel.process_group(), \
            grid.model_parallel(layout, layout.num_model_chunks(MODEL)), \
            tempfile.TemporaryDirectory() as folder:
        prefix = parallel.on_rank_zero(lambda: random_documents(
            folder, arguments.num_samples, MODEL.seq_length + 1, MODEL.vocab_size))
        _measure(layout, Samples([prefix], MODEL.seq_length), arguments)
        parallel.barrier()


def _measure(layout: ParallelConfig, samples: Samples, arguments) -> None:
    chunks = model.build(Job(MODEL, layout), spec="local")
    space = ParameterSpace(parameter_shards(chunks))
    micro_batch = MicroBatchLimits(arguments.micro_batch_size)
    operators = {name: operator(chunks, space, samples, samples.usable, micro_batch)
                 for name, operator in OPERATORS.items()}
    all_passes = list(passes.of_samples(chunks, samples, samples.usable, micro_batch))
    # The same, taking up what an earlier product has kept (curvature/kept.py).
    kept = {f"{name}, kept": OPERATORS[name](chunks, space, samples, samples.usable,
                                             micro_batch, ROOM) for name in EXACT}
    operators.update(kept)
    vector = space.random_signs(0)
    calls = {"gradient": lambda: _gradient(chunks, space, all_passes)}
    for name, operator in operators.items():
        calls[name] = lambda operator=operator: operator.matvec(vector)

    seconds = fastest_in_turns(calls, arguments.rounds)
    memory = {name: peak_bytes(call) for name, call in calls.items()}
    steps = {name: _all_reduces_per_step(operator) for name, operator in operators.items()}
    if parallel.is_rank_zero():
        print(f"{space.dimension / 1e6:.1f} M parameters, {parallel.world_size()} ranks, {layout}, "
              f"{len(samples)} samples of {MODEL.seq_length} tokens")
        print(f"{'':20}{'seconds':>9}{'/ gradient':>12}{'MiB':>8}{'/ gradient':>12}"
              f"{'all-reduces':>13}")
        for name in calls:
            print(f"{name:20}{seconds[name]:9.3f}{seconds[name] / seconds['gradient']:12.2f}"
                  f"{memory[name] / 2**20:8.0f}"
                  f"{memory[name] / memory['gradient']:12.2f}{steps.get(name, ''):>13}")
        for name, operator in kept.items():
            print(f"{name}: {operator.kept.num_bytes / 2**20:.0f} MiB beside these, on one rank")
        print("all-reduces: of a Lanczos step, besides those within the passes over the model")
    if parallel.world_size() == 1 and not host.has_gpu():
        _against_arpack(space)


def _gradient(chunks, space, all_passes) -> torch.Tensor:
    """The gradient of the summed sample losses: what a product is measured against."""
    gradient = torch.zeros(sum(s.parameter.numel() for s in space.shards), device=space.device)
    for shard, part in zip(space.shards, space.split(gradient), strict=True):
        shard.parameter.grad = part
    for micro_batches in all_passes:
        passes.run_pass(chunks, micro_batches, backward=True)
    for shard in space.shards:
        shard.parameter.grad = None
    space.add_partial_sums(gradient)
    return grid.sum_over_data(gradient)


def _all_reduces_per_step(operator) -> int:
    """Collective sums between the products of Lanczos, and after the passes of a product."""
    space, counts = operator.space, []
    with _counted(grid, "all_reduce") as count:
        leading_eigenpairs(SymmetricOperator(operator.matvec, space),
                           Target(2, tol=1e-3, max_matvecs=LANCZOS_STEPS + 1),
                           space.random_signs(0), on_step=lambda state: counts.append(count()))
    return max(np.diff(counts))


def _against_arpack(space: ParameterSpace) -> None:
    """Seconds a product beside the products, of Lanczos and of scipy's eigsh: one diagonal
    operator, of as many parameters, one start vector; of this process, so that other work on the
    machine does not count."""
    values = torch.arange(1, space.dimension + 1, dtype=torch.float64).rsqrt()
    start = space.random_signs(0)
    single = values.to(space.dtype)
    products = _Products(lambda v: single * v)
    taken = time.process_time()
    found = leading_eigenpairs(SymmetricOperator(products, space),
                               Target(NUM_EIGENPAIRS, LANCZOS_TOL, max_matvecs=1000), start)
    ours = (time.process_time() - taken - products.seconds) / products.count
    assert found.converged
    print(f"beside a product, {NUM_EIGENPAIRS} eigenpairs of {space.dimension / 1e6:.1f} M "
          f"parameters: {ours:.3f} s of Lanczos in fp32 ({products.count} products)")
    for dtype in (np.float64, np.float32):
        diagonal = values.numpy().astype(dtype)
        products = _Products(lambda v, diagonal=diagonal: diagonal * v)
        operator = scipy.sparse.linalg.LinearOperator(
            (space.dimension, space.dimension), matvec=products, dtype=dtype)
        taken = time.process_time()
        scipy.sparse.linalg.eigsh(operator, NUM_EIGENPAIRS, which="LA", tol=LANCZOS_TOL,
                                  v0=start.numpy().astype(dtype))
        arpack = (time.process_time() - taken - products.seconds) / products.count
        print(f"    {arpack:.3f} s of eigsh in {dtype.__name__} ({products.count} products); "
              f"ratio {ours / arpack:.2f}")


class _Products:
    """An operator that counts its products, and the seconds they took."""

    def __init__(self, matvec):
        self._matvec, self.count, self.seconds = matvec, 0, 0.0

    def __call__(self, vector):
        start = time.process_time()
        product = self._matvec(vector)
        self.seconds += time.process_time() - start
        self.count += 1
        return product


@contextlib.contextmanager
def _counted(owner, name: str):
    """Counts the calls of ``owner.name(tensor, group)`` that any other rank takes part in."""
    original, calls = getattr(owner, name), []

    def counting(tensor, group):
        if torch.distributed.get_world_size(group) > 1:
            calls.append(group)
        return original(tensor, group)

    setattr(owner, name, counting)
    try:
        yield lambda: len(calls)
    finally:
        setattr(owner, name, original)


if __name__ == "__main__":
    main()
