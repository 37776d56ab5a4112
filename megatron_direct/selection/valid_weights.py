"""Weights of the validation samples such that no group of them is left behind.

In contrast a sample is scored by the validation gradient's excess over the pool's, and a mean over
the validation set goes to whatever part of it has the steepest slope: a linear score leaves out the
texts of all others. So the selection problem has a constraint for each group v of validation
samples, a cluster within a dataset. With e_v its mean excess, m the pool's mean row, and shares p_v
of the validation set,

    maximise  sum_v p_v a_v(w)   over  0 <= w <= M, sum w = K,   a_v(w) = <e_v, F w / K - m>,
    subject to  a_v(w) >= 0  for each v:

the loss of no group is predicted to end above what the pool as it is would yield (w = K / N, which
is feasible). The multipliers lambda_v of the constraints make of it the problem without them,
whose target is the mean of the e_v with weights p_v + lambda_v: these are the weights. They
minimise the dual, max over w of sum_v (p_v + lambda_v) a_v(w), which is done one multiplier at a
time: each is raised from 0 until its group no longer loses. The constraints are linear and few, and
the dual nearly smooth where K is not tiny.

Shapes: N candidates, n of them on this rank, M validation samples, V groups, k coordinates.
"""

from __future__ import annotations

import numpy as np

from megatron_direct.selection.config import SelectionConfig
from megatron_direct.selection.evidence import Evidence, excess_gradient
from megatron_direct.selection.rows import row_blocks
from megatron_direct.selection.share import Share
from megatron_direct.selection.shrinkage import Partition, find_clusters

# Each takes every multiplier in turn; they end before, where none changes by more than this share.
_SWEEPS, _SETTLED = 20, 1e-3
_BISECTIONS = 16
# Of the largest gain in a group: what is below it counts as zero.
_ROUNDING = 1e-6


def valid_weights(config: SelectionConfig, evidence: Evidence, rows: np.ndarray, num_select: int,
                  seed: int) -> np.ndarray:
    """[M] weights of the validation samples in the objective's target, which sum to 1; all ranks
    call this. rows: [n, k] as the objective sums them up."""
    count = len(evidence.valid_rows)
    if not config.is_in_contrast or not config.valid_clusters:
        return np.full(count, 1 / count)
    numbers = valid_groups(evidence, config.valid_clusters, seed)
    sizes = np.bincount(numbers)
    targets = np.stack([
        excess_gradient(evidence, (numbers == group) / size, unit=config.normalize_gradients)
        for group, size in enumerate(sizes)])
    scores = np.empty((len(targets), len(rows)))
    for block in row_blocks(len(rows)):
        scores[:, block] = targets @ rows[block].T.astype(np.float64)
    found = evidence.share().from_leader(lambda whole: group_weights(
        whole, sizes / count, num_select, config.max_count), scores)
    of_sample = (found / sizes)[numbers]
    return of_sample / of_sample.sum()


def valid_groups(evidence: Evidence, count: int, seed: int) -> np.ndarray:
    """[M] the group of each validation sample: about ``count`` clusters, within its datasets."""
    datasets = evidence.valid_datasets
    if datasets is None:
        datasets = np.zeros(len(evidence.valid_rows), dtype=np.int64)
    parts = np.unique(datasets, return_inverse=True)[1]
    found = find_clusters(evidence.valid_rows, Partition(parts, int(parts.max()) + 1), count,
                          Share.of_rank(len(parts)), seed)
    return np.unique(found.numbers, return_inverse=True)[1]


def group_weights(scores: np.ndarray, shares: np.ndarray, num_select: int, max_count: int,
                  ) -> np.ndarray:
    """[V] p + lambda. scores: [V, N] of each sample in each group; shares: [V] p."""
    means = scores.mean(1)
    least = -_ROUNDING * np.abs(scores - means[:, None]).max(1)

    def gains(weights: np.ndarray) -> np.ndarray:
        return _mean_of_best(weights @ scores, scores, num_select, max_count) - means

    weights = shares.astype(np.float64)
    for _ in range(_SWEEPS):
        before = weights.copy()
        for group in range(len(weights)):
            weights[group] = shares[group]
            if gains(weights)[group] < least[group]:
                weights[group] = _raised(gains, weights, group, least[group])
        if np.allclose(weights, before, rtol=_SETTLED, atol=0):
            break
    return weights


def _raised(gains, weights: np.ndarray, group: int, least: float) -> float:
    """The least weight of a group, above the one that it has, with which it does not lose."""
    low = high = weights[group]
    trial = weights.copy()
    # With all of the weight on it, a group gains at least what the pool as it is would.
    while high < 2.0**60:
        high *= 2
        trial[group] = high
        if gains(trial)[group] >= least:
            break
    for _ in range(_BISECTIONS):
        trial[group] = 0.5 * (low + high)
        low, high = (low, trial[group]) if gains(trial)[group] >= least else (trial[group], high)
    return high


def _mean_of_best(of_sample: np.ndarray, scores: np.ndarray, num_select: int, max_count: int,
                  ) -> np.ndarray:
    """[V] mean scores [V, N] of the K samples of the greatest value [N], each up to max_count
    times."""
    whole, rest = divmod(num_select, max_count)
    if whole >= len(of_sample):
        return scores.mean(1)
    order = np.argpartition(-of_sample, whole)  # the last of the K is in its place
    counts = np.zeros(len(of_sample))
    counts[order[:whole]] = max_count
    counts[order[whole]] = rest
    return scores @ counts / num_select
