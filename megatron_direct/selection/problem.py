"""What is asked and what is answered: the selection problem, its inputs checked, its result.

Notation, used in every file of this folder:

    N  samples, k  sketch coordinates, K  samples to select
    F  [k, N]   column i is f_i, the flat part of sample i's sketch; its transpose are the *rows*
    a  [N]      stiff costs, a_i >= 0;  tau  the stiff budget
    w  [N]      weights;  s = F w  [k]  the selected sum

    maximise J(F w)   over   0 <= w <= 1,  sum w = K,  a.w <= tau,  quotas

with w in {0, 1} for a selection, and in [0, 1] for its relaxation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np


class InfeasibleSelection(ValueError):
    """No selection of K samples meets the budget.

    ``min_stiff_budget``: the smallest budget that can be met (with the quotas, if any).
    """

    def __init__(self, stiff_budget: float, num_select: int, min_stiff_budget: float):
        super().__init__(
            f"no {num_select} samples fit a stiff budget of {stiff_budget!r}: the cheapest cost "
            f"{min_stiff_budget!r} together; give a stiff budget of at least that, or select fewer"
        )
        self.min_stiff_budget = min_stiff_budget


@dataclass(frozen=True)
class Selection:
    """A selection, what it attains, and what no selection can exceed.

    indices       int64 [K], ascending sample ids
    objective     value of the selection; larger is better for every objective
    stiff_cost    sum of the selected costs, correctly rounded
    stiff_budget  the budget it was held to, or None where there was none
    status        "optimal": objective equals upper_bound, but for rounding in products;
                  "converged": no move that was tried improves it (and, for a concave objective,
                  the relaxation was solved to its tolerance);
                  "iteration-limit": stopped before that
    upper_bound   no feasible weights, fractional ones included, exceed this; None if not asked for
    history       the steps of the solve in order, each a dict of plain numbers and strings
    """

    indices: np.ndarray
    objective: float
    stiff_cost: float
    stiff_budget: float | None
    status: str
    upper_bound: float | None
    history: list[dict] = field(default_factory=list)


def stiff_budget(stiff_cost: np.ndarray, num_select: int, fraction: float) -> float:
    """tau = tau_min + fraction (K mean(a) - tau_min): 0 admits only the K cheapest, 1 the average.

    ``stiff_cost`` [N] >= 0; ``fraction`` in [0, 1]. Correctly rounded sums make the value
    independent of the order of the samples, and fraction 0 exactly feasible.
    """
    costs = checked_costs(stiff_cost)
    num_select = checked_count(num_select, len(costs))
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"the budget fraction must lie in [0, 1], found {fraction!r}")
    least = math.fsum(np.partition(costs, num_select - 1)[:num_select])
    average = num_select * (math.fsum(costs) / len(costs))
    # max: rounding of the average must not undercut the least cost when all costs are equal
    return max(least, least + fraction * (average - least))


def checked_costs(stiff_cost: np.ndarray) -> np.ndarray:
    """[N] float64, finite and non-negative, or a ValueError that names the first bad sample."""
    costs = np.asarray(stiff_cost, dtype=np.float64)
    if costs.ndim != 1 or costs.size == 0:
        raise ValueError(f"stiff_cost must be a vector [N], N >= 1, found shape {costs.shape}")
    bad = ~(np.isfinite(costs) & (costs >= 0))
    if bad.any():
        first = int(np.argmax(bad))
        raise ValueError(
            f"stiff_cost must be finite and non-negative, found {costs[first]} at sample {first} "
            f"and {int(bad.sum())} such in all; drop these samples"
        )
    return costs


def checked_count(num_select: int, num_samples: int) -> int:
    """K as an int in [1, N]."""
    if not isinstance(num_select, int | np.integer) or not 1 <= num_select <= num_samples:
        raise ValueError(
            f"num_select must be an integer from 1 to the number of samples, {num_samples}, "
            f"found {num_select!r}"
        )
    return int(num_select)


def checked_budget(stiff_budget: float | None) -> float:
    """tau as a float; None means no budget and becomes infinity."""
    if stiff_budget is None:
        return math.inf
    if not stiff_budget >= 0:  # refuses NaN too
        raise ValueError(f"stiff_budget must be at least 0, found {stiff_budget!r}")
    return float(stiff_budget)


def checked_quotas(
    groups: Sequence | np.ndarray | None,
    quotas: Mapping | None,
    num_samples: int,
) -> tuple[np.ndarray, list[tuple[object, int, int]]] | None:
    """Group codes [n] and (label, least, greatest) per code; None where there are no quotas.

    Codes follow the order of ``quotas``, so that ranks which each hold some of the samples agree
    on them; samples of groups without a quota share the last code, which is not limited.
    """
    if quotas is None and groups is None:
        return None
    if not quotas or groups is None:
        raise ValueError(
            "quotas need both: groups (a label per sample) and quotas "
            "(a mapping of label to (least, greatest))"
        )
    labels = np.asarray(groups)
    if labels.shape != (num_samples,):
        raise ValueError(f"groups must have shape ({num_samples},), found {labels.shape}")
    codes = np.full(num_samples, len(quotas), dtype=np.int64)
    limits: list[tuple[object, int, int]] = []
    for code, (label, (least, greatest)) in enumerate(quotas.items()):
        if not 0 <= least <= greatest:
            raise ValueError(
                f"the quota of group {label!r} must be 0 <= least <= greatest, "
                f"found ({least}, {greatest})"
            )
        codes[labels == label] = code
        limits.append((label, int(least), int(greatest)))
    return codes, limits


def bounded_quotas(
    codes: np.ndarray, limits: list[tuple[object, int, int]], num_select: int
) -> np.ndarray:
    """[G + 1, 2] least and greatest counts, capped by the sizes [N]; refuses what cannot be met."""
    sizes = np.bincount(codes, minlength=len(limits) + 1)
    for (label, least, _), size in zip(limits, sizes, strict=False):
        if least > size:
            raise ValueError(
                f"group {label!r} has {size} samples, but its quota asks for at least {least}"
            )
    bounds = np.array([(least, greatest) for _, least, greatest in limits] + [(0, sizes[-1])])
    bounds[:, 1] = np.minimum(bounds[:, 1], sizes)
    least, greatest = bounds.sum(axis=0)
    if not least <= num_select <= greatest:
        reach = ", ".join(
            f"{label!r}: {low} to {high}" for (label, _, _), (low, high) in zip(
                limits, bounds, strict=False)
        )
        raise ValueError(
            f"the quotas admit from {least} to {greatest} samples, but num_select is {num_select} "
            f"({reach}, samples of other groups: 0 to {sizes[-1]})"
        )
    return bounds
