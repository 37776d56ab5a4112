"""The feasible set of weights, and the best selection in it whatever it costs.

    W = { w : 0 <= w <= 1,  sum w = K,  a.w <= tau,  least_g <= sum of w over g <= greatest_g }

Its two exact subproblems are in linear.py and projection.py.

Ties within a tolerance, which may be each sample's own, go to the lower id, so that noise in the
scores does not decide.
"""

from __future__ import annotations

import math

import numpy as np

from megatron_direct.selection.infeasible import InfeasibleSelection
from megatron_direct.selection.quotas import Quotas

# Sums of float64 costs are trusted to this relative error; closer calls are summed exactly.
ROUNDING = 1e-12


class FeasibleSet:
    """W for costs [N], K, tau (infinity: no budget) and quotas; raises InfeasibleSelection."""

    def __init__(
        self, costs: np.ndarray, num_select: int, budget: float, quotas: Quotas | None = None
    ):
        self.costs = costs
        self.num_select = num_select
        self.budget = budget
        self.quotas = quotas
        self.cheapest = self.best(-costs)
        least = self.cost(self.cheapest)
        if least > budget:
            raise InfeasibleSelection(budget, num_select, least)

    def cost(self, mask: np.ndarray) -> float:
        """Correctly rounded cost of a selection [N] bool, so independent of the samples' order."""
        return math.fsum(self.costs[mask])

    def admits(self, mask: np.ndarray) -> bool:
        """Whether a selection [N] bool lies in W."""
        if mask.sum() != self.num_select or self.cost(mask) > self.budget:
            return False
        return self.quotas is None or self.quotas.admit(mask)

    def fits(self, mask: np.ndarray, cost: float) -> bool:
        """Whether a mask fits the budget, given its cost as summed by float64 arithmetic."""
        if math.isinf(self.budget):
            return True
        if abs(cost - self.budget) <= ROUNDING * self.budget:
            cost = self.cost(mask)
        return cost <= self.budget

    def best(self, scores: np.ndarray, tie: float | np.ndarray = 0.0) -> np.ndarray:
        """[N] bool: the K best of scores [N] under the quotas, the budget ignored.

        Scores within ``tie`` (one for all, or [N]) of the K-th best count as equal to it, and lower
        ids go first. With quotas the greedy rule is exact, since the counts form a matroid.
        """
        if self.quotas is None:
            return largest(scores, self.num_select, tie)[0]
        ties = np.broadcast_to(tie, scores.shape)
        chosen = np.zeros(len(scores), dtype=bool)
        open_scores = np.full(len(scores), -np.inf)
        bounds = self.quotas.bounds
        for members, (least, greatest) in zip(self.quotas.members, bounds, strict=True):
            group = scores[members]
            allowed, _ = largest(group, greatest, ties[members])
            # Of these, or ties at both ends could leave more than the greatest number of a group.
            forced, _ = largest(np.where(allowed, group, -np.inf), least, ties[members])
            chosen[members] = forced
            open_scores[members] = np.where(allowed & ~forced, group, -np.inf)
        free = self.num_select - int(bounds[:, 0].sum())
        return chosen | largest(open_scores, free, ties)[0]


def largest(scores: np.ndarray, count: int, tie: float | np.ndarray,
            ) -> tuple[np.ndarray, float]:
    """[n] bool: the ``count`` largest scores, near ties with the last of them going to lower ids;
    and the last of them (NaN for none or all)."""
    size = len(scores)
    if count in (0, size):
        return np.full(size, count == size), math.nan
    last = np.partition(scores, size - count)[size - count]
    chosen = scores >= last - tie
    if np.count_nonzero(chosen) > count:
        sure = scores > last + tie
        tied = np.flatnonzero(chosen & ~sure)
        chosen[tied[count - np.count_nonzero(sure):]] = False
    return chosen, float(last)
