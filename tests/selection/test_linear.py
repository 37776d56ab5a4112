"""The linear programme over the feasible set against scipy, with and without quotas."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from selection.feasible_sets import draw, linear_optimum

from megatron_direct.selection import stiff_budget
from megatron_direct.selection.feasible import FeasibleSet
from megatron_direct.selection.linear import maximise


@pytest.mark.parametrize("seed", range(60))
def test_agrees_with_linprog(seed):
    rng, feasible = draw(seed)
    scores = rng.standard_normal(len(feasible.costs))
    vertex = maximise(feasible, scores)
    weights = vertex.weights()
    optimum = linear_optimum(feasible, scores)
    # 1e-7: HiGHS solves to this feasibility.
    assert vertex.value == pytest.approx(optimum, abs=1e-7)
    assert scores @ weights == pytest.approx(optimum, abs=1e-7)
    assert feasible.costs @ weights <= feasible.budget * (1 + 1e-12)
    assert np.count_nonzero((weights > 0) & (weights < 1)) <= 2
    assert feasible.admits(vertex.lower)


@pytest.mark.parametrize("hint", [1e-9, 0.5, 1.0, 2.0, 1e9])
def test_a_hint_changes_nothing(hint):
    rng, feasible = draw(2)
    scores = rng.standard_normal(len(feasible.costs))
    plain = maximise(feasible, scores)
    hinted = maximise(feasible, scores, hint=hint * plain.price)
    assert hinted.value == pytest.approx(plain.value, rel=1e-12)
    assert np.array_equal(hinted.lower, plain.lower)


@pytest.mark.parametrize("seed", range(20))
def test_costs_that_are_equal_but_for_rounding(seed):
    """As copies of one document have them: their sums in floating point may agree where the exact
    ones do not."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(20, 200))
    costs = 0.37 * (1 + rng.integers(0, 2, count) * 2.2e-16)
    scores, num_select = rng.standard_normal(count), int(rng.integers(2, count))
    feasible = FeasibleSet(costs, num_select, stiff_budget(costs, num_select, 0.0))
    vertex = maximise(feasible, scores)
    assert feasible.admits(vertex.lower)
    assert vertex.value >= scores[vertex.lower].sum() - 1e-12  # which it bounds


def test_open_samples_are_settled_without_changing_the_optimum():
    """Above a few thousand samples the search drops those that are settled."""
    rng = np.random.default_rng(0)
    costs, scores = rng.pareto(1.2, 20_000), rng.standard_normal(20_000)
    feasible = FeasibleSet(costs, 2_000, stiff_budget(costs, 2_000, 0.2))
    vertex = maximise(feasible, scores)
    # Weak duality: any feasible weights score at most the dual value at any price.
    priced = np.sort(scores - vertex.price * costs)[-2_000:].sum()
    dual = priced + vertex.price * feasible.budget
    assert scores @ vertex.weights() == pytest.approx(dual, rel=1e-10)
    assert feasible.admits(vertex.lower)


@pytest.mark.parametrize("span", [1, 3, 8])
def test_a_budget_that_is_small_beside_the_costs(span):
    """Costs over many orders of magnitude, where the best selection costs 10^16 times the budget:
    the optimum is that of the selections that fit and of mixtures of two of them."""
    for seed in range(300):
        rng = np.random.default_rng(seed)
        num = int(rng.integers(3, 9))
        num_select = int(rng.integers(1, num))
        costs, scores = 10 ** rng.uniform(-span, span, num), 10 ** rng.uniform(-span, span, num)
        budget = stiff_budget(costs, num_select, float(rng.choice([0.0, 1e-12, 1e-6, 0.1])))
        feasible = FeasibleSet(costs, num_select, budget)
        vertex = maximise(feasible, scores)
        assert feasible.admits(vertex.lower)
        subsets = np.array(list(itertools.combinations(range(num), num_select)))
        spent = np.array([math.fsum(costs[subset]) for subset in subsets])
        worth = scores[subsets].sum(axis=1)
        fit = spent <= budget
        # A mixture of two selections, of which one fits, that costs the budget.
        over = (budget - spent[fit][:, None]) / (spent[~fit] - spent[fit][:, None])
        mixed = worth[fit][:, None] + over * (worth[~fit] - worth[fit][:, None])
        optimum = max(worth[fit].max(), mixed.max(initial=0.0))
        # It may exceed the optimum by what rounding of the largest score hides.
        assert optimum * (1 - 1e-9) <= vertex.value
        assert vertex.value <= optimum * (1 + 1e-9) + 1e-14 * scores.max()


def test_samples_of_great_cost_leave_no_rounding_in_a_small_budget():
    """At the least budget the cheapest samples are what fits, however dear and good another is."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        costs, scores = rng.chisquare(2, 200), rng.standard_normal(200) ** 2
        costs[0], scores[0] = costs[0] * 1e14, scores[0] * 1e14
        feasible = FeasibleSet(costs, 20, stiff_budget(costs, 20, 0.0))
        assert np.array_equal(maximise(feasible, scores).lower, feasible.cheapest)


@pytest.mark.parametrize("seed", range(12))
def test_the_value_is_a_bound_however_ties_are_decided(seed):
    rng, feasible = draw(seed)
    scores = rng.standard_normal(len(feasible.costs))
    vertex = maximise(feasible, scores, tie=rng.uniform(0, 2, len(scores)))
    assert feasible.admits(vertex.lower)
    assert vertex.value >= linear_optimum(feasible, scores) - 1e-7  # HiGHS solves to this
