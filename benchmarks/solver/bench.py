"""Quality and cost of solve_selection: ``OMP_NUM_THREADS=1 python benchmarks/solver/bench.py``.

    quality     200 random instances against the textbook method (about 20 minutes)
    speed       N = 1000, k = 256 against the textbook method
    scale       N = 25,000 to 200,000, k = 1024, in passes over the matrix, and peak memory
    curvature   descent with 64 eigenpairs at k = 2048: factored against the matrix they make
    clusters    sums of 20,000 rows of k = 2048 by cluster against numpy.add.at

One part alone: ``python benchmarks/solver/bench.py scale``. Both sides of every ratio run in this
process, one after the other, and are timed in processor seconds, which other load disturbs least.
"""

from __future__ import annotations

import sys
import time
import tracemalloc
from collections.abc import Callable

import numpy as np
from instances import draw
from textbook import textbook_selection

from megatron_direct.selection import LowRank, solve_selection, stiff_budget
from megatron_direct.selection.shrinkage import Partition


def seconds(work: Callable[[], object], repeats: int) -> float:
    """The least processor time of several runs."""
    best = np.inf
    for _ in range(repeats):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return best


def quality(count: int = 200) -> None:
    ratios, bounds, over, miscounted = [], [], 0, 0
    for seed in range(count):
        case = draw(seed)
        found = solve_selection(
            case.flat, case.costs, case.num_select, stiff_budget=case.budget
        )
        over += found.stiff_cost > case.budget
        miscounted += len(set(found.indices.tolist())) != case.num_select
        _, value = textbook_selection(case.flat, case.costs, case.num_select, case.budget)
        ratios.append(found.objective / value)
        bounds.append(found.objective / found.upper_bound)
        if (seed + 1) % 20 == 0:
            low, middle, high = np.quantile(ratios, [0, 0.5, 1])
            print(
                f"quality {seed + 1} instances: over budget {over}, wrong count {miscounted}, "
                f"objective / textbook's: least {low:.4f} median {middle:.4f} most {high:.4f}, "
                f"objective / upper bound: median {np.median(bounds):.2f}", flush=True,
            )


def speed() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((1000, 256)) + 0.3 * rng.standard_normal(256)
    rows = rows.astype(np.float32)
    costs = rng.pareto(1.5, 1000)
    dense = np.ascontiguousarray(rows.T, dtype=np.float64)
    for fraction in (0.05, 0.3, 1.0):
        budget = stiff_budget(costs, 100, fraction)
        ours = seconds(lambda b=budget: solve_selection(rows.T, costs, 100, stiff_budget=b), 20)
        theirs = seconds(lambda b=budget: textbook_selection(dense, costs, 100, b), 1)
        print(
            f"speed rho={fraction}: textbook {theirs:.2f} s, ours {1e3 * ours:.1f} ms, "
            f"ratio {theirs / ours:.0f}", flush=True,
        )


def scale() -> None:
    dim = 1024
    rng = np.random.default_rng(0)
    mean = 0.03 * rng.standard_normal(dim, dtype=np.float32)
    spectrum = (np.arange(1, dim + 1) ** -0.5).astype(np.float32)
    for num in (25_000, 50_000, 100_000, 200_000):
        rows = np.empty((num, dim), dtype=np.float32)
        for start in range(0, num, 4096):
            part = rows[start : start + 4096]
            part[:] = rng.standard_normal(part.shape, dtype=np.float32) * spectrum + mean
        costs = rng.pareto(1.5, num)
        budget = stiff_budget(costs, num // 10, 0.3)
        weights = rng.random(num, dtype=np.float32)
        one_pass = seconds(lambda r=rows, w=weights: (r @ mean, w @ r), 5)
        start = time.process_time()
        found = solve_selection(rows.T, costs, num // 10, stiff_budget=budget)
        taken = time.process_time() - start
        tracemalloc.start()
        solve_selection(rows.T, costs, num // 10, stiff_budget=budget)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        print(
            f"scale N={num}: {taken:.2f} s, {taken / one_pass:.0f} passes of {one_pass:.3f} s, "
            f"peak memory beyond the matrix {peak / rows.nbytes:.3f} of it, {found.status}",
            flush=True,
        )
        del rows


def curvature() -> None:
    num, dim, rank = 2000, 2048, 64
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((num, dim), dtype=np.float32)
    factored = LowRank(1 / np.arange(1.0, rank + 1), rng.standard_normal((rank, dim)) / dim**0.5)
    options = {"objective": "descent", "target": rng.standard_normal(dim), "step_size": 1.0}

    def solve(hessian: np.ndarray | LowRank) -> np.ndarray:
        found = solve_selection(rows.T, np.ones(num), num // 4, curvature=hessian, **options)
        return found.indices

    directions = factored.directions
    matrix = (directions.T * factored.eigenvalues) @ directions
    same = np.array_equal(solve(factored), solve(matrix))
    fast, slow = seconds(lambda: solve(factored), 5), seconds(lambda: solve(matrix), 3)
    print(
        f"curvature N={num}: factored {fast:.3f} s, as a matrix {slow:.3f} s, "
        f"ratio {slow / fast:.0f}, same selection: {same}", flush=True,
    )


def clusters() -> None:
    num, dim = 20_000, 2048
    rng = np.random.default_rng(0)
    rows, weights = rng.standard_normal((num, dim), dtype=np.float32), np.ones(num)
    for count in (8, 64):
        partition = Partition(rng.integers(0, count, num), count)
        sums = np.zeros((count, dim))
        slow = seconds(lambda s=sums, p=partition: np.add.at(s, p.numbers, rows), 3)
        fast = seconds(lambda p=partition: p.sums(rows, weights), 3)
        print(
            f"clusters {count}: numpy.add.at {slow:.2f} s, one-hot products {fast:.3f} s, "
            f"ratio {slow / fast:.0f}", flush=True,
        )


if __name__ == "__main__":
    parts = {"speed": speed, "scale": scale, "curvature": curvature, "clusters": clusters,
             "quality": quality}
    for name in sys.argv[1:] or parts:
        parts[name]()
