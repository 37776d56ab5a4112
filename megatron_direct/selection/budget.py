"""The relative budget: how much stiff cost a selection may have, between least and average."""

from __future__ import annotations

import math

import numpy as np

from megatron_direct.selection.checks import checked_costs, checked_count, checked_number


def stiff_budget(stiff_cost: np.ndarray, num_select: int, fraction: float) -> float:
    """tau = tau_min + fraction (K mean(a) - tau_min): 0 admits only the K cheapest, 1 the average.

    ``stiff_cost`` [N] >= 0; ``fraction`` in [0, 1]. Correctly rounded sums make the value
    independent of the order of the samples, and fraction 0 exactly feasible.
    """
    costs = checked_costs(stiff_cost)
    num_select = checked_count(num_select, len(costs))
    fraction = checked_number("the budget fraction", fraction)
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(
            f"the budget fraction must lie in [0, 1], found {fraction!r}; pass an absolute "
            "budget to solve_selection directly"
        )
    least = math.fsum(np.partition(costs, num_select - 1)[:num_select])
    average = num_select * (math.fsum(costs) / len(costs))
    # max: rounding of the average must not undercut the least cost when all costs are equal
    return max(least, least + fraction * (average - least))
