"""The projection on the feasible set: min |w - y|^2 over W.

With multipliers mu and nu, w = clip(y - mu a - nu, 0, 1); the sum is piecewise linear in nu for a
fixed mu, and the cost is piecewise linear in mu with nu eliminated. Newton's step is exact once it
starts on the right piece; a bracket sees to the rest. Each step is O(N).

A *level* is a value of nu; with quotas, a group that is held at its least or greatest count has a
level of its own.
"""

from __future__ import annotations

import math

import numpy as np

from megatron_direct.selection.feasible import ROUNDING, FeasibleSet
from megatron_direct.selection.quotas import Quotas

# Steps after which a search for a multiplier stops: 5 to 15 are usual, and this many halvings
# exhaust float64.
_MAX_STEPS = 200


def project(feasible: FeasibleSet, point: np.ndarray) -> np.ndarray:
    """[N] the point of W nearest to ``point`` [N].

    Where the budget binds, the cost is a falling, piecewise linear function of the price: Newton's
    step from a point on the right piece is exact. A step that leaves the bracket is replaced by
    bisection.
    """
    costs, budget = feasible.costs, feasible.budget
    cost_scale = float(costs.max()) or 1.0
    weights, slope, level = _project_at(feasible, point, 0.0, None)
    low, high, price = 0.0, math.inf, 0.0
    for _ in range(_MAX_STEPS):
        excess = float(costs @ weights) - budget
        if abs(excess) <= ROUNDING * budget or (excess < 0 and price == 0.0):
            break
        low, high = (price, high) if excess > 0 else (low, price)
        step = price + excess / slope if slope > 0 else math.nan
        if not low < step < high:
            step = 2.0 * low + 1.0 / cost_scale if high == math.inf else (low + high) / 2
        if step in (low, high):
            break
        price = step
        weights, slope, level = _project_at(feasible, point, price, level)
    return weights


def _project_at(
    feasible: FeasibleSet, point: np.ndarray, price: float, guess: float | None
) -> tuple[np.ndarray, float, float]:
    """The projection of point - price a on W without the budget, -d(cost)/d(price), and the level
    nu; ``guess``: a level to start from."""
    shifted = point - price * feasible.costs
    if feasible.quotas is None:
        level = _level(shifted - 1.0, shifted, len(point) - feasible.num_select, guess)
        weights = np.clip(shifted - level, 0.0, 1.0)
        costs = feasible.costs[(weights > 0) & (weights < 1)]
        return weights, float(((costs - costs.mean()) ** 2).sum()) if costs.size else 0.0, level
    # A weight falls from 1 to 0 as nu passes from shifted - 1 to shifted, but a group follows nu
    # only between the levels at which it holds its greatest and its least count.
    codes = feasible.quotas.codes
    least_level, greatest_level = _group_levels(feasible.quotas, shifted)
    low, high = least_level[codes], greatest_level[codes]
    start, end = np.clip(shifted - 1.0, low, high), np.clip(shifted, low, high)
    most = float(np.clip(shifted - low, 0.0, 1.0).sum())
    level = _level(start, end, most - feasible.num_select, guess)
    levels = np.clip(level, least_level, greatest_level)
    weights = np.clip(shifted - levels[codes], 0.0, 1.0)
    inner = (weights > 0) & (weights < 1)
    # Groups held at a count have a level of their own, the others share one.
    shared = np.where(levels == level, len(levels), np.arange(len(levels)))
    shared, costs = shared[codes[inner]], feasible.costs[inner]
    mean = np.bincount(shared, costs) / np.maximum(np.bincount(shared), 1)
    return weights, float(((costs - mean[shared]) ** 2).sum()), level


def _group_levels(quotas: Quotas, shifted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[G] and [G]: levels at which each group holds its greatest and its least count."""
    low, high = np.zeros(len(quotas.bounds)), np.zeros(len(quotas.bounds))
    for code, (members, (least, greatest)) in enumerate(
        zip(quotas.members, quotas.bounds, strict=True)
    ):
        if not members.size:
            continue
        values = shifted[members]
        low[code] = _level(values - 1.0, values, len(members) - greatest, None)
        high[code] = _level(values - 1.0, values, len(members) - least, None)
    return low, high


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
        if abs(step - level) <= ROUNDING * max(1.0, abs(level)):
            break
        level = step if low < step < high else (low + high) / 2
        if level in (low, high):
            break
    return level
