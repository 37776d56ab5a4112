"""Clusters and shrinkage against sums written out, and with rows spread over ranks.

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
from megatron_direct.selection import shrinkage, treatment
from megatron_direct.selection.treatment import Evidence, SelectionConfig

SIZE = 24


def alone(array: np.ndarray) -> np.ndarray:
    return array


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


def test_clusters_are_the_kinds_and_stay_within_a_dataset(evidence):
    found, count = shrinkage.find_clusters(evidence.rows, evidence.datasets, 2, 3, evidence.ids,
                                           alone, seed=1)
    assert count == 3
    first, second = found[evidence.datasets == 0], found[evidence.datasets == 1]
    assert not set(first) & set(second)
    # Samples are in the order of their kinds: one cut divides them.
    assert (np.diff(first) != 0).sum() == 1


def test_a_dataset_has_a_cluster_of_its_own_however_small():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((100, SIZE)).astype(np.float32)
    datasets = np.array([0] * 99 + [1])
    found, count = shrinkage.find_clusters(rows, datasets, 2, 4, np.arange(100), alone, seed=1)
    assert count == 5 and (found == found[-1]).sum() == 1


def test_equal_rows_and_zero_rows_make_no_trouble():
    rows = np.zeros((20, SIZE), np.float32)
    rows[10:] = 1.0
    found, _ = shrinkage.find_clusters(rows, np.zeros(20, np.int64), 1, 4, np.arange(20), alone,
                                       seed=1)
    assert len(set(found[10:])) == 1
    rows[15:, : SIZE // 2] = -1.0  # two directions, and rows of zeros
    found, _ = shrinkage.find_clusters(rows, np.zeros(20, np.int64), 1, 4, np.arange(20), alone,
                                       seed=1)
    assert len(set(found[10:15])) == len(set(found[15:])) == 1 and found[10] != found[15]


def test_shrunk_rows_are_mean_and_share_of_the_deviation():
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((30, SIZE)).astype(np.float32)
    weights, clusters = rng.uniform(1, 9, 30), rng.integers(0, 3, 30)
    found = rows.copy()
    shrinkage.shrink(found, weights, clusters, 4, 0.3, alone)  # the fourth is empty
    for i in range(30):
        like = clusters == clusters[i]
        mean = np.average(rows[like].astype(np.float64), axis=0, weights=weights[like])
        np.testing.assert_allclose(found[i], 0.7 * mean + 0.3 * rows[i], rtol=1e-5, atol=1e-6)


def test_treated_rows_written_out(evidence):
    """One length, shrunk, weighted by tokens: each step by its definition."""
    config = SelectionConfig(shrinkage_clusters=1, kept_deviation=0.25)
    rows = evidence.rows.astype(np.float64)
    lengths = np.linalg.norm(rows, axis=1)
    rows *= (lengths.mean() / lengths)[:, None]
    for number in (0, 1):  # a cluster for each dataset
        here = evidence.datasets == number
        mean = np.average(rows[here], axis=0, weights=evidence.labels[here])
        rows[here] = mean + 0.25 * (rows[here] - mean)
    rows *= (evidence.labels / evidence.labels.mean())[:, None]
    np.testing.assert_allclose(treatment.summed_rows(config, evidence, 1), rows, rtol=2e-4,
                               atol=1e-4)
    plain = SelectionConfig(shrinkage_clusters=0, normalize_gradients=False,
                            weight_by_tokens=False)
    np.testing.assert_array_equal(treatment.summed_rows(plain, evidence, 1), evidence.rows)


def test_a_row_of_zeros_stays_one_and_harms_no_other(evidence):
    rows = evidence.rows * 1e3
    rows[7] = 0.0
    found = treatment.summed_rows(SelectionConfig(shrinkage_clusters=0),
                                 dataclasses.replace(evidence, rows=rows), 1)
    assert not found[7].any()
    kept = np.arange(240) != 7
    weights = (evidence.labels / evidence.labels.mean())[kept]
    lengths = np.linalg.norm(rows, axis=1).mean() * weights
    np.testing.assert_allclose(np.linalg.norm(found[kept], axis=1), lengths, rtol=1e-5)
    shrunk = treatment.summed_rows(SelectionConfig(), dataclasses.replace(evidence, rows=rows), 1)
    assert np.isfinite(shrunk).all()


def test_the_evidence_is_left_as_it_was(evidence):
    before = evidence.rows.copy()
    treatment.summed_rows(SelectionConfig(), evidence, 1)
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
        treatment.summed_rows(SelectionConfig(shrinkage_clusters=3), evidence, 1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Blocks of 4096 rows in float64, some at once, and vectors of the samples come on top.
    assert peak < 2 * rows.nbytes + 6 * 4096 * 128 * 8 + 20 * 40_000 * 8


@pytest.mark.parametrize("ranks", [2, 3])
def test_spread_rows_are_selected_as_gathered_ones(evidence, ranks):
    config = SelectionConfig(shrinkage_clusters=3)
    whole, costs = treatment.solve(config, evidence, 50, seed=2)
    meeting = ThreadRanks(ranks)
    shares = uneven_shares(240, ranks, np.random.default_rng(ranks))

    def work(rank):
        here = shares[rank]
        part = dataclasses.replace(
            evidence, rows=evidence.rows[here], labels=evidence.labels[here],
            datasets=evidence.datasets[here], ids=here,
            all_reduce_sum=lambda array: meeting.all_reduce_sum(rank, array))
        return treatment.solve(config, part, 50, seed=2)

    for found, costs_there in meeting.run(work):
        np.testing.assert_array_equal(found.indices, whole.indices)
        np.testing.assert_allclose(costs_there, costs, rtol=1e-5)


def test_a_share_that_is_none_is_refused():
    with pytest.raises(UserError, match="--kept-deviation 1.5 must lie between 0 and 1"):
        SelectionConfig(kept_deviation=1.5)
