"""Rows spread over ranks select what one rank with all the rows selects.

Ranks are threads; the all-reduce meets at a barrier and sums in the order of the ranks, as a
collective that returns the same array everywhere does.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from megatron_direct.selection import (
    InfeasibleQuotas,
    InfeasibleSelection,
    solve_selection,
    stiff_budget,
)
from megatron_direct.selection.rows import LocalRows, Rows, serve
from megatron_direct.selection.share import Share


class ThreadRanks:
    def __init__(self, size: int):
        self._barrier = threading.Barrier(size, timeout=60)
        self._parts: dict[int, np.ndarray] = {}

    def all_reduce_sum(self, rank: int, array: np.ndarray) -> np.ndarray:
        self._parts[rank] = array
        self._barrier.wait()
        total = sum(self._parts[r] for r in sorted(self._parts))
        self._barrier.wait()
        return total

    def run(self, work) -> list:
        size = self._barrier.parties
        with ThreadPoolExecutor(size) as pool:
            return [f.result() for f in [pool.submit(work, rank) for rank in range(size)]]


def uneven_shares(num: int, ranks: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Interleaved ids; the second rank of three or more holds none."""
    owner = rng.choice([r for r in range(ranks) if r != 1 or ranks == 2], num)
    return [np.flatnonzero(owner == rank) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("objective", ["flat-energy", "alignment", "descent"])
def test_spread_rows_give_the_gathered_selection(objective, ranks):
    rng = np.random.default_rng(ranks)
    flat, costs = rng.standard_normal((24, 600)).astype(np.float32), rng.pareto(1.5, 600)
    groups = rng.choice(["code", "prose", "maths"], 600)
    options = {
        "stiff_budget": stiff_budget(costs, 80, 0.3), "objective": objective,
        "quotas": {"maths": (20, 25), "code": (0, 40)},
    }
    if objective != "flat-energy":
        options["target"] = rng.standard_normal(24)
    if objective == "descent":
        options |= {"curvature": 1.0 / np.arange(1, 25), "step_size": 2.0}
    gathered = solve_selection(flat, costs, 80, groups=groups, **options)
    shares = uneven_shares(600, ranks, rng)
    meeting = ThreadRanks(ranks)

    def solve(rank):
        ids = shares[rank]
        return solve_selection(
            flat[:, ids], costs[ids], 80, groups=groups[ids], sample_ids=ids,
            all_reduce_sum=lambda array: meeting.all_reduce_sum(rank, array), **options,
        )

    for found in meeting.run(solve):
        assert np.array_equal(found.indices, gathered.indices)
        # 1e-6: float32 products, summed over the ranks in another order.
        assert found.objective == pytest.approx(gathered.objective, rel=1e-6)
        assert found.stiff_cost == gathered.stiff_cost


def test_bad_values_and_ids_raise_on_every_rank():
    meeting = ThreadRanks(2)

    def solve(costs, ids):
        def work(rank):
            with pytest.raises(ValueError) as error:
                solve_selection(
                    np.ones((1, 2)), costs[rank], 1, stiff_budget=1.0, sample_ids=ids[rank],
                    all_reduce_sum=lambda array: meeting.all_reduce_sum(rank, array),
                )
            return str(error.value)
        return meeting.run(work)

    right = [np.array([0, 2]), np.array([1, 3])]
    for message in solve([np.ones(2), np.array([1.0, np.nan])], right):
        assert "found nan at sample 3" in message
    for message in solve([np.ones(2)] * 2, [np.array([0, 1]), np.array([1, 2])]):
        assert "the integers 0 to 3, each once" in message


def test_an_infeasible_budget_or_quota_raises_its_own_error_on_every_rank():
    meeting = ThreadRanks(2)

    def solve(expected, **options):
        def work(rank):
            ids = np.arange(2) + 2 * rank
            with pytest.raises(expected) as error:
                solve_selection(
                    np.ones((1, 2)), np.ones(2), 2, sample_ids=ids,
                    all_reduce_sum=lambda array: meeting.all_reduce_sum(rank, array), **options)
            return error.value
        return meeting.run(work)

    for error in solve(InfeasibleSelection, stiff_budget=1.0):
        assert error.min_stiff_budget == 2.0
    for error in solve(InfeasibleQuotas, stiff_budget=9.0, groups=["a", "a"],
                       quotas={"a": (0, 1)}):
        assert "admit from 0 to 1 samples" in str(error)


def test_products_in_stretches_are_those_of_all_rows(monkeypatch):
    """Every product, with ids in any order and stretches that hold none of a rank's samples."""
    monkeypatch.setattr("megatron_direct.selection.share.STRETCH", 7)
    rng = np.random.default_rng(5)
    rows = rng.standard_normal((50, 6))
    shares = [rng.permutation(part) for part in uneven_shares(50, 3, rng)]
    directions, weights = rng.standard_normal((2, 6)), rng.random((3, 50))
    mask, ids, scale = rng.random(50) < 0.4, np.array([3, 41, 3, 17]), rng.random(6)
    meeting = ThreadRanks(3)

    def work(rank):
        here = shares[rank]
        share = Share.of_rank(len(here), here, lambda array: meeting.all_reduce_sum(rank, array))
        local = LocalRows(rows[here].T)
        if not share.leads:
            return serve(local, share)
        products = Rows(local, share)
        found = (products.scores(directions), products.sums(weights), products.exact_sum(mask),
                 products.take(ids), products.squares(), products.squares(scale))
        products.release()
        return found

    found, = (result for result in meeting.run(work) if result is not None)
    expected = (directions @ rows.T, weights @ rows, rows[mask].sum(0), rows[ids],
                (rows**2).sum(1), rows**2 @ scale)
    for here, there in zip(found, expected, strict=True):
        # 1e-12: float64 sums in another order.
        np.testing.assert_allclose(here, there, rtol=1e-12, atol=1e-12)


def test_ranks_that_serve_hold_no_vector_of_all_samples(monkeypatch):
    """Whatever is sent has at most a stretch of samples, but for what the leader alone makes."""
    monkeypatch.setattr("megatron_direct.selection.share.STRETCH", 100)
    rng = np.random.default_rng(1)
    flat, costs = rng.standard_normal((8, 2000)).astype(np.float32), rng.random(2000)
    meeting, largest = ThreadRanks(2), []

    def work(rank):
        def all_reduce_sum(array):
            largest.append(array.shape[-1] if array.ndim else 1)
            return meeting.all_reduce_sum(rank, array)

        ids = np.arange(1000) + 1000 * rank
        return solve_selection(flat[:, ids], costs[ids], 300, stiff_budget=100.0, sample_ids=ids,
                               all_reduce_sum=all_reduce_sum).indices

    first, second = meeting.run(work)
    assert np.array_equal(first, second)
    # Exchanges fetch the rows of at most 256 listed samples by their numbers.
    assert max(largest) <= 256
