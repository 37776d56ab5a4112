"""Weights of the validation samples such that no group of them is left behind.

In contrast a sample is scored by the validation gradient's excess over the pool's, and a mean over
the validation set goes to whatever part of it has the steepest slope: a linear score leaves out the
texts of all others. So groups v of validation samples, clusters within a dataset, bargain (Nash
1950; proportional fairness). With e_v a group's mean excess, m the pool's mean row, and p_v its
share of the validation set,

    maximise  sum_v p_v log a_v(w)   over  0 <= w <= M, sum w = K,   a_v(w) = <e_v, F w / K - m>,

a_v being what a selection is predicted to gain for the group over the pool as it is. At the maximum
w also maximises sum_v omega_v a_v(w), omega_v = p_v / a_v: the problem without bargaining whose
target is the mean of the e_v with weights omega_v. A group that gains little weighs more, whatever
its slopes; where all gain alike, the weights are the shares.

Found by the method of Frank and Wolfe, each step of which sorts the samples once. Below a small
part of what a group could gain at most, the logarithm goes on as its tangent, for groups that no
selection helps at once.

Shapes: N candidates, n of them on this rank, M validation samples, V groups, k coordinates.
"""

from __future__ import annotations

import numpy as np

from megatron_direct.selection.config import SelectionConfig
from megatron_direct.selection.evidence import Evidence, excess_gradient
from megatron_direct.selection.rows import row_blocks
from megatron_direct.selection.share import Share
from megatron_direct.selection.shrinkage import Partition, find_clusters

_STEPS = 100
# Of the most that a group could gain: where the logarithm becomes its tangent.
_LEAST = 0.05


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
    return (found / sizes)[numbers]


def valid_groups(evidence: Evidence, count: int, seed: int) -> np.ndarray:
    """[M] the group of each validation sample: about ``count`` clusters, within its datasets."""
    parts = np.unique(evidence.datasets_of_valid, return_inverse=True)[1]
    found = find_clusters(evidence.valid_rows, Partition(parts, int(parts.max()) + 1), count,
                          Share.of_rank(len(parts)), seed)
    return np.unique(found.numbers, return_inverse=True)[1]


def group_weights(scores: np.ndarray, shares: np.ndarray, num_select: int, max_count: int,
                  ) -> np.ndarray:
    """[V] weights omega that sum to 1. scores: [V, N] of each sample in each group; shares: [V] p.
    """
    means = scores.mean(1)
    if num_select == max_count * scores.shape[1]:
        return shares
    most = np.array([of_group @ _best(of_group, num_select, max_count) for of_group in scores])
    most -= means
    if not (most > 0).all():  # a group in which all samples are alike gains nothing
        return shares

    def omega(gains: np.ndarray) -> np.ndarray:
        return shares / np.maximum(gains, _LEAST * most)

    selected = _best(omega(most) @ scores, num_select, max_count)
    for step in range(_STEPS):
        towards = _best(omega(scores @ selected - means) @ scores, num_select, max_count)
        selected += 2 / (step + 3) * (towards - selected)
    found = omega(scores @ selected - means)
    return found / found.sum()


def _best(of_sample: np.ndarray, num_select: int, max_count: int) -> np.ndarray:
    """[N] w / K of the K samples of the greatest value [N], each up to max_count times."""
    whole, rest = divmod(num_select, max_count)
    order = np.argpartition(-of_sample, whole)  # the last of the K is in its place
    found = np.zeros(len(of_sample))
    found[order[:whole]] = max_count
    found[order[whole]] = rest
    return found / num_select
