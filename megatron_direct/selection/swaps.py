"""Local search: exchange selected for unselected samples while the objective rises.

For J(s) = b.s + s.Q s / 2 with gradient g = b + Q s, exchanging i for j changes J by

    (c_j - c_i) + (f_j - f_i).Q (f_j - f_i) / 2,      c = F^T g

and two exchanges at once add d_1.Q d_2 to the sum of their gains. Only exchanges that keep the
budget and the quotas are made; two at once let one pay for the other.

A round lists the most promising samples of both sides, fetches their rows once, and searches among
them with the Gram matrix of Q alone: no product with all the rows until the next round.
"""

from __future__ import annotations

import numpy as np

from megatron_direct.selection.feasible import FeasibleSet
from megatron_direct.selection.objectives import Quadratic
from megatron_direct.selection.rows import Rows

# Samples listed on each side per round. Measured: 32 loses quality, 256 gains next to none.
_LISTED = 64
# Exchanges that are tried two at a time.
_PAIRED = 48
# Gains below this share of |J| are left: they are of the size of rounding.
_LEAST_GAIN = 1e-9
# Rows that differ by less than this share of their norm are copies.
_SAME_ROW = 1e-6
# Rounds after which an ever-improving search is cut off; instances measured take 2 to 15.
_MAX_ROUNDS = 50


def improve(
    rows: Rows,
    feasible: FeasibleSet,
    objective: Quadratic,
    mask: np.ndarray,
    self_terms: np.ndarray,
) -> tuple[np.ndarray, float, int, bool]:
    """The selection [N] bool after local search, its value, the exchanges made, and whether it
    converged.

    ``self_terms`` [N]: f_i.Q f_i / 2 or near it; it guides what is listed.
    """
    mask = mask.copy()
    total, price = 0, 0.0
    for _ in range(_MAX_ROUNDS):
        sums = rows.exact_sum(mask)
        scores = rows.scores(objective.gradient(sums)[None])[0]
        price = feasible.maximise(scores, rows.tie(scores), price).price
        listed = _shortlist(feasible, mask, scores, self_terms, price)
        value = float(objective.value(sums))
        least = _LEAST_GAIN * abs(value)
        made = _search(rows, feasible, objective, mask, listed, scores, price, least)
        total += made
        if not made:
            return mask, value, total, True
    return mask, float(objective.value(rows.exact_sum(mask))), total, False


def prefer_lower_ids(rows: Rows, feasible: FeasibleSet, mask: np.ndarray) -> np.ndarray:
    """The selection [N] bool with copies of one sample exchanged for those of lower ids.

    Copies share group and row, and so their cost, but for rounding: which copy was computed in
    which batch shall not decide. Candidates are found by two random projections of the rows and
    compared in full before they are exchanged; the budget holds all the same.
    """
    mask = mask.copy()
    run = np.zeros(len(mask), dtype=np.int64) if feasible.codes is None else feasible.codes
    for probe in rows.scores(np.random.default_rng(0).standard_normal((2, rows.dim))):
        run = _runs(run, probe, rows.tie(probe))
    mixed = (np.bincount(run, mask) > 0) & (np.bincount(run, ~mask) > 0)
    order = np.argsort(run, kind="stable")
    where = order[mixed[run[order]]]
    pairs: list[tuple[int, int]] = []
    for part in np.split(where, np.flatnonzero(np.diff(run[where])) + 1):
        leaving, entering = np.sort(part[mask[part]])[::-1], np.sort(part[~mask[part]])
        pairs += [(i, j) for i, j in zip(leaving, entering, strict=False) if j < i]
    # Sums of costs err by a few units in the last place.
    slack = feasible.budget - feasible.cost(mask) * (1 + 1e-12)
    for start in range(0, len(pairs), _LISTED):
        out, into = np.array(pairs[start : start + _LISTED]).T
        leaving, entering = rows.take(out), rows.take(into)
        apart = np.linalg.norm(leaving - entering, axis=1)
        same = apart <= _SAME_ROW * np.linalg.norm(leaving, axis=1)
        for i, j in zip(out[same], into[same], strict=True):
            dearer = max(float(feasible.costs[j] - feasible.costs[i]), 0.0)
            if dearer == 0 or dearer <= slack:
                mask[i], mask[j] = False, True
                slack -= dearer
    return mask


def _runs(run: np.ndarray, values: np.ndarray, tie: float) -> np.ndarray:
    """[N] the number of each sample's run, once runs are split where sorted values [N] are more
    than ``tie`` apart."""
    order = np.lexsort((values, run))
    new = (np.diff(run[order]) != 0) | (np.diff(values[order]) > tie)
    result = np.empty(len(run), dtype=np.int64)
    result[order] = np.concatenate([[0], np.cumsum(new)])
    return result


def _shortlist(
    feasible: FeasibleSet,
    mask: np.ndarray,
    scores: np.ndarray,
    self_terms: np.ndarray,
    price: float,
) -> np.ndarray:
    """Ascending ids: on each side the best by priced gain, and a quarter by gain alone."""
    net = scores - price * feasible.costs
    picked = []
    for side, sign in ((np.flatnonzero(mask), -1.0), (np.flatnonzero(~mask), 1.0)):
        for value, count in ((net, 3 * _LISTED // 4), (scores, _LISTED // 4)):
            key = (sign * value + self_terms)[side]
            if len(side) > count:
                picked.append(side[np.argpartition(-key, count)[:count]])
            else:
                picked.append(side)
    return np.unique(np.concatenate(picked))


def _search(
    rows: Rows,
    feasible: FeasibleSet,
    objective: Quadratic,
    mask: np.ndarray,
    listed: np.ndarray,
    scores: np.ndarray,
    price: float,
    least: float,
) -> int:
    """Best exchanges among the listed samples, made in ``mask``, until none gains ``least``."""
    sketches = rows.take(listed)
    gram = objective.curve(sketches) @ sketches.T
    half = 0.5 * np.diag(gram)
    second_order = half[:, None] + half - gram
    linear = scores[listed]
    costs = feasible.costs[listed]
    spend = costs - costs[:, None]
    chosen = mask[listed]
    quotas = _Counts(feasible, mask, listed)
    # The guard keeps sums of rounded differences within the budget.
    spent = feasible.cost(mask)
    slack = feasible.budget - spent - 1e-12 * spent
    made = 0
    while True:
        gain = second_order + linear
        gain -= linear[:, None]
        gain[~quotas.allowed(chosen)] = -np.inf
        moves = _best_single(gain, (spend <= slack) | (spend <= 0), least)
        if moves is None:
            moves = _best_double(gain, spend, quotas.same, gram, slack, price, least)
        if moves is None:
            return made
        for i, j in moves:
            chosen[i], chosen[j] = False, True
            mask[listed[i]], mask[listed[j]] = False, True
            linear += gram[j] - gram[i]
            slack -= costs[j] - costs[i]
            quotas.exchange(i, j)
            made += 1


def _first_best(gain: np.ndarray, least: float) -> int | None:
    """Index of the first gain within rounding of the best, so that ties go to the lower ids."""
    best = gain.max()
    return int(np.argmax(gain >= best - 1e-3 * least)) if best > least else None


def _best_single(
    gain: np.ndarray, fits: np.ndarray, least: float
) -> list[tuple[int, int]] | None:
    flat = _first_best(np.where(fits, gain, -np.inf).ravel(), least)
    return None if flat is None else [divmod(flat, gain.shape[1])]


def _best_double(
    gain: np.ndarray,
    spend: np.ndarray,
    same: np.ndarray,
    gram: np.ndarray,
    slack: float,
    price: float,
    least: float,
) -> list[tuple[int, int]] | None:
    """Two exchanges at once, of the most promising; at most one of them across groups."""
    best = np.flatnonzero(np.isfinite(gain))
    if best.size < 2:
        return None
    if best.size > _PAIRED:
        key = price * spend.ravel()[best] - gain.ravel()[best]
        best = best[np.sort(np.argpartition(key, _PAIRED)[:_PAIRED])]
    i, j = np.divmod(best, len(gain))
    cross = gram[np.ix_(j, j)] - gram[np.ix_(j, i)] - gram[np.ix_(i, j)] + gram[np.ix_(i, i)]
    single, paid, local = gain[i, j], spend[i, j], same[i, j]
    both = single[:, None] + single + cross
    fits = (
        (paid[:, None] + paid <= slack)
        & (i[:, None] != i)
        & (j[:, None] != j)
        & (local[:, None] | local)
    )
    flat = _first_best(np.where(fits, both, -np.inf).ravel(), least)
    if flat is None:
        return None
    return [(int(i[move]), int(j[move])) for move in divmod(flat, len(best))]


class _Counts:
    """Counts per group during a search; without quotas all samples are of one group."""

    def __init__(self, feasible: FeasibleSet, mask: np.ndarray, listed: np.ndarray):
        if feasible.codes is None:
            self._codes = np.zeros(len(listed), dtype=np.int64)
            self._bounds = np.array([[0, feasible.num_select]])
            self._counts = np.array([feasible.num_select])
        else:
            self._codes = feasible.codes[listed]
            self._bounds = feasible.bounds
            self._counts = np.bincount(feasible.codes[mask], minlength=len(feasible.bounds))
        self.same = self._codes[:, None] == self._codes

    def allowed(self, chosen: np.ndarray) -> np.ndarray:
        """[listed, listed] bool: exchanges of a chosen for an unchosen one within the quotas."""
        may_leave = (self._counts > self._bounds[:, 0])[self._codes]
        may_enter = (self._counts < self._bounds[:, 1])[self._codes]
        return chosen[:, None] & ~chosen & (self.same | (may_leave[:, None] & may_enter))

    def exchange(self, i: int, j: int) -> None:
        self._counts[self._codes[i]] -= 1
        self._counts[self._codes[j]] += 1
