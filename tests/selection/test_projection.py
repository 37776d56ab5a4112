"""The projection on the feasible set: its variational inequality, checked with scipy's linprog."""

from __future__ import annotations

import numpy as np
import pytest
from selection.feasible_sets import draw, linear_optimum

from megatron_direct.selection.projection import project


@pytest.mark.parametrize("seed", range(60))
def test_meets_its_variational_inequality(seed):
    """w is the projection of y iff no feasible z has (y - w).(z - w) > 0."""
    rng, feasible = draw(seed)
    point = rng.standard_normal(len(feasible.costs)) * rng.choice([0.3, 1.0, 5.0])
    weights = project(feasible, point)
    residual = point - weights
    # 1e-7: HiGHS solves to this feasibility.
    assert linear_optimum(feasible, residual) - residual @ weights <= 1e-7
    assert weights.min() >= 0 and weights.max() <= 1
    assert weights.sum() == pytest.approx(feasible.num_select, abs=1e-9)
    assert feasible.costs @ weights <= feasible.budget * (1 + 1e-9) + 1e-12
    if feasible.quotas is not None:
        counts = np.bincount(feasible.quotas.codes, weights, minlength=3)
        assert np.all(counts >= feasible.quotas.bounds[:, 0] - 1e-9)
        assert np.all(counts <= feasible.quotas.bounds[:, 1] + 1e-9)
