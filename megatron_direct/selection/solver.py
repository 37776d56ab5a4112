"""The selection problem solved: climb or relax, round, exchange, and bound.

One path for rows on one rank and for rows spread over many: one rank, the leader, takes the steps,
and the others serve it with products of their rows (see rows.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from megatron_direct.selection.ascent import ascend, smooth_path
from megatron_direct.selection.checks import (
    checked_budget,
    checked_costs,
    checked_count,
    checked_flat,
    checked_max_count,
)
from megatron_direct.selection.copies import prefer_lower_ids
from megatron_direct.selection.feasible import FeasibleSet
from megatron_direct.selection.linear import maximise
from megatron_direct.selection.objectives import Terms, find_objective, make_objective
from megatron_direct.selection.objectives.quadratic import LowRank
from megatron_direct.selection.problem import Problem, Selection
from megatron_direct.selection.quotas import state_quotas
from megatron_direct.selection.relaxation import relax
from megatron_direct.selection.rows import LocalRows, RepeatedRows, Rows, serve
from megatron_direct.selection.share import AllReduceSum, Share
from megatron_direct.selection.spectral import dominant_directions
from megatron_direct.selection.swaps import Improved, improve

# Dominant directions that are climbed from, both ways, beside the mean and the smooth path.
# Measured on random instances: 2 and 4 gain nothing over 1.
_DOMINANT = 1


def solve_selection(
    flat: np.ndarray,
    stiff_cost: np.ndarray,
    num_select: int,
    *,
    stiff_budget: float | None = None,
    objective: str = "flat-energy",
    seed: int = 0,
    target: np.ndarray | None = None,
    curvature: np.ndarray | LowRank | None = None,
    step_size: float | None = None,
    groups: Sequence | np.ndarray | None = None,
    quotas: Mapping | None = None,
    max_count: int = 1,
    sample_ids: np.ndarray | None = None,
    all_reduce_sum: AllReduceSum | None = None,
) -> Selection:
    """Select K of N samples to maximise an objective within a stiff budget.

    flat          [k, N] column i is the flat part of sample i's sketch (the whole sketch for
                  "descent"). Best given as the transpose of row storage [N, k], in memory or
                  memory-mapped, float32 or float64; it is read in blocks and never copied whole
    stiff_cost    [N] a_i >= 0
    num_select    K, from 1 to N times max_count
    stiff_budget  tau >= 0, in the units of stiff_cost (see ``stiff_budget``); math.inf sets none,
                  None does so for "descent", whose curvature term does the budget's work
    objective     "flat-energy" |F w|^2; "alignment" target.F w; "descent" the decrease
                  eta target.u - eta^2 u.H u / 2 with u = F w / K (see objectives/)
    seed          of the random vectors from which dominant directions are found ("flat-energy")
    target        [k] mean validation gradient, in the coordinates of flat
    curvature     [k] eigenvalues of H, where the coordinates are its eigenbasis; [k, k] symmetric;
                  or LowRank(eigenvalues [p], directions [p, k]), whose products cost least where
                  few eigenpairs are known. Negative eigenvalues count as zero
    step_size     eta > 0
    groups        [N] a label per sample, and
    quotas        label -> (least, greatest) number of samples to select; other labels are free
    max_count     how often one sample may be selected. K, the cost and the quotas count every time

    With rows spread over ranks, each rank passes its own columns, costs, groups and
    ``sample_ids`` [n] (the ranks' ids together are 0..N-1), and ``all_reduce_sum``, which returns
    the sum of a float64 array over the ranks, the same on each. All else is the same on every
    rank, and so is the answer: the one that a single rank with all the rows would give.

    Raises InfeasibleSelection if no K samples fit the budget, InfeasibleQuotas if none keep the
    quotas, and ValueError for other bad input.
    """
    flat = checked_flat(flat)
    stiff_cost = np.asarray(stiff_cost)
    if stiff_cost.shape != flat.shape[1:]:
        raise ValueError(
            f"stiff_cost must have one entry for each of flat's {flat.shape[1]} columns, found "
            f"shape {stiff_cost.shape}; flat is [k, N], the transpose of the rows"
        )
    if stiff_budget is None and find_objective(objective).needs_budget:
        raise ValueError(
            f"objective {objective!r} needs a stiff_budget; math.inf sets none, and "
            "stiff_budget(stiff_cost, num_select, fraction) computes one"
        )
    budget = checked_budget(stiff_budget)
    share = Share.of_rank(flat.shape[1], sample_ids, all_reduce_sum)
    copies = checked_max_count(max_count)
    local = LocalRows(flat)
    costs, stated = share.gathered(stiff_cost), state_quotas(groups, quotas, share)

    def lead() -> Selection:
        assert costs is not None
        checked = np.tile(checked_costs(costs), copies)
        count = checked_count(num_select, len(checked))
        quadratic = make_objective(
            objective, Terms(target, curvature, step_size), len(flat), count
        )
        feasible = FeasibleSet(
            checked, count, budget, None if stated is None else stated.of_selections(count, copies)
        )
        rows = Rows(local, share) if copies == 1 else RepeatedRows(local, share, copies)
        found = _solve(Problem(rows, feasible, quadratic, quadratic.self_terms(rows)), seed)
        return dataclasses.replace(found, indices=np.sort(found.indices % share.num_samples))

    if not share.leads:
        serve(local, share)
        return share.told(None)
    outcome = _outcome(lead)
    Rows(local, share).release()
    return share.told(outcome)


def _outcome(work: Callable[[], Selection]) -> Selection | Exception:
    """What it returns, or raises."""
    try:
        return work()
    except Exception as error:
        return error


def _solve(problem: Problem, seed: int) -> Selection:
    rows, feasible = problem.rows, problem.feasible
    history: list[dict] = []
    if problem.quadratic.convex:
        candidates, upper_bound = _climb(problem, seed, history)
        solved = True
    else:
        relaxed = relax(problem, history)
        # The feasible selection that shares the most weight with the relaxation.
        candidates = [maximise(feasible, relaxed.weights, tie=1e-9).lower]
        upper_bound, solved = relaxed.upper_bound, relaxed.converged
    found = _best_improved(problem, candidates, history)
    selected = prefer_lower_ids(problem, found.mask)
    assert feasible.admits(selected), "rounding and exchanges keep to the feasible set"
    indices = np.flatnonzero(selected)
    status = "converged" if solved and found.converged else "iteration-limit"
    if upper_bound - found.value <= max(4 * rows.rounding, 1e-9) * abs(found.value):
        status = "optimal"
    return Selection(
        indices=indices,
        objective=found.value,
        stiff_cost=feasible.cost(selected),
        stiff_budget=None if math.isinf(feasible.budget) else feasible.budget,
        status=status,
        upper_bound=upper_bound,
        history=history,
    )


def _climb(
    problem: Problem, seed: int, history: list[dict]
) -> tuple[list[np.ndarray], float]:
    """Selections [N] bool of flat energy, best first, and a bound on any feasible energy.

    With m the direction of the mean and P the projection away from it, |F w|^2 is
    (m.F w)^2 + |P F w|^2. The first term is bounded by two linear programmes; the second by
    lambda(P F F^T P) |w|^2, and |w|^2 <= sum w = K. Another bound, (max sum_i w_i |f_i|)^2, is
    the better one when few directions matter.
    """
    rows, feasible = problem.rows, problem.feasible
    total = rows.sums(np.ones((1, rows.num_samples)))[0]
    mean = total / (np.linalg.norm(total) or 1.0)
    dominant, moment = dominant_directions(rows, mean, np.random.default_rng(seed))
    directions = np.concatenate([mean[None], dominant[:_DOMINANT]])
    starts = np.concatenate([directions, -directions, smooth_path(problem, total)[None]])
    candidates, support = ascend(problem, starts, history)
    along_mean = max(support[0], support[len(directions)], 0.0)
    moment = min(moment, float(problem.self_terms.sum()))
    spectral = along_mean**2 + feasible.num_select * moment
    lengths = maximise(feasible, np.sqrt(problem.self_terms)).value ** 2
    return candidates, min(spectral, lengths) * (1 + rows.rounding)


def _best_improved(
    problem: Problem, candidates: list[np.ndarray], history: list[dict]
) -> Improved:
    """The best selection after local search from each of the candidates [N] bool."""
    results = []
    for candidate in candidates:
        result = improve(problem, candidate)
        history.append({
            "stage": "exchanges", "made": result.exchanges, "objective": result.value
        })
        results.append(result)
    return max(results, key=lambda result: result.value)
