"""Sketches shrunk towards the means of their clusters.

A single sample's gradient is mostly noise: what its very tokens happen to ask for at these weights.
What it has in common with samples like it lasts longer and carries over to other text. So each
sketch g_i gives way to

    mu_c + kept (g_i - mu_c),

mu_c being the mean of its cluster c, weighted by tokens. Clusters are found by spherical k-means on
the sketches, within each dataset (shapes: n of N samples on this rank, k coordinates). This is the
estimator of James and Stein with a given strength.

Samples may be spread over ranks: every sum over samples goes through ``all_reduce_sum``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

Reduce = Callable[[np.ndarray], np.ndarray]

_BLOCK = 4096
_KMEANS_ROUNDS = 30


def blocks(count: int) -> Iterator[slice]:
    """Rows that are worked on at once, so that no copy of all of them in float64 is made."""
    return (slice(start, start + _BLOCK) for start in range(0, count, _BLOCK))


def shrink(rows: np.ndarray, weights: np.ndarray, clusters: np.ndarray, num_clusters: int,
           kept: float, all_reduce_sum: Reduce) -> None:
    """Shrinks float32 rows [n, k] in place. weights: [n] of the samples in their cluster's mean."""
    sums = np.zeros((num_clusters, rows.shape[1] + 1))
    for block in blocks(len(rows)):
        present, of_row = np.unique(clusters[block], return_inverse=True)
        shares = np.where(np.arange(len(present))[:, None] == of_row, weights[block], 0.0)
        sums[present, :-1] += shares @ rows[block].astype(np.float64)
        sums[present, -1] += shares.sum(1)
    sums = all_reduce_sum(sums)
    means = sums[:, :-1] / np.maximum(sums[:, -1:], np.finfo(np.float64).tiny)
    for block in blocks(len(rows)):
        mean = means[clusters[block]]
        rows[block] = mean + kept * (rows[block] - mean)


def find_clusters(rows: np.ndarray, datasets: np.ndarray, num_datasets: int, num_clusters: int,
                  ids: np.ndarray, all_reduce_sum: Reduce, seed: int) -> tuple[np.ndarray, int]:
    """([n] numbers of clusters, each within one dataset, and how many there are).

    The same whatever ranks hold the rows.
    """
    sizes = all_reduce_sum(np.bincount(datasets, minlength=num_datasets).astype(np.float64))
    total, clusters, first = int(sizes.sum()), np.zeros(len(rows), dtype=np.int64), 0
    for number, size in enumerate(sizes):
        if size == 0:
            continue
        count = int(min(size, max(1, round(num_clusters * size / total))))
        here = datasets == number
        clusters[here] = first + _kmeans(rows[here], count, ids[here], total, all_reduce_sum,
                                         np.random.default_rng([seed, number]))
        first += count
    return clusters, first


def _kmeans(unit: np.ndarray, count: int, ids: np.ndarray, total: int, all_reduce_sum: Reduce,
            rng: np.random.Generator) -> np.ndarray:
    """[n] by spherical k-means (Dhillon and Modha 2001), begun as k-means++ begins.

    unit: [n, k] rows, which are brought to length 1 in place.
    """
    if count == 1:
        return np.zeros(len(unit), dtype=np.int64)
    lengths = np.sqrt(np.einsum("nk,nk->n", unit, unit, dtype=np.float64))
    for block in blocks(len(unit)):
        unit[block] /= np.where(lengths[block] > 0, lengths[block], 1.0)[:, None]

    def drawn(weights: np.ndarray) -> np.ndarray:
        """[k] a row, drawn with probabilities proportional to weights [n]."""
        whole = np.zeros(total)
        whole[ids] = weights
        whole = all_reduce_sum(whole)
        chosen = int(np.searchsorted(np.cumsum(whole), rng.random() * whole.sum(), side="right"))
        return all_reduce_sum(unit[ids == chosen].sum(0, dtype=np.float64))

    centers = drawn((lengths > 0).astype(np.float64))[None]
    while len(centers) < count:
        far = np.clip(1.0 - _nearest(unit, centers)[1], 0.0, None)
        centers = np.concatenate([centers, drawn(far)[None]])
    clusters = None
    for _ in range(_KMEANS_ROUNDS):
        nearest = _nearest(unit, centers)[0]
        moved = 1.0 if clusters is None else float((nearest != clusters).sum())
        clusters = nearest
        if all_reduce_sum(np.array([moved]))[0] == 0:
            break
        sums = np.zeros_like(centers)
        np.add.at(sums, clusters, unit)
        sums = all_reduce_sum(sums)
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        centers = np.where(norms > 0, sums / np.where(norms > 0, norms, 1.0), centers)
    return clusters


def _nearest(unit: np.ndarray, centers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[n] number of the center of greatest inner product, and [n] that product."""
    nearest, product = np.zeros(len(unit), dtype=np.int64), np.zeros(len(unit))
    for block in blocks(len(unit)):
        products = unit[block].astype(np.float64) @ centers.T
        nearest[block], product[block] = products.argmax(1), products.max(1)
    return nearest, product
