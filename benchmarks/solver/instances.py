"""Random instances of the selection problem that are hard in the ways real pools are.

Columns: correlated (a decaying spectrum and a common mean), clustered, near and exact duplicates.
Costs: heavy-tailed, rounded to ties, partly zero, growing with the squared norm of the column as
stiff costs do. The budget runs from what the cheapest cost to what the average cost.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_direct.selection import stiff_budget

COLUMNS = ("correlated", "clustered", "duplicates")
COSTS = ("pareto", "lognormal", "ties", "zeros", "norms")


@dataclass(frozen=True)
class Instance:
    """flat [k, N] float64, costs [N], K and tau; ``kind`` names columns, costs, N, K and rho."""

    flat: np.ndarray
    costs: np.ndarray
    num_select: int
    budget: float
    kind: str


def draw(seed: int, least: int = 100, greatest: int = 5000) -> Instance:
    """The instance of this seed, with ``least`` to ``greatest`` samples (log-uniform)."""
    rng = np.random.default_rng(seed)
    num = int(np.exp(rng.uniform(np.log(least), np.log(greatest))))
    dim = int(rng.integers(4, 129))
    columns, costs = rng.choice(COLUMNS), rng.choice(COSTS)
    rows = _rows(rng, columns, num, dim)
    cost = _costs(rng, costs, rows)
    num_select = max(1, int(num * rng.uniform(0.02, 0.5)))
    fraction = float(rng.choice([0.02, 0.1, 0.3, 0.6, 1.0]))
    kind = f"{columns}/{costs} N={num} k={dim} K={num_select} rho={fraction}"
    return Instance(rows.T, cost, num_select, stiff_budget(cost, num_select, fraction), kind)


def _rows(rng: np.random.Generator, kind: str, num: int, dim: int) -> np.ndarray:
    decay = np.arange(1, dim + 1) ** -rng.uniform(0.0, 1.5)
    if kind == "clustered":
        centres = rng.standard_normal((int(rng.integers(3, 13)), dim)) * decay
        rows = centres[rng.integers(len(centres), size=num)]
        return rows + rng.uniform(0.1, 1.0) * rng.standard_normal((num, dim)) * decay
    rows = rng.standard_normal((num, dim)) * decay
    rows += rng.choice([0.0, 0.3]) * rng.standard_normal(dim) * decay
    rows *= np.exp(rng.choice([0.0, 0.7]) * rng.standard_normal((num, 1)))
    if kind == "duplicates":
        rows = rows[rng.integers(max(2, num // 4), size=num)]
    return rows


def _costs(rng: np.random.Generator, kind: str, rows: np.ndarray) -> np.ndarray:
    num = len(rows)
    if kind == "pareto":
        return rng.pareto(1.2, num)
    if kind == "lognormal":
        return rng.lognormal(0.0, 2.0, num)
    if kind == "ties":
        return np.round(rng.lognormal(0.5, 1.0, num))
    if kind == "zeros":
        return np.where(rng.random(num) < 0.3, 0.0, rng.pareto(1.5, num))
    return np.einsum("ij,ij->i", rows, rows) * rng.chisquare(2, num)
