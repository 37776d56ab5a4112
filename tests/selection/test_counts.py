"""Selections in which a sample may come several times, against all multisets of small instances."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest

from megatron_direct.selection import InfeasibleQuotas, solve_selection, stiff_budget
from megatron_direct.selection.baselines import random_selection

N, DIM, NUM_SELECT, MAX_COUNT = 6, 4, 5, 3


def _instance(seed, objective):
    rng = np.random.default_rng(seed)
    flat, costs = rng.standard_normal((DIM, N)), rng.uniform(0.2, 1.0, N)
    # A budget that lets no sample be taken three times and the cheapest only be taken.
    budget = stiff_budget(np.tile(costs, MAX_COUNT), NUM_SELECT, 0.5)
    keywords = {"objective": objective, "stiff_budget": budget}
    if objective != "flat-energy":
        keywords["target"] = rng.standard_normal(DIM)
    if objective == "descent":
        root = rng.standard_normal((DIM, DIM))
        keywords |= {"curvature": root @ root.T, "step_size": 0.3}
    return flat, costs, keywords


def _value(flat, indices, keywords):
    """The objective, written out."""
    total = flat[:, indices].sum(1)
    if keywords["objective"] == "flat-energy":
        return total @ total
    if keywords["objective"] == "alignment":
        return keywords["target"] @ total
    eta, mean = keywords["step_size"], total / len(indices)
    return eta * keywords["target"] @ mean - eta**2 * mean @ keywords["curvature"] @ mean / 2


def _multisets(costs, budget, admits=lambda indices: True):
    for indices in itertools.combinations_with_replacement(range(N), NUM_SELECT):
        if (max(map(indices.count, indices)) <= MAX_COUNT and admits(indices)
                and costs[list(indices)].sum() <= budget * (1 + 1e-12)):
            yield list(indices)


@pytest.mark.parametrize("objective", ["flat-energy", "alignment", "descent"])
def test_the_best_multiset_is_found(objective):
    best, repeated = 0, 0
    for seed in range(24):
        flat, costs, keywords = _instance(seed, objective)
        found = solve_selection(flat, costs, NUM_SELECT, max_count=MAX_COUNT, **keywords)
        values = [_value(flat, indices, keywords)
                  for indices in _multisets(costs, keywords["stiff_budget"])]
        assert found.indices.shape == (NUM_SELECT,) and (np.diff(found.indices) >= 0).all()
        counts = np.bincount(found.indices, minlength=N)
        assert counts.max() <= MAX_COUNT
        assert found.stiff_cost == pytest.approx(costs @ counts)
        assert found.stiff_cost <= keywords["stiff_budget"] * (1 + 1e-12)
        assert found.objective == pytest.approx(_value(flat, found.indices, keywords), rel=1e-9)
        scale = max(map(abs, values))
        assert found.objective <= max(values) + 1e-9 * scale
        assert found.upper_bound >= max(values) - 1e-9 * scale
        best += found.objective >= max(values) - 1e-6 * scale
        repeated += counts.max() > 1
    # Local search is exact on nearly all; a repeat is what most of them need.
    assert best >= 22 and repeated >= 12


def test_quotas_count_every_time():
    flat, costs, keywords = _instance(3, "alignment")
    keywords["stiff_budget"] = np.inf
    groups = np.array(list("aabbcc"))
    found = solve_selection(flat, costs, NUM_SELECT, max_count=MAX_COUNT, groups=groups,
                            quotas={"a": (4, 4), "c": (0, 1)}, **keywords)
    best = max(_value(flat, indices, keywords) for indices in _multisets(
        costs, np.inf, lambda indices: sum(i < 2 for i in indices) == 4
        and sum(i > 3 for i in indices) <= 1))
    assert found.objective == pytest.approx(best)
    with pytest.raises(InfeasibleQuotas, match="'a'"):
        solve_selection(flat, costs, 12, max_count=MAX_COUNT, groups=groups,
                        quotas={"a": (7, 8)}, **keywords)


def test_fresh_copies_go_first():
    """Of equal rows each is taken once before one is taken twice."""
    flat = np.ones((2, 4))
    found = solve_selection(flat, np.ones(4), 6, objective="alignment", target=np.ones(2),
                            stiff_budget=np.inf, max_count=3)
    assert np.bincount(found.indices).tolist() == [2, 2, 1, 1]


def test_one_is_the_problem_without_counts():
    for objective in ("flat-energy", "descent"):
        flat, costs, keywords = _instance(5, objective)
        keywords["stiff_budget"] = np.inf
        one, plain = (solve_selection(flat, costs, 3, **more, **keywords)
                      for more in ({"max_count": 1}, {}))
        np.testing.assert_array_equal(one.indices, plain.indices)


@pytest.mark.parametrize("max_count", [0, 1.5, True])
def test_a_count_that_is_none_is_refused(max_count):
    with pytest.raises(ValueError, match="max_count must be an integer of at least 1"):
        solve_selection(np.ones((2, 4)), np.ones(4), 2, stiff_budget=1e9, max_count=max_count)


def test_spread_rows_give_the_gathered_selection():
    flat, costs, keywords = _instance(8, "descent")
    expected = solve_selection(flat, costs, NUM_SELECT, max_count=MAX_COUNT, **keywords)
    ids, barrier, parts, found = (np.array([0, 3]), np.array([1, 2, 4, 5])), threading.Barrier(2), \
        {}, {}

    def on_rank(rank):
        def all_reduce_sum(array):
            parts[rank] = array.copy()
            barrier.wait(60)
            total = parts[0] + parts[1]
            barrier.wait(60)
            return total

        found[rank] = solve_selection(
            flat[:, ids[rank]], costs[ids[rank]], NUM_SELECT, max_count=MAX_COUNT,
            sample_ids=ids[rank], all_reduce_sum=all_reduce_sum, **keywords)

    threads = [threading.Thread(target=on_rank, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for rank in range(2):
        np.testing.assert_array_equal(found[rank].indices, expected.indices)


def test_random_draws_of_more_than_there_are():
    drawn = random_selection(np.array([3, 5, 8]), 7, seed=1)
    counts = [np.count_nonzero(drawn == sample) for sample in (3, 5, 8)]
    assert sorted(counts) == [2, 2, 3] and (np.diff(drawn) >= 0).all()
