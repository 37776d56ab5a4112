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

from collections.abc import Callable

import numpy as np

Reduce = Callable[[np.ndarray], np.ndarray]

_KMEANS_ROUNDS = 30


def shrink(rows: np.ndarray, weights: np.ndarray, clusters: np.ndarray, num_clusters: int,
           kept: float, all_reduce_sum: Reduce) -> np.ndarray:
    """[n, k] float32 shrunk rows. weights: [n] of the samples in their cluster's mean."""
    sums = np.zeros((num_clusters, rows.shape[1] + 1))
    for cluster in np.unique(clusters):
        here = clusters == cluster
        sums[cluster, :-1] = weights[here] @ rows[here]
        sums[cluster, -1] = weights[here].sum()
    sums = all_reduce_sum(sums)
    means = sums[:, :-1] / np.maximum(sums[:, -1:], np.finfo(np.float64).tiny)
    result = np.empty(rows.shape, np.float32)
    for start in range(0, len(rows), 4096):  # in blocks: no copy of all rows in float64
        block = slice(start, start + 4096)
        mean = means[clusters[block]]
        result[block] = mean + kept * (rows[block] - mean)
    return result


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


def _kmeans(rows: np.ndarray, count: int, ids: np.ndarray, total: int, all_reduce_sum: Reduce,
            rng: np.random.Generator) -> np.ndarray:
    """[n] by spherical k-means (Dhillon and Modha 2001), begun as k-means++ begins."""
    if count == 1:
        return np.zeros(len(rows), dtype=np.int64)
    lengths = np.linalg.norm(rows, axis=1)
    unit = rows / np.maximum(lengths, np.finfo(np.float32).tiny)[:, None]

    def drawn(weights: np.ndarray) -> np.ndarray:
        """[k] a row, drawn with probabilities proportional to weights [n]."""
        whole = np.zeros(total)
        whole[ids] = weights
        whole = all_reduce_sum(whole)
        chosen = int(np.searchsorted(np.cumsum(whole), rng.random() * whole.sum(), side="right"))
        return all_reduce_sum(unit[ids == chosen].sum(0, dtype=np.float64))

    centers = drawn((lengths > 0).astype(np.float64))[None]
    while len(centers) < count:
        far = np.clip(1.0 - (unit @ centers.T).max(1, initial=-1.0), 0.0, None)
        centers = np.concatenate([centers, drawn(far)[None]])
    clusters = None
    for _ in range(_KMEANS_ROUNDS):
        nearest = (unit @ centers.T).argmax(1)
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

