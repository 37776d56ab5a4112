"""The two subproblems against scipy, with and without quotas."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import linprog

from megatron_direct.selection import InfeasibleSelection, stiff_budget
from megatron_direct.selection.feasible import FeasibleSet


def draw(seed: int) -> tuple[np.random.Generator, FeasibleSet]:
    """A feasible set of 3 to 30 samples; every second seed has quotas, every third tied costs."""
    rng = np.random.default_rng(seed)
    num = int(rng.integers(3, 31))
    num_select = int(rng.integers(1, num))
    costs = rng.pareto(1.0, num)
    if seed % 3 == 0:
        costs = np.round(costs)
    budget = stiff_budget(costs, num_select, float(rng.choice([0.0, 0.3, 1.0])))
    codes = bounds = None
    if seed % 2:
        codes = rng.integers(0, 3, num)
        sizes = np.bincount(codes, minlength=3)
        counts = np.bincount(codes[rng.permutation(num)[:num_select]], minlength=3)
        bounds = np.stack([
            np.maximum(counts - rng.integers(0, 2, 3), 0),
            np.minimum(counts + rng.integers(0, 2, 3), sizes),
        ], axis=1)
    try:
        return rng, FeasibleSet(costs, num_select, budget, codes, bounds)
    except InfeasibleSelection as error:
        budget = 1.2 * error.min_stiff_budget
        return rng, FeasibleSet(costs, num_select, budget, codes, bounds)


def linear_optimum(feasible: FeasibleSet, scores: np.ndarray) -> float:
    upper, limits = [feasible.costs], [feasible.budget]
    if feasible.codes is not None:
        for code, (least, greatest) in enumerate(feasible.bounds):
            member = (feasible.codes == code).astype(float)
            upper += [member, -member]
            limits += [greatest, -least]
    solved = linprog(
        -scores, A_ub=np.array(upper), b_ub=limits, A_eq=np.ones((1, len(scores))),
        b_eq=[feasible.num_select], bounds=(0, 1),
    )
    assert solved.success
    return -solved.fun


@pytest.mark.parametrize("seed", range(60))
def test_linear_subproblem_agrees_with_linprog(seed):
    rng, feasible = draw(seed)
    scores = rng.standard_normal(len(feasible.costs))
    vertex = feasible.maximise(scores)
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
    plain = feasible.maximise(scores)
    hinted = feasible.maximise(scores, hint=hint * plain.price)
    assert hinted.value == pytest.approx(plain.value, rel=1e-12)
    assert np.array_equal(hinted.lower, plain.lower)


def test_open_samples_are_settled_without_changing_the_optimum():
    """Above a few thousand samples the search drops those that are settled."""
    rng = np.random.default_rng(0)
    costs, scores = rng.pareto(1.2, 20_000), rng.standard_normal(20_000)
    feasible = FeasibleSet(costs, 2_000, stiff_budget(costs, 2_000, 0.2))
    vertex = feasible.maximise(scores)
    # Weak duality: any feasible weights score at most the dual value at any price.
    priced = np.sort(scores - vertex.price * costs)[-2_000:].sum()
    dual = priced + vertex.price * feasible.budget
    assert scores @ vertex.weights() == pytest.approx(dual, rel=1e-10)
    assert feasible.admits(vertex.lower)


@pytest.mark.parametrize("seed", range(60))
def test_projection_meets_its_variational_inequality(seed):
    """w is the projection of y iff no feasible z has (y - w).(z - w) > 0."""
    rng, feasible = draw(seed)
    point = rng.standard_normal(len(feasible.costs)) * rng.choice([0.3, 1.0, 5.0])
    weights = feasible.project(point)
    residual = point - weights
    assert linear_optimum(feasible, residual) - residual @ weights <= 1e-7
    assert weights.min() >= 0 and weights.max() <= 1
    assert weights.sum() == pytest.approx(feasible.num_select, abs=1e-9)
    assert feasible.costs @ weights <= feasible.budget * (1 + 1e-9) + 1e-12
    if feasible.codes is not None:
        counts = np.bincount(feasible.codes, weights, minlength=3)
        assert np.all(counts >= feasible.bounds[:, 0] - 1e-9)
        assert np.all(counts <= feasible.bounds[:, 1] + 1e-9)


def test_ties_go_to_the_lower_id():
    feasible = FeasibleSet(np.zeros(6), 2, np.inf)
    noisy = np.array([0.0, 1.0, 1.0 - 1e-13, 1.0 + 1e-13, 1.0, 0.0])
    assert np.flatnonzero(feasible.best(noisy, tie=1e-12)).tolist() == [1, 2]


def test_infeasible_budget_names_the_least_with_and_without_quotas():
    costs = np.array([1.0, 2.0, 4.0, 8.0])
    with pytest.raises(InfeasibleSelection, match="cheapest cost 3.0 together") as error:
        FeasibleSet(costs, 2, 2.9)
    assert error.value.min_stiff_budget == 3.0
    codes, bounds = np.array([0, 0, 1, 1]), np.array([[0, 2], [1, 2]])
    with pytest.raises(InfeasibleSelection) as error:
        FeasibleSet(costs, 2, 4.9, codes, bounds)
    assert error.value.min_stiff_budget == 5.0
    FeasibleSet(costs, 2, 5.0, codes, bounds)
