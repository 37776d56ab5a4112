"""Local search: exchange selected for unselected samples while the objective rises.

For J(s) = b.s + s.Q s / 2 (Q: scale times H) with gradient g = b + Q s, exchanging i for j changes
J by

    (c_j - c_i) + (f_j - f_i).Q (f_j - f_i) / 2,      c = F^T g

and two exchanges at once add d_1.Q d_2 to the sum of their gains. Only exchanges that keep the
budget and the quotas are made; two at once let one pay for the other.

A round lists the most promising samples of both sides, fetches their rows once, and searches among
them with the Gram matrix of Q alone: no product with all the rows until the next round.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_direct.selection.feasible import FeasibleSet
from megatron_direct.selection.linear import maximise
from megatron_direct.selection.problem import Problem

# Samples listed on each side per round. Measured: 32 loses quality, 256 gains next to none.
_LISTED = 64
# Exchanges that are tried two at a time.
_PAIRED = 48
# Gains below this share of |J| are left, and below that share of the largest term of one: they are
# of the size of rounding, and could be made for ever.
_LEAST_GAIN = 1e-9
_ROUNDING = 1e-13
# Rounds after which an ever-improving search is cut off; instances measured take 2 to 15.
_MAX_ROUNDS = 50


@dataclass(frozen=True, eq=False)
class Improved:
    """The selection [N] bool after local search, its value, the number of exchanges that were
    made, and whether none was left to make."""

    mask: np.ndarray
    value: float
    exchanges: int
    converged: bool


@dataclass(frozen=True, eq=False)
class _Slopes:
    """J at a selection, to first order: its value, the scores c [N], and the price mu of the
    budget in the linear programme of these scores."""

    value: float
    scores: np.ndarray
    price: float

    @property
    def least_gain(self) -> float:
        return _LEAST_GAIN * abs(self.value)


def improve(problem: Problem, mask: np.ndarray) -> Improved:
    """Exchanges from a selection [N] bool until none that is listed improves it."""
    rows, quadratic = problem.rows, problem.quadratic
    mask = mask.copy()
    total, price = 0, 0.0
    for _ in range(_MAX_ROUNDS):
        sums = rows.exact_sum(mask)
        scores = rows.scores(quadratic.gradient(sums)[None])[0]
        price = maximise(problem.feasible, scores, rows.ties(scores), price).price
        slopes = _Slopes(float(quadratic.value(sums)), scores, price)
        made = _exchange_listed(problem, mask, slopes)
        total += made
        if not made:
            return Improved(mask, slopes.value, total, True)
    return Improved(mask, float(quadratic.value(rows.exact_sum(mask))), total, False)


def _exchange_listed(problem: Problem, mask: np.ndarray, slopes: _Slopes) -> int:
    """One round: the best exchanges among the listed samples, made in ``mask``."""
    listed = _shortlist(problem, mask, slopes)
    exchanges = _Exchanges(problem, mask, listed, slopes)
    made = 0
    while moves := exchanges.best():
        for i, j in moves:
            exchanges.make(i, j)
            mask[listed[i]], mask[listed[j]] = False, True
            made += 1
    return made


def _shortlist(problem: Problem, mask: np.ndarray, slopes: _Slopes) -> np.ndarray:
    """Ascending ids: on each side the best by priced gain, and a quarter by gain alone."""
    net = slopes.scores - slopes.price * problem.feasible.costs
    listed = []
    for side, sign in ((np.flatnonzero(mask), -1.0), (np.flatnonzero(~mask), 1.0)):
        for value, count in ((net, 3 * _LISTED // 4), (slopes.scores, _LISTED // 4)):
            key = (sign * value + problem.self_terms)[side]
            if len(side) > count:
                listed.append(side[np.argpartition(-key, count)[:count]])
            else:
                listed.append(side)
    return np.unique(np.concatenate(listed))


class _Exchanges:
    """Exchanges among m listed samples, by their positions in the list; arrays [m, m] have the
    sample that leaves in the rows and the one that enters in the columns."""

    def __init__(self, problem: Problem, mask: np.ndarray, listed: np.ndarray, slopes: _Slopes):
        feasible = problem.feasible
        sketches = problem.rows.take(listed)
        self._gram = problem.quadratic.curve(sketches) @ sketches.T
        half = 0.5 * np.diag(self._gram)
        self._second_order = half[:, None] + half - self._gram
        self._linear = slopes.scores[listed]
        self._costs = feasible.costs[listed]
        self._spend = self._costs - self._costs[:, None]
        self._chosen = mask[listed]
        self._counts = _Counts(feasible, mask, listed)
        # The guard keeps sums of rounded differences within the budget.
        spent = feasible.cost(mask)
        self._slack = feasible.budget - spent - 1e-12 * spent
        largest = max(float(np.abs(self._linear).max(initial=0)),
                      float(np.abs(self._gram).max(initial=0)))
        self._price = slopes.price
        self._least_gain = max(slopes.least_gain, _ROUNDING * largest)

    def best(self) -> list[tuple[int, int]]:
        """The exchanges (leaving, entering) to make next: one, or two at once; none if none gains
        enough."""
        gain = self._second_order + self._linear
        gain -= self._linear[:, None]
        gain[~self._counts.allowed(self._chosen)] = -np.inf
        return self._best_single(gain) or self._best_double(gain)

    def make(self, i: int, j: int) -> None:
        self._chosen[i], self._chosen[j] = False, True
        self._linear += self._gram[j] - self._gram[i]
        self._slack -= self._costs[j] - self._costs[i]
        self._counts.exchange(i, j)

    def _best_single(self, gain: np.ndarray) -> list[tuple[int, int]]:
        fits = (self._spend <= self._slack) | (self._spend <= 0)
        flat = self._first_best(np.where(fits, gain, -np.inf))
        return [] if flat is None else [divmod(flat, len(gain))]

    def _best_double(self, gain: np.ndarray) -> list[tuple[int, int]]:
        """Two exchanges at once, of the most promising; at most one of them across groups."""
        best = np.flatnonzero(np.isfinite(gain))
        if best.size < 2:
            return []
        if best.size > _PAIRED:
            key = self._price * self._spend.ravel()[best] - gain.ravel()[best]
            best = best[np.sort(np.argpartition(key, _PAIRED)[:_PAIRED])]
        i, j = np.divmod(best, len(gain))
        gram = self._gram
        cross = gram[np.ix_(j, j)] - gram[np.ix_(j, i)] - gram[np.ix_(i, j)] + gram[np.ix_(i, i)]
        single, paid, local = gain[i, j], self._spend[i, j], self._counts.same[i, j]
        both = single[:, None] + single + cross
        fits = (
            (paid[:, None] + paid <= self._slack)
            & (i[:, None] != i)
            & (j[:, None] != j)
            & (local[:, None] | local)
        )
        flat = self._first_best(np.where(fits, both, -np.inf))
        if flat is None:
            return []
        return [(int(i[move]), int(j[move])) for move in divmod(flat, len(best))]

    def _first_best(self, gain: np.ndarray) -> int | None:
        """Position in the flattened array of the first gain within rounding of the best, so that
        ties go to the lower ids."""
        best = gain.max()
        if not best > self._least_gain:
            return None
        return int(np.argmax(gain.ravel() >= best - 1e-3 * self._least_gain))


class _Counts:
    """Counts per group during a search; without quotas all samples are of one group."""

    def __init__(self, feasible: FeasibleSet, mask: np.ndarray, listed: np.ndarray):
        if feasible.quotas is None:
            self._codes = np.zeros(len(listed), dtype=np.int64)
            self._bounds = np.array([[0, feasible.num_select]])
            self._counts = np.array([feasible.num_select])
        else:
            self._codes = feasible.quotas.codes[listed]
            self._bounds = feasible.quotas.bounds
            self._counts = feasible.quotas.counts(mask)
        self.same = self._codes[:, None] == self._codes

    def allowed(self, chosen: np.ndarray) -> np.ndarray:
        """[m, m] bool: exchanges of a chosen for an unchosen one within the quotas."""
        may_leave = (self._counts > self._bounds[:, 0])[self._codes]
        may_enter = (self._counts < self._bounds[:, 1])[self._codes]
        return chosen[:, None] & ~chosen & (self.same | (may_leave[:, None] & may_enter))

    def exchange(self, i: int, j: int) -> None:
        self._counts[self._codes[i]] -= 1
        self._counts[self._codes[j]] += 1
