"""Treated rows by the definition of each step, and selections with rows spread over ranks.

Ranks are threads that meet at a barrier (test_spread_selection.py).
"""

from __future__ import annotations

import dataclasses
import tracemalloc

import numpy as np
import pytest
from selection.test_spread_selection import ThreadRanks, uneven_shares

from megatron_direct.curvature.spectrum import Directions
from megatron_direct.errors import UserError
from megatron_direct.selection.config import SelectionConfig
from megatron_direct.selection.evidence import (
    Evidence,
    flat_rows,
    mean_gradient,
    stiff_costs,
    typical_length,
)
from megatron_direct.selection.objectives import OBJECTIVES
from megatron_direct.selection.rows import row_lengths
from megatron_direct.selection.treated_rows import summed_rows, treated_scores
from megatron_direct.selection.treatment import select_by_sketches

SIZE = 24


BY_TOKENS = {"contrast": False, "weight_by_tokens": True}


@pytest.fixture
def evidence() -> Evidence:
    """Two pools, the first of two kinds of samples and the second of one."""
    rng = np.random.default_rng(0)
    kinds = rng.standard_normal((3, SIZE)) * 3
    kind = np.sort(rng.integers(0, 3, 240))
    rows = (kinds[kind] + rng.standard_normal((240, SIZE))).astype(np.float32)
    rows *= rng.uniform(0.2, 5, (240, 1)).astype(np.float32)
    vectors = np.linalg.qr(rng.standard_normal((SIZE, 3)))[0].T
    return Evidence(rows, rng.integers(3, 60, 240), (kind == 2).astype(np.int64), 2,
                    np.arange(240), rng.standard_normal((9, SIZE)).astype(np.float32),
                    Directions(np.array([5.0, 2.0, 1.0]), vectors, 2))


def test_treated_rows_written_out(evidence):
    """One length, shrunk, weighted by tokens: each step by its definition."""
    config = SelectionConfig(shrinkage_clusters=1, kept_deviation=0.25, **BY_TOKENS)
    rows = evidence.rows.astype(np.float64)
    lengths = np.linalg.norm(rows, axis=1)
    rows *= (lengths.mean() / lengths)[:, None]
    for number in (0, 1):  # a cluster for each dataset
        here = evidence.datasets == number
        mean = np.average(rows[here], axis=0, weights=evidence.labels[here])
        rows[here] = mean + 0.25 * (rows[here] - mean)
    rows *= (evidence.labels / evidence.labels.mean())[:, None]
    np.testing.assert_allclose(summed_rows(config, evidence, 1), rows, rtol=2e-4, atol=1e-4)
    plain = SelectionConfig(shrinkage_clusters=0, normalize_gradients=False)
    np.testing.assert_array_equal(summed_rows(plain, evidence, 1), evidence.rows)


@pytest.mark.parametrize("flags", [
    {}, BY_TOKENS, {"normalize_gradients": False}, {"shrinkage_clusters": 0}], ids=str)
def test_scores_are_inner_products_with_treated_rows(evidence, flags):
    config = SelectionConfig(**flags)
    targets = np.random.default_rng(1).standard_normal((2, SIZE))
    expected = targets @ summed_rows(config, evidence, 1).T
    np.testing.assert_allclose(treated_scores(config, evidence, targets, 1), expected,
                               rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", [
    name for name, objective in OBJECTIVES.items() if not objective.treats_sketches])
def test_flat_parts_are_not_treated(evidence, name):
    np.testing.assert_array_equal(
        summed_rows(SelectionConfig(objective=name), evidence, 1),
        flat_rows(evidence.rows, evidence.directions, "complement"))


def test_a_row_of_zeros_stays_one_and_harms_no_other(evidence):
    rows = evidence.rows * 1e3
    rows[7] = 0.0
    with_zeros = dataclasses.replace(evidence, rows=rows)
    found = summed_rows(SelectionConfig(shrinkage_clusters=0, **BY_TOKENS), with_zeros, 1)
    assert not found[7].any()
    kept = np.arange(240) != 7
    weights = (evidence.labels / evidence.labels.mean())[kept]
    lengths = np.linalg.norm(rows, axis=1).mean() * weights
    np.testing.assert_allclose(np.linalg.norm(found[kept], axis=1), lengths, rtol=1e-5)
    assert np.isfinite(summed_rows(SelectionConfig(**BY_TOKENS), with_zeros, 1)).all()


def test_a_gradient_that_has_exploded_leaves_the_lengths_of_others(evidence):
    """Without one, the typical length is the mean itself, to the last bit."""
    assert typical_length(evidence) == row_lengths(evidence.rows).mean()
    config, others = SelectionConfig(shrinkage_clusters=0), np.arange(240) != 7
    plain = summed_rows(config, evidence, 1)
    rows, valid_rows = evidence.rows.copy(), evidence.valid_rows.copy()
    rows[7] *= 1e6
    exploded = dataclasses.replace(evidence, rows=rows)
    # It counts 10 medians, of 240 lengths about the median.
    np.testing.assert_allclose(summed_rows(config, exploded, 1)[others], plain[others], rtol=0.05)
    meeting = ThreadRanks(2)
    shares = uneven_shares(240, 2, np.random.default_rng(0))
    spread = meeting.run(lambda rank: typical_length(dataclasses.replace(
        exploded, rows=rows[shares[rank]], ids=shares[rank],
        all_reduce_sum=lambda array: meeting.all_reduce_sum(rank, array))))
    assert spread == pytest.approx([typical_length(exploded)] * 2, rel=1e-12)
    valid_rows[0] *= 1e6
    weights = np.full(9, 1 / 9)
    target = mean_gradient(evidence.valid_rows, weights, unit=True)
    grown = np.linalg.norm(mean_gradient(valid_rows, weights, unit=True)) / np.linalg.norm(target)
    assert grown < 2.5  # one of 9 lengths counts 10 medians: (8 + 10) / 9 of what it was


def test_the_evidence_is_left_as_it_was(evidence):
    before = evidence.rows.copy()
    summed_rows(SelectionConfig(), evidence, 1)
    np.testing.assert_array_equal(evidence.rows, before)


def test_memory_beside_the_rows_is_two_copies():
    """The scaled rows and, within one pool, those that are clustered."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((40_000, 128)).astype(np.float32)
    evidence = Evidence(rows, np.full(40_000, 9), np.zeros(40_000, np.int64), 1,
                        np.arange(40_000), rows[:8],
                        Directions(np.ones(1), np.eye(1, 128), 1))
    tracemalloc.start()
    try:
        stiff_costs(rows, evidence.directions)
        of_costs = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        summed_rows(SelectionConfig(shrinkage_clusters=3), evidence, 1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Blocks of 512 rows in float64, some at once, and vectors of the samples come on top.
    blocks_and_vectors = 6 * 512 * 128 * 8 + 20 * 40_000 * 8
    assert peak < 2 * rows.nbytes + blocks_and_vectors
    assert of_costs < blocks_and_vectors


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_spread_rows_are_selected_as_gathered_ones(evidence, objective, ranks):
    config = SelectionConfig(objective=objective, shrinkage_clusters=3)
    groups, quotas = np.array(["a", "b"])[evidence.datasets], {"a": (0, 20), "b": (20, 50)}
    whole, costs = select_by_sketches(config, evidence, 50, seed=2, groups=groups, quotas=quotas)
    meeting = ThreadRanks(ranks)
    shares = uneven_shares(240, ranks, np.random.default_rng(ranks))

    def work(rank):
        here = shares[rank]
        part = dataclasses.replace(
            evidence, rows=evidence.rows[here], labels=evidence.labels[here],
            datasets=evidence.datasets[here], ids=here,
            all_reduce_sum=lambda array: meeting.all_reduce_sum(rank, array))
        return select_by_sketches(config, part, 50, seed=2, groups=groups[here], quotas=quotas)

    for found, costs_there in meeting.run(work):
        np.testing.assert_array_equal(found.indices, whole.indices)
        assert costs_there.least == pytest.approx(costs.least, rel=1e-5)
        assert costs_there.average == pytest.approx(costs.average, rel=1e-5)


def test_a_kept_deviation_above_one_is_refused():
    with pytest.raises(UserError, match="--kept-deviation is 1.5: it must be at least 0"):
        SelectionConfig(kept_deviation=1.5)
