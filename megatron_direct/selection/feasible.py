"""The feasible set and its two exact subproblems: the linear programme and the projection.

    W = { w : 0 <= w <= 1,  sum w = K,  a.w <= tau,  least_g <= sum of w over g <= greatest_g }

**Linear.** max c.w over W. Price the budget by mu >= 0: for a fixed mu the K best of c - mu a
solve what is left (with quotas the greedy rule does: the counts form a matroid). The dual value
L(mu) = max_w (c - mu a).w + mu tau is convex and piecewise linear; each solution met is a line
below it, and the crossing of the line with cost > tau and the line with cost <= tau is the next
mu, until no solution lies above the crossing (Handler and Zang, 1980, for constrained paths).
The optimum mixes the last two, which differ by one exchange: at most two weights are fractional.

**Projection.** min |w - y|^2 over W. With multipliers mu and nu, w = clip(y - mu a - nu, 0, 1);
the sum is piecewise linear in nu for a fixed mu, and the cost is piecewise linear in mu with nu
eliminated. Newton's step is exact once it starts on the right piece; a bracket sees to the rest.
Each step is O(N).

Ties within a tolerance go to the lower id, so noise in the scores does not decide.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from megatron_direct.selection.problem import InfeasibleSelection

# Sums of float64 costs are trusted to this relative error; closer calls are summed exactly.
_ROUNDING = 1e-12
# A hint is tried this factor below and above: prices move less between late iterations.
_HINT_SPREAD = 1.1
# Open samples below which sorting them out costs more than it saves.
_WORTH_SETTLING = 2000
# Steps after which a search for a multiplier stops: 5 to 15 are usual, and this many halvings
# exhaust float64.
_MAX_STEPS = 200


@dataclass(frozen=True)
class Vertex:
    """The optimum of a linear programme over W: w = (1 - theta) lower + theta upper.

    ``lower`` [N] bool is feasible, and is the rounded optimum; ``upper`` [N] bool is it with one
    exchange undone; ``theta`` lies in [0, 1]. ``value`` is the optimum c.w; ``price`` is mu.
    """

    lower: np.ndarray
    upper: np.ndarray
    theta: float
    value: float
    price: float

    def weights(self) -> np.ndarray:
        """[N] the optimum itself."""
        return (1.0 - self.theta) * self.lower + self.theta * self.upper


class FeasibleSet:
    """W for costs [N], K, tau (infinity: no budget) and quotas; raises InfeasibleSelection.

    ``codes`` [N] group of each sample in 0..G-1 and ``bounds`` [G, 2] (least, greatest) counts.
    """

    def __init__(
        self,
        costs: np.ndarray,
        num_select: int,
        budget: float,
        codes: np.ndarray | None = None,
        bounds: np.ndarray | None = None,
    ):
        self.costs = costs
        self.num_select = num_select
        self.budget = budget
        self.codes = codes
        self.bounds = bounds
        self._members = [] if codes is None else [
            np.flatnonzero(codes == code) for code in range(len(bounds))
        ]
        self._cost_scale = float(costs.max()) or 1.0
        self._cheapest = self.best(-costs)
        least = self.cost(self._cheapest)
        if least > budget:
            raise InfeasibleSelection(budget, num_select, least)

    def cost(self, mask: np.ndarray) -> float:
        """Correctly rounded cost of a selection [N] bool, so independent of the samples' order."""
        return math.fsum(self.costs[mask])

    def admits(self, mask: np.ndarray) -> bool:
        """Whether a selection [N] bool lies in W."""
        if mask.sum() != self.num_select or self.cost(mask) > self.budget:
            return False
        if self.codes is None:
            return True
        counts = np.bincount(self.codes[mask], minlength=len(self.bounds))
        return bool(np.all((self.bounds[:, 0] <= counts) & (counts <= self.bounds[:, 1])))

    def best(self, scores: np.ndarray, tie: float = 0.0) -> np.ndarray:
        """[N] bool: the K best of scores [N] under the quotas, the budget ignored.

        Scores within ``tie`` of the K-th best count as equal to it, and lower ids go first.
        """
        if self.codes is None:
            return _top(scores, self.num_select, tie)[0]
        chosen = np.zeros(len(scores), dtype=bool)
        open_scores = np.full(len(scores), -np.inf)
        for members, (least, greatest) in zip(self._members, self.bounds, strict=True):
            group = scores[members]
            forced, _ = _top(group, least, tie)
            allowed, _ = _top(group, greatest, tie)
            chosen[members] = forced
            open_scores[members] = np.where(allowed & ~forced, group, -np.inf)
        free = self.num_select - int(self.bounds[:, 0].sum())
        return chosen | _top(open_scores, free, tie)[0]

    def maximise(self, scores: np.ndarray, tie: float = 0.0, hint: float = 0.0) -> Vertex:
        """Solve max c.w over W for scores c [N]; ``tie`` as in ``best``.

        ``hint``: a price near the answer's, if one is known; it saves time and changes nothing.

        The K-th best priced score falls as the price rises, and so does each sample's own. So
        between two prices a sample is settled if its score at the high price beats the K-th best
        at the low one, or its score at the low price does not reach the K-th best at the high one:
        after a few trials few samples are open. (Not so with quotas, where all stay open.)
        """
        low = hint / _HINT_SPREAD
        upper = self.best(scores - low * self.costs, tie)
        cost_upper = float(self.costs[upper].sum())
        if low > 0 and self.fits(upper, cost_upper):
            low = 0.0
            upper = self.best(scores, tie)
            cost_upper = float(self.costs[upper].sum())
        value_upper = float(scores[upper].sum())
        if low == 0 and self.fits(upper, cost_upper):
            return Vertex(upper, upper, 0.0, value_upper, 0.0)
        guess = low * _HINT_SPREAD**2
        mark_low = float((scores[upper] - low * self.costs[upper]).min())
        lower = self._cheapest
        value_lower, cost_lower = float(scores[lower].sum()), float(self.costs[lower].sum())
        high, mark_high = math.inf, -math.inf
        open_ids, open_scores, open_costs = np.arange(len(scores)), scores, self.costs
        settled, value_settled, cost_settled = np.zeros(len(scores), dtype=bool), 0.0, 0.0
        count = self.num_select
        while True:
            crossing = max(low, (value_upper - value_lower) / (cost_upper - cost_lower))
            price = guess or crossing
            priced = open_scores - price * open_costs
            if self.codes is None:
                picked, mark = _top(priced, count, tie)
            else:
                picked, mark = self.best(priced, tie), math.nan
            picked = picked.nonzero()[0]
            value = value_settled + float(open_scores[picked].sum())
            cost = cost_settled + float(open_costs[picked].sum())
            line = value_upper - price * cost_upper
            slack = _ROUNDING * (abs(value_upper) + price * cost_upper)
            if price == crossing and value - price * cost <= line + slack:
                break
            trial = settled.copy()
            trial[open_ids[picked]] = True
            if self.fits(trial, cost):
                lower, value_lower, cost_lower = trial, value, cost
                high, mark_high = price, mark
            else:
                upper, value_upper, cost_upper = trial, value, cost
                low, mark_low = price, mark
            if self.codes is None and high < math.inf and len(open_ids) > _WORTH_SETTLING:
                inside = open_scores - high * open_costs > mark_low + 2 * tie
                outside = open_scores - low * open_costs < mark_high - 2 * tie
                settled[open_ids[inside]] = True
                value_settled += float(open_scores[inside].sum())
                cost_settled += float(open_costs[inside].sum())
                count -= int(np.count_nonzero(inside))
                still = (~(inside | outside)).nonzero()[0]
                open_ids = open_ids[still]
                open_scores, open_costs = open_scores[still], open_costs[still]
            guess = 0.0
        lower, upper, theta = self._adjacent(lower, upper)
        return Vertex(lower, upper, theta, line + price * self.budget, price)

    def project(self, point: np.ndarray) -> np.ndarray:
        """[N] the point of W nearest to ``point`` [N].

        Where the budget binds, the cost is a falling, piecewise linear function of the price:
        Newton's step from a point on the right piece is exact. A step that leaves the bracket is
        replaced by bisection.
        """
        weights, slope, level = self._project_at(point, 0.0, None)
        low, high, price = 0.0, math.inf, 0.0
        for _ in range(_MAX_STEPS):
            excess = float(self.costs @ weights) - self.budget
            if abs(excess) <= _ROUNDING * self.budget or (excess < 0 and price == 0.0):
                break
            low, high = (price, high) if excess > 0 else (low, price)
            step = price + excess / slope if slope > 0 else math.nan
            if not low < step < high:
                step = 2.0 * low + 1.0 / self._cost_scale if high == math.inf else (low + high) / 2
            if step in (low, high):
                break
            price = step
            weights, slope, level = self._project_at(point, price, level)
        return weights

    def _project_at(
        self, point: np.ndarray, price: float, guess: float | None
    ) -> tuple[np.ndarray, float, float]:
        """The projection of point - price a on W without the budget, -d(cost)/d(price), and the
        level nu; ``guess``: a level to start from."""
        shifted = point - price * self.costs
        if self.codes is None:
            level = _level(shifted - 1.0, shifted, len(point) - self.num_select, guess)
            weights = np.clip(shifted - level, 0.0, 1.0)
            costs = self.costs[(weights > 0) & (weights < 1)]
            return weights, float(((costs - costs.mean()) ** 2).sum()) if costs.size else 0.0, level
        # A weight falls from 1 to 0 as nu passes from shifted - 1 to shifted, but a group follows
        # nu only between the levels at which it holds its greatest and its least count.
        least_level, greatest_level = self._group_levels(shifted)
        low, high = least_level[self.codes], greatest_level[self.codes]
        start, end = np.clip(shifted - 1.0, low, high), np.clip(shifted, low, high)
        most = float(np.clip(shifted - low, 0.0, 1.0).sum())
        level = _level(start, end, most - self.num_select, guess)
        levels = np.clip(level, least_level, greatest_level)
        weights = np.clip(shifted - levels[self.codes], 0.0, 1.0)
        inner = (weights > 0) & (weights < 1)
        # Groups held at a count have a level of their own, the others share one.
        shared = np.where(levels == level, len(levels), np.arange(len(levels)))
        shared, costs = shared[self.codes[inner]], self.costs[inner]
        mean = np.bincount(shared, costs) / np.maximum(np.bincount(shared), 1)
        return weights, float(((costs - mean[shared]) ** 2).sum()), level

    def _group_levels(self, shifted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[G] and [G]: levels at which each group holds its greatest and its least count."""
        low, high = np.zeros(len(self.bounds)), np.zeros(len(self.bounds))
        for code, (members, (least, greatest)) in enumerate(
            zip(self._members, self.bounds, strict=True)
        ):
            if not members.size:
                continue
            values = shifted[members]
            low[code] = _level(values - 1.0, values, len(members) - greatest, None)
            high[code] = _level(values - 1.0, values, len(members) - least, None)
        return low, high

    def fits(self, mask: np.ndarray, cost: float) -> bool:
        """Whether a mask fits the budget, given its cost as summed by float64 arithmetic."""
        if math.isinf(self.budget):
            return True
        if abs(cost - self.budget) <= _ROUNDING * self.budget:
            cost = self.cost(mask)
        return cost <= self.budget

    def _adjacent(
        self, lower: np.ndarray, upper: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """Walk from upper to lower by single exchanges, to the first selection that fits.

        Returns it, the one before it, and the share theta of the latter in the mixture of the two
        that costs tau. Both ends are optimal at one price, so every step is. With quotas, pairs of
        one group go first: the counts of the groups then stay between those of the two ends.
        """
        leaving, entering = (upper & ~lower).nonzero()[0], (lower & ~upper).nonzero()[0]
        leaving = leaving[np.lexsort((leaving, -self.costs[leaving]))]
        entering = entering[np.lexsort((entering, self.costs[entering]))]
        if self.codes is not None:
            leaving, entering = self._paired_by_group(leaving, entering)
        start = float(self.costs[upper].sum())
        path = start + np.cumsum(self.costs[entering] - self.costs[leaving])
        for done in range(len(path)):
            if path[done] > self.budget * (1 + _ROUNDING):
                continue
            after = upper.copy()
            after[leaving[: done + 1]], after[entering[: done + 1]] = False, True
            if self.fits(after, path[done]):
                break
        before = after.copy()
        before[leaving[done]], before[entering[done]] = True, False
        over = path[done - 1] if done else start
        theta = (self.budget - path[done]) / (over - path[done]) if over > path[done] else 0.0
        return after, before, min(1.0, max(0.0, theta))

    def _paired_by_group(
        self, leaving: np.ndarray, entering: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        pairs: tuple[list, list, list, list] = ([], [], [], [])
        for code in range(len(self.bounds)):
            out, into = leaving[self.codes[leaving] == code], entering[self.codes[entering] == code]
            both = min(len(out), len(into))
            for part, values in zip(
                pairs, (out[:both], into[:both], out[both:], into[both:]), strict=True
            ):
                part.append(values)
        out, into, rest_out, rest_into = map(np.concatenate, pairs)
        return np.concatenate([out, rest_out]), np.concatenate([into, rest_into])


def _top(scores: np.ndarray, count: int, tie: float) -> tuple[np.ndarray, float]:
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


def _level(start: np.ndarray, end: np.ndarray, fall: float, guess: float | None) -> float:
    """The level nu at which sum_i (clip(nu, start_i, end_i) - start_i) reaches ``fall``.

    The sum is piecewise linear and rises: Newton's steps, halving where they leave the bracket.
    The least start where nothing is to fall, the greatest end where everything is.
    """
    low, high = float(start.min()), float(end.max())
    if fall <= 0:
        return low
    offset = float(start.sum()) + fall
    if fall >= float(end.sum()) - offset + fall:
        return high
    level = guess if guess is not None and low < guess < high else low + (high - low) / 2
    for _ in range(_MAX_STEPS):
        excess = float(np.clip(level, start, end).sum()) - offset
        if excess == 0:
            break
        low, high = (low, level) if excess > 0 else (level, high)
        slope = np.count_nonzero((start < level) & (level < end))
        step = level - excess / slope if slope else math.nan
        if abs(step - level) <= _ROUNDING * max(1.0, abs(level)):
            break
        level = step if low < step < high else (low + high) / 2
        if level in (low, high):
            break
    return level
