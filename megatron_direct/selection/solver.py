"""The selection problem solved: climb or relax, round, exchange, and bound.

One path for rows on one rank and for rows spread over many: all ranks hold the same vectors over
samples and take the same steps; only products with the rows differ (see rows.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from megatron_direct.selection.ascent import ascend, smooth_path
from megatron_direct.selection.feasible import FeasibleSet
from megatron_direct.selection.objectives import Quadratic, make_objective
from megatron_direct.selection.problem import (
    Selection,
    bounded_quotas,
    checked_budget,
    checked_costs,
    checked_count,
    checked_quotas,
)
from megatron_direct.selection.relaxation import relax
from megatron_direct.selection.rows import Rows
from megatron_direct.selection.spectral import leading_directions
from megatron_direct.selection.swaps import improve, prefer_lower_ids

# Leading directions that are climbed from, both ways, beside the mean and the smooth path.
# Measured on random instances: 2 and 4 gain nothing over 1.
_LEADING = 1


def solve_selection(
    flat: np.ndarray,
    stiff_cost: np.ndarray,
    num_select: int,
    *,
    stiff_budget: float | None = None,
    objective: str = "flat-energy",
    seed: int = 0,
    target: np.ndarray | None = None,
    curvature: np.ndarray | None = None,
    step_size: float | None = None,
    groups: Sequence | np.ndarray | None = None,
    quotas: Mapping | None = None,
    sample_ids: np.ndarray | None = None,
    all_reduce_sum: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Selection:
    """Select K of N samples to maximise an objective within a stiff budget.

    flat          [k, N] column i is the flat part of sample i's sketch (the whole sketch for
                  "descent"). Best given as the transpose of row storage [N, k], in memory or
                  memory-mapped, float32 or float64; it is read in blocks and never copied whole
    stiff_cost    [N] a_i >= 0
    num_select    K, from 1 to N
    stiff_budget  tau >= 0, in the units of stiff_cost (see ``stiff_budget``); math.inf sets none,
                  None does so for "descent", whose curvature term does the budget's work
    objective     "flat-energy" |F w|^2; "alignment" target.F w; "descent" the decrease
                  eta target.u - eta^2 u.H u / 2 with u = F w / K (see objectives.py)
    seed          of the random vectors from which leading directions are found ("flat-energy")
    target        [k] mean validation gradient, in the coordinates of flat
    curvature     [k] eigenvalues of H, where the coordinates are its eigenbasis, or [k, k]
                  symmetric; negative eigenvalues count as zero
    step_size     eta > 0
    groups        [N] a label per sample, and
    quotas        label -> (least, greatest) number of samples to select; other labels are free

    With rows spread over ranks, each rank passes its own columns, costs, groups and
    ``sample_ids`` [n] (the ranks' ids together are 0..N-1), and ``all_reduce_sum``, which returns
    the sum of a float64 array over the ranks, the same on each. All else is the same on every
    rank, and so is the answer: the one that a single rank with all the rows would give.

    Raises InfeasibleSelection if no K samples fit the budget, and ValueError for bad input.
    """
    flat = np.asarray(flat)
    if flat.ndim != 2 or flat.shape[0] == 0 or not np.issubdtype(flat.dtype, np.floating):
        raise ValueError(
            f"flat must be a floating-point array [k, N], found {flat.dtype} of shape {flat.shape}"
        )
    stiff_cost = np.asarray(stiff_cost)
    if stiff_cost.shape != flat.shape[1:]:
        raise ValueError(
            f"stiff_cost must have one entry for each of flat's {flat.shape[1]} columns, found "
            f"shape {stiff_cost.shape}"
        )
    if stiff_budget is None and objective != "descent":
        raise ValueError(f"objective {objective!r} needs a stiff_budget; math.inf sets none")
    budget = checked_budget(stiff_budget)
    rows = Rows(flat, sample_ids, all_reduce_sum)
    # Values are checked once gathered, so that a bad one raises on every rank.
    costs = checked_costs(rows.gathered(stiff_cost))
    num_select = checked_count(num_select, len(costs))
    goal = make_objective(objective, rows.dim, num_select, target, curvature, step_size)
    codes = bounds = None
    quota = checked_quotas(groups, quotas, flat.shape[1])
    if quota is not None:
        codes = rows.gathered(quota[0]).astype(np.int64)
        bounds = bounded_quotas(codes, quota[1], num_select)
    feasible = FeasibleSet(costs, num_select, budget, codes, bounds)

    history: list[dict] = []
    self_terms = goal.self_terms(rows)
    if goal.convex:
        candidates, upper_bound = _climb(rows, feasible, goal, self_terms, seed, history)
        solved = True
    else:
        relaxed = relax(rows, feasible, goal, history)
        # The feasible selection that shares the most weight with the relaxation.
        candidates = [feasible.maximise(relaxed.weights, tie=1e-9).lower]
        upper_bound, solved = relaxed.upper_bound, relaxed.converged
    best, value, settled = _exchange(rows, feasible, goal, candidates, self_terms, history)
    best = prefer_lower_ids(rows, feasible, best)
    assert feasible.admits(best), "rounding and exchanges keep to the feasible set"
    indices = np.flatnonzero(best)
    rows.check_replicated(indices)
    status = "converged" if solved and settled else "iteration-limit"
    if upper_bound - value <= max(4 * rows.rounding, 1e-9) * abs(value):
        status = "optimal"
    return Selection(
        indices=indices,
        objective=value,
        stiff_cost=feasible.cost(best),
        stiff_budget=None if math.isinf(budget) else budget,
        status=status,
        upper_bound=upper_bound,
        history=history,
    )


def _climb(
    rows: Rows,
    feasible: FeasibleSet,
    objective: Quadratic,
    self_terms: np.ndarray,
    seed: int,
    history: list[dict],
) -> tuple[list[np.ndarray], float]:
    """Selections [N] bool of flat energy, best first, and a bound on any feasible energy.

    With m the direction of the mean and P the projection away from it, |F w|^2 is
    (m.F w)^2 + |P F w|^2. The first term is bounded by two linear programmes; the second by
    lambda(P F F^T P) |w|^2, and |w|^2 <= sum w = K. Another bound, (max sum_i w_i |f_i|)^2, is
    the better one when few directions matter.
    """
    total = rows.sums(np.ones((1, rows.num_samples)))[0]
    mean = total / (np.linalg.norm(total) or 1.0)
    leading, moment = leading_directions(rows, mean, np.random.default_rng(seed))
    directions = np.concatenate([mean[None], leading[:_LEADING]])
    starts = np.concatenate(
        [directions, -directions, smooth_path(rows, feasible, objective, total)[None]]
    )
    candidates, support = ascend(rows, feasible, objective, starts, history)
    along_mean = max(support[0], support[len(directions)], 0.0)
    moment = min(moment, float(self_terms.sum()))
    spectral = along_mean**2 + feasible.num_select * moment
    lengths = feasible.maximise(np.sqrt(self_terms)).value ** 2
    return candidates, min(spectral, lengths) * (1 + rows.rounding)


def _exchange(
    rows: Rows,
    feasible: FeasibleSet,
    objective: Quadratic,
    candidates: list[np.ndarray],
    self_terms: np.ndarray,
    history: list[dict],
) -> tuple[np.ndarray, float, bool]:
    """The best selection [N] bool after local search from each, its value, and convergence."""
    best, best_value, settled = candidates[0], -math.inf, False
    for candidate in candidates:
        mask, value, made, done = improve(rows, feasible, objective, candidate, self_terms)
        history.append({"stage": "exchanges", "made": made, "objective": value})
        if value > best_value:
            best, best_value, settled = mask, value, done
    return best, best_value, settled
