"""Feasibility and quality on the benchmark's random instances."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.solver.instances import draw
from benchmarks.solver.textbook import textbook_selection
from megatron_direct.selection import solve_selection


def solved(seed: int, greatest: int):
    case = draw(seed, greatest=greatest)
    found = solve_selection(case.flat, case.costs, case.num_select, stiff_budget=case.budget)
    assert len(set(found.indices.tolist())) == case.num_select, case.kind
    assert found.stiff_cost <= case.budget, case.kind
    assert found.objective <= found.upper_bound, case.kind
    return case, found


@pytest.mark.parametrize("seed", range(60))
def test_feasible_and_below_the_bound(seed):
    solved(seed, greatest=1500)


def ratio_to_textbook(seed: int, greatest: int) -> float:
    case, found = solved(seed, greatest)
    _, value = textbook_selection(case.flat, case.costs, case.num_select, case.budget)
    return found.objective / value


def test_as_good_as_the_textbook_method():
    ratios = [ratio_to_textbook(seed, greatest=150) for seed in (0, 1)]
    assert min(ratios) >= 0.995


@pytest.mark.slow
def test_as_good_as_the_textbook_method_on_200_instances():
    ratios = [ratio_to_textbook(seed, greatest=5000) for seed in range(200)]
    assert min(ratios) >= 0.995
    assert np.median(ratios) > 1.0
