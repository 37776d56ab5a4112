"""Clusters and shrinkage against sums written out."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_direct.selection.share import Share
from megatron_direct.selection.shrinkage import Partition, find_clusters, shrink

SIZE = 24


def test_clusters_are_the_kinds_and_stay_within_a_dataset():
    rng = np.random.default_rng(0)
    kind = np.sort(rng.integers(0, 3, 240))
    rows = 3 * rng.standard_normal((3, SIZE))[kind] + rng.standard_normal((240, SIZE))
    rows = (rows * rng.uniform(0.2, 5, (240, 1))).astype(np.float32)
    datasets = Partition((kind == 2).astype(np.int64), 2)  # two kinds in the first
    found = find_clusters(rows, datasets, 3, Share.of_rank(240), seed=1)
    assert found.count == 3
    first, second = (found.numbers[datasets.numbers == number] for number in (0, 1))
    assert not set(first) & set(second)
    # Samples are in the order of their kinds: one cut divides them.
    assert (np.diff(first) != 0).sum() == 1


def test_a_dataset_has_a_cluster_of_its_own_however_small():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((100, SIZE)).astype(np.float32)
    datasets = Partition(np.array([0] * 99 + [1]), 2)
    found = find_clusters(rows, datasets, 4, Share.of_rank(100), seed=1)
    assert found.count == 5 and (found.numbers == found.numbers[-1]).sum() == 1


def test_equal_rows_and_zero_rows_make_no_trouble():
    one_dataset, share = Partition(np.zeros(20, np.int64), 1), Share.of_rank(20)
    rows = np.zeros((20, SIZE), np.float32)
    rows[10:] = 1.0
    found = find_clusters(rows, one_dataset, 4, share, seed=1).numbers
    assert len(set(found[10:])) == 1
    rows[15:, : SIZE // 2] = -1.0  # two directions, and rows of zeros
    clusters = find_clusters(rows, one_dataset, 4, share, seed=1)
    found = clusters.numbers
    assert len(set(found[10:15])) == len(set(found[15:])) == 1 and found[10] != found[15]
    assert set(found) == set(range(clusters.count)) and clusters.count < 4  # none is empty


@pytest.mark.parametrize("count", [0, 7, 1300])  # blocks are of 512 rows
def test_sums_of_parts_are_those_of_add_at(count):
    rng = np.random.default_rng(count)
    rows = rng.standard_normal((count, SIZE)).astype(np.float32)
    weights = rng.uniform(0, 9, count)
    partition = Partition(rng.choice([0, 1, 2, 4], count), 6)  # the fourth and the last are empty
    sums, totals = np.zeros((6, SIZE)), np.zeros(6)
    np.add.at(sums, partition.numbers, rows * weights[:, None])
    np.add.at(totals, partition.numbers, weights)
    # 1e-12: float64 sums in another order, of terms of a few units.
    np.testing.assert_allclose(partition.sums(rows, weights), sums, rtol=1e-12, atol=1e-10)
    np.testing.assert_allclose(partition.totals(weights), totals, rtol=1e-12)


def test_shrunk_rows_are_mean_and_share_of_the_deviation():
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((30, SIZE)).astype(np.float32)
    weights, clusters = rng.uniform(1, 9, 30), rng.integers(0, 3, 30)
    found = rows.copy()
    shrink(found, weights, Partition(clusters, 4), 0.3, Share.of_rank(30))  # the fourth is empty
    for i in range(30):
        like = clusters == clusters[i]
        mean = np.average(rows[like].astype(np.float64), axis=0, weights=weights[like])
        np.testing.assert_allclose(found[i], 0.7 * mean + 0.3 * rows[i], rtol=1e-5, atol=1e-6)
