"""Sketches shrunk towards the means of their clusters.

A single sample's gradient is mostly noise: what its very tokens happen to ask for at these weights.
What it has in common with samples like it lasts longer and carries over to other text. So each
sketch g_i gives way to

    mu_c + kept (g_i - mu_c),

mu_c being the mean of its cluster c, weighted by tokens. Clusters are found by spherical k-means on
the sketches, within each dataset (shapes: n of N samples on this rank, k coordinates).
This is the estimator of James and Stein with a given strength.

Samples may be spread over ranks: every sum over samples goes through the rank's share of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_direct.selection.rows import row_blocks, row_lengths
from megatron_direct.selection.share import STRETCH, Share

_KMEANS_ROUNDS = 30


@dataclass(frozen=True, eq=False)
class Partition:
    """Samples parted into clusters, or into datasets.

    numbers: [n] the part of each sample of this rank, below ``count``, the same on every rank.
    """

    numbers: np.ndarray
    count: int

    def sums(self, rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """[count, k] float64 sums over this rank's rows [n, k] of each part, weighted by [n].

        As a product of each block of rows with a one-hot matrix, which is many times faster than
        numpy.add.at (benchmarks/solver/bench.py clusters).
        """
        sums = np.zeros((self.count, rows.shape[1]))
        for block in row_blocks(len(rows)):
            present, of_row = np.unique(self.numbers[block], return_inverse=True)
            one_hot = np.arange(len(present))[:, None] == of_row
            sums[present] += (one_hot * weights[block]) @ rows[block].astype(np.float64)
        return sums

    def totals(self, weights: np.ndarray) -> np.ndarray:
        """[count] sums of weights [n] over this rank's samples of each part."""
        return np.bincount(self.numbers, weights, minlength=self.count)


def shrink(
    rows: np.ndarray, weights: np.ndarray, clusters: Partition, kept: float, share: Share
) -> None:
    """Shrinks float32 rows [n, k] in place. weights: [n] of the samples in their cluster's mean."""
    sums = share.summed(clusters.sums(rows, weights))
    totals = share.summed(clusters.totals(weights))
    means = sums / np.maximum(totals[:, None], np.finfo(np.float64).tiny)
    for block in row_blocks(len(rows)):
        mean = means[clusters.numbers[block]]
        rows[block] = mean + kept * (rows[block] - mean)


def find_clusters(
    rows: np.ndarray, datasets: Partition, num_clusters: int, share: Share, seed: int
) -> Partition:
    """About ``num_clusters`` clusters of the rows [n, k], none of them empty, each within one
    dataset, which has as many as its size makes fair, and at least one.

    The same whatever ranks hold the rows.
    """
    sizes = share.summed(datasets.totals(np.ones(len(rows))))
    numbers, first = np.zeros(len(rows), dtype=np.int64), 0
    for number, size in enumerate(sizes):
        if size == 0:
            continue
        count = int(min(size, max(1, round(num_clusters * size / share.num_samples))))
        here = datasets.numbers == number
        rng = np.random.default_rng([seed, number])
        numbers[here] = first + _kmeans(rows[here], count, share.of(here), rng).numbers
        first += count
    # Where fewer rows differ than clusters are asked for, some have none.
    held = share.summed(Partition(numbers, first).totals(np.ones(len(rows)))) > 0
    return Partition((np.cumsum(held) - 1)[numbers], int(held.sum()))


def _kmeans(unit: np.ndarray, count: int, share: Share, rng: np.random.Generator) -> Partition:
    """By spherical k-means (Dhillon and Modha 2001), begun as k-means++ begins.

    unit: [n, k] rows, which are brought to length 1 in place.
    """
    if count == 1:
        return Partition(np.zeros(len(unit), dtype=np.int64), 1)
    lengths = row_lengths(unit)
    for block in row_blocks(len(unit)):
        unit[block] /= np.where(lengths[block] > 0, lengths[block], 1.0)[:, None]
    centers = _drawn(unit, (lengths > 0).astype(np.float64), share, rng)[None]
    while len(centers) < count:
        far = np.clip(1.0 - _nearest(unit, centers)[1], 0.0, None)
        centers = np.concatenate([centers, _drawn(unit, far, share, rng)[None]])
    clusters = Partition(_nearest(unit, centers)[0], count)
    for _ in range(_KMEANS_ROUNDS - 1):
        sums = share.summed(clusters.sums(unit, np.ones(len(unit))))
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        centers = np.where(norms > 0, sums / np.where(norms > 0, norms, 1.0), centers)
        before, clusters = clusters, Partition(_nearest(unit, centers)[0], count)
        moved = float((clusters.numbers != before.numbers).sum())
        if share.summed(np.array([moved]))[0] == 0:
            break
    return clusters


def _drawn(
    unit: np.ndarray, weights: np.ndarray, share: Share, rng: np.random.Generator
) -> np.ndarray:
    """[k] a row of all ranks', drawn with probabilities proportional to weights [n]."""
    # First the stretch of samples, then the sample in it: no rank needs the weights of all.
    ends = np.cumsum(share.sums_of_stretches(weights))
    level = rng.random() * ends[-1]
    stretch = min(int(np.searchsorted(ends, level, side="right")), len(ends) - 1)
    inside = np.cumsum(share.stretch_of(weights, stretch))
    left = level - (ends[stretch - 1] if stretch else 0.0)
    # Rounding of the sums may leave a little more than there is.
    place = min(int(np.searchsorted(inside, left, side="right")),
                int(np.searchsorted(inside, inside[-1])))
    chosen = stretch * STRETCH + place
    return share.summed(unit[share.ids == chosen].sum(0, dtype=np.float64))


def _nearest(unit: np.ndarray, centers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[n] number of the center of greatest inner product, and [n] that product."""
    nearest, product = np.zeros(len(unit), dtype=np.int64), np.zeros(len(unit))
    for block in row_blocks(len(unit)):
        products = unit[block].astype(np.float64) @ centers.T
        nearest[block], product[block] = products.argmax(1), products.max(1)
    return nearest, product
