"""The linear programme over the feasible set: max c.w over W.

Price the budget by mu >= 0: for a fixed mu the K best of c - mu a solve what is left. The dual
value L(mu) = max_w (c - mu a).w + mu tau is convex and piecewise linear; each solution met is a
line below it, and the crossing of the line with cost > tau and the line with cost <= tau is the
next mu, until no solution lies above the crossing (Handler and Zang, 1980, for constrained paths).
The optimum mixes the last two, which differ by one exchange: at most two weights are fractional.
Each step is O(N).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_direct.selection.feasible import ROUNDING, FeasibleSet, largest
from megatron_direct.selection.quotas import Quotas

# A hint is tried this factor below and above: prices move less between late iterations.
_HINT_SPREAD = 1.1
# Open samples below which sorting them out costs more than it saves.
_WORTH_SETTLING = 2000


@dataclass(frozen=True, eq=False)
class Vertex:
    """The optimum of the linear programme max c.w over W: w = (1 - theta) lower + theta upper.

    ``lower`` [N] bool is feasible, and is the rounded optimum; ``upper`` [N] bool is it with one
    exchange undone; ``theta`` lies in [0, 1]. ``price`` is mu.
    """

    feasible: FeasibleSet
    scores: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    theta: float
    price: float

    @cached_property
    def value(self) -> float:
        """The optimum c.w, or, where ties were not decided by their scores, what no weights exceed:
        L(mu), with all ties broken by scores. Most vertices are not asked for it.

        Written as what a selection that fits scores, and what the best at this price has beyond it:
        at a budget that is small beside the best one's cost, its priced score is lost in rounding.
        """
        feasible, mask, price = self.feasible, self.lower, self.price
        priced = self.scores - price * feasible.costs
        best = feasible.best(priced)
        gain = float(priced[best & ~mask].sum() - priced[mask & ~best].sum())
        unspent = feasible.budget - float(feasible.costs[mask].sum()) if price else 0.0
        return float(self.scores[mask].sum()) + price * max(unspent, 0.0) + max(gain, 0.0)

    def weights(self) -> np.ndarray:
        """[N] the optimum itself."""
        return (1.0 - self.theta) * self.lower + self.theta * self.upper


def maximise(
    feasible: FeasibleSet, scores: np.ndarray, tie: float | np.ndarray = 0.0, hint: float = 0.0
) -> Vertex:
    """Solve max c.w over W for scores c [N]; ``tie`` as FeasibleSet.best has it.

    ``hint``: a price near the answer's, if one is known; it saves time and changes nothing.
    """
    samples = _OpenSamples(feasible, scores, tie)
    low, high = hint / _HINT_SPREAD, math.inf
    upper = samples.best_at(low)
    if low > 0 and feasible.fits(upper.mask, upper.cost):
        low = 0.0
        upper = samples.best_at(low)
    if low == 0 and feasible.fits(upper.mask, upper.cost):
        return Vertex(feasible, scores, upper.mask, upper.mask, 0.0, 0.0)
    guess = low * _HINT_SPREAD**2
    lower = _Priced.of(feasible, scores, feasible.cheapest)
    while True:
        if upper.cost <= lower.cost:  # but for rounding, which is all that lies between the two
            price = low
            break
        crossing = max(low, (upper.value - lower.value) / (upper.cost - lower.cost))
        price = guess or crossing
        trial = samples.best_at(price)
        line = upper.value - price * upper.cost
        slack = ROUNDING * (abs(upper.value) + price * upper.cost)
        if price == crossing and trial.value - price * trial.cost <= line + slack:
            break
        if feasible.fits(trial.mask, trial.cost):
            lower, high = trial, price
        else:
            upper, low = trial, price
        if high < math.inf:
            samples.settle((low, upper.mark), (high, lower.mark))
        guess = 0.0
    after, before, theta = _adjacent(feasible, lower.mask, upper.mask)
    return Vertex(feasible, scores, after, before, theta, price)


@dataclass(frozen=True, eq=False)
class _Priced:
    """The best selection at some price: its mask [N], score and cost, and the last priced score
    that was let in (NaN if not known)."""

    mask: np.ndarray
    value: float
    cost: float
    mark: float

    @classmethod
    def of(cls, feasible: FeasibleSet, scores: np.ndarray, mask: np.ndarray) -> _Priced:
        return cls(mask, float(scores[mask].sum()), float(feasible.costs[mask].sum()), math.nan)


class _OpenSamples:
    """The samples that a search for the price has not settled yet.

    The K-th best priced score falls as the price rises, and so does each sample's own. So between
    two prices a sample is settled if its score at the high price beats the K-th best at the low
    one, or its score at the low price does not reach the K-th best at the high one: after a few
    trials few samples are open. (Not so with quotas, where all stay open.)
    """

    def __init__(self, feasible: FeasibleSet, scores: np.ndarray, tie: float | np.ndarray):
        self._feasible, self._tie = feasible, np.broadcast_to(tie, scores.shape)
        self._ids, self._scores, self._costs = np.arange(len(scores)), scores, feasible.costs
        # Settled as selected: which, what they score and cost, and how many are still to select.
        self._settled = np.zeros(len(scores), dtype=bool)
        self._value, self._cost, self._count = 0.0, 0.0, feasible.num_select

    def best_at(self, price: float) -> _Priced:
        """The K best of scores less price times costs."""
        priced = self._scores - price * self._costs
        if self._feasible.quotas is None:
            picked, mark = largest(priced, self._count, self._tie)
        else:
            picked, mark = self._feasible.best(priced, self._tie), math.nan
        picked = picked.nonzero()[0]
        mask = self._settled.copy()
        mask[self._ids[picked]] = True
        return _Priced(mask, self._value + float(self._scores[picked].sum()),
                       self._cost + float(self._costs[picked].sum()), mark)

    def settle(self, at_low: tuple[float, float], at_high: tuple[float, float]) -> None:
        """``at_low``, ``at_high``: two prices that bracket the answer, each with the mark there."""
        if self._feasible.quotas is not None or len(self._ids) <= _WORTH_SETTLING:
            return
        (low, mark_low), (high, mark_high) = at_low, at_high
        inside = self._scores - high * self._costs > mark_low + 2 * self._tie
        outside = self._scores - low * self._costs < mark_high - 2 * self._tie
        self._settled[self._ids[inside]] = True
        self._value += float(self._scores[inside].sum())
        self._cost += float(self._costs[inside].sum())
        self._count -= int(np.count_nonzero(inside))
        still = (~(inside | outside)).nonzero()[0]
        self._ids = self._ids[still]
        self._scores, self._costs = self._scores[still], self._costs[still]
        self._tie = self._tie[still]


def _adjacent(
    feasible: FeasibleSet, lower: np.ndarray, upper: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """Walk from upper to lower by single exchanges, to the first selection that fits.

    Returns it, the one before it, and the share theta of the latter in the mixture of the two that
    costs tau. Both ends are optimal at one price, so every step is. With quotas, pairs of one group
    go first: the counts of the groups then stay between those of the two ends.
    """
    costs, budget = feasible.costs, feasible.budget
    leaving, entering = (upper & ~lower).nonzero()[0], (lower & ~upper).nonzero()[0]
    leaving = leaving[np.lexsort((leaving, -costs[leaving]))]
    entering = entering[np.lexsort((entering, costs[entering]))]
    if feasible.quotas is not None:
        leaving, entering = _paired_by_group(feasible.quotas, leaving, entering)
    # Summed from the end that fits: from the other, what dear samples cost would leave rounding of
    # their size in costs near the budget.
    savings = costs[leaving] - costs[entering]
    path = float(costs[lower].sum()) + np.append(np.cumsum(savings[:0:-1])[::-1], 0.0)
    for done in np.flatnonzero(path <= budget * (1 + ROUNDING)).tolist():
        after = upper.copy()
        after[leaving[: done + 1]], after[entering[: done + 1]] = False, True
        if feasible.cost(after) <= budget:
            break
    else:
        after, done = lower.copy(), len(path) - 1
    before = after.copy()
    before[leaving[done]], before[entering[done]] = True, False
    over = path[done - 1] if done else path[0] + savings[0]
    theta = (budget - path[done]) / (over - path[done]) if over > path[done] else 0.0
    return after, before, min(1.0, max(0.0, theta))


def _paired_by_group(
    quotas: Quotas, leaving: np.ndarray, entering: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The same ids, those that can be paired within a group first, and pair by pair."""
    pairs: tuple[list, list, list, list] = ([], [], [], [])
    for code in range(len(quotas.bounds)):
        out = leaving[quotas.codes[leaving] == code]
        into = entering[quotas.codes[entering] == code]
        both = min(len(out), len(into))
        for part, values in zip(
            pairs, (out[:both], into[:both], out[both:], into[both:]), strict=True
        ):
            part.append(values)
    out, into, rest_out, rest_into = map(np.concatenate, pairs)
    return np.concatenate([out, rest_out]), np.concatenate([into, rest_into])
