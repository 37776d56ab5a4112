"""Random feasible sets, and the linear programme over one as scipy solves it."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linprog

from megatron_direct.selection import InfeasibleSelection, stiff_budget
from megatron_direct.selection.feasible import FeasibleSet
from megatron_direct.selection.quotas import Quotas


def draw(seed: int) -> tuple[np.random.Generator, FeasibleSet]:
    """A feasible set of 3 to 30 samples; every second seed has quotas, every third tied costs."""
    rng = np.random.default_rng(seed)
    num = int(rng.integers(3, 31))
    num_select = int(rng.integers(1, num))
    costs = rng.pareto(1.0, num)
    if seed % 3 == 0:
        costs = np.round(costs)
    budget = stiff_budget(costs, num_select, float(rng.choice([0.0, 0.3, 1.0])))
    quotas = None
    if seed % 2:
        codes = rng.integers(0, 3, num)
        sizes = np.bincount(codes, minlength=3)
        counts = np.bincount(codes[rng.permutation(num)[:num_select]], minlength=3)
        quotas = Quotas(codes, np.stack([
            np.maximum(counts - rng.integers(0, 2, 3), 0),
            np.minimum(counts + rng.integers(0, 2, 3), sizes),
        ], axis=1))
    try:
        return rng, FeasibleSet(costs, num_select, budget, quotas)
    except InfeasibleSelection as error:
        budget = 1.2 * error.min_stiff_budget
        return rng, FeasibleSet(costs, num_select, budget, quotas)


def linear_optimum(feasible: FeasibleSet, scores: np.ndarray) -> float:
    upper, limits = [feasible.costs], [feasible.budget]
    if feasible.quotas is not None:
        for code, (least, greatest) in enumerate(feasible.quotas.bounds):
            member = (feasible.quotas.codes == code).astype(float)
            upper += [member, -member]
            limits += [greatest, -least]
    solved = linprog(
        -scores, A_ub=np.array(upper), b_ub=limits, A_eq=np.ones((1, len(scores))),
        b_eq=[feasible.num_select], bounds=(0, 1),
    )
    assert solved.success
    return -solved.fun
