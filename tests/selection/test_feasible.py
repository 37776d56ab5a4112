"""What a feasible set admits, and the least budget that leaves something in it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from selection.feasible_sets import draw

from megatron_direct.selection import InfeasibleSelection
from megatron_direct.selection.feasible import FeasibleSet
from megatron_direct.selection.quotas import Quotas, state_quotas
from megatron_direct.selection.share import Share


def test_ties_go_to_the_lower_id():
    feasible = FeasibleSet(np.zeros(6), 2, np.inf)
    noisy = np.array([0.0, 1.0, 1.0 - 1e-13, 1.0 + 1e-13, 1.0, 0.0])
    assert np.flatnonzero(feasible.best(noisy, tie=1e-12)).tolist() == [1, 2]


@pytest.mark.parametrize("seed", [1, 9, 11, 21, 51])
def test_the_best_under_quotas_is_that_of_all_subsets(seed):
    rng, feasible = draw(seed)
    num = len(feasible.costs)
    assert num <= 16 and feasible.quotas is not None
    scores = rng.standard_normal(num)
    free = FeasibleSet(feasible.costs, feasible.num_select, np.inf, feasible.quotas)
    best = -np.inf
    for subset in itertools.combinations(range(num), feasible.num_select):
        mask = np.isin(np.arange(num), subset)
        if free.admits(mask):
            best = max(best, scores[mask].sum())
    found = free.best(scores)
    # 1e-12: the same terms in another order.
    assert free.admits(found) and scores[found].sum() == pytest.approx(best, abs=1e-12)


def test_infeasible_budget_names_the_least_with_and_without_quotas():
    costs = np.array([1.0, 2.0, 4.0, 8.0])
    with pytest.raises(InfeasibleSelection, match="cheapest cost 3.0 together") as error:
        FeasibleSet(costs, 2, 2.9)
    assert error.value.min_stiff_budget == 3.0
    quotas = Quotas(np.array([0, 0, 1, 1]), np.array([[0, 2], [1, 2]]))
    with pytest.raises(InfeasibleSelection) as error:
        FeasibleSet(costs, 2, 4.9, quotas)
    assert error.value.min_stiff_budget == 5.0
    FeasibleSet(costs, 2, 5.0, quotas)


@pytest.mark.parametrize("seed", range(30))
def test_ties_at_both_ends_of_a_quota_do_not_add_up(seed):
    """Least and greatest number of a group lie among the same near ties."""
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal(200)
    quotas = state_quotas(np.arange(200) % 2, {0: (30, 32)}, Share.of_rank(200)).of_selections(80)
    feasible = FeasibleSet(np.zeros(200), 80, np.inf, quotas)
    for tie in (0.0, 0.01, 0.1, 1.0):
        assert feasible.admits(feasible.best(scores, tie))
