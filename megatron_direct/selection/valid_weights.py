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

Found by the method of Frank and Wolfe, each step of which sorts the samples once; w keeps quotas,
and no budget. Below a small part of what a group could gain at most, the logarithm goes on as its
tangent, for groups that no selection helps at once.

Gradients are not all that is known: how like a group's texts a sample's is, by its n-grams
(ngram_likeness.py), is told without a model, and errs otherwise than a gradient does. A group's
score of a sample is the inner product above and beside it the likeness, brought to --text-weight
times the spread of the inner products over the pool.

Shapes: N candidates, n of them on this rank, M validation samples, V groups, k coordinates.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_direct.selection.config import SelectionConfig
from megatron_direct.selection.evidence import Evidence, excess_gradient
from megatron_direct.selection.feasible import FeasibleSet
from megatron_direct.selection.quotas import Quotas, StatedQuotas
from megatron_direct.selection.share import Share
from megatron_direct.selection.shrinkage import Partition, find_clusters
from megatron_direct.selection.treated_rows import treated_scores

_STEPS = 100
# Of the most that a group could gain: where the logarithm becomes its tangent.
_LEAST = 0.05


@dataclass(frozen=True, eq=False)
class Bargain:
    """weights: [M] of the validation samples in the objective's target, which sum to 1; likeness:
    [n] what texts add to each sample's inner product with it, None where they do not count."""

    weights: np.ndarray
    likeness: np.ndarray | None = None


def has_texts(config: SelectionConfig, evidence: Evidence) -> bool:
    """Whether texts count."""
    return config.counts_texts and evidence.texts is not None


def bargain(config: SelectionConfig, evidence: Evidence, num_select: int, seed: int,
            quotas: StatedQuotas | None = None) -> Bargain:
    """All ranks call this."""
    if quotas is not None:
        return _bargain(config, evidence, num_select, seed, quotas)
    return evidence.once(("bargain", config, num_select, seed), lambda: _bargain(
        config, evidence, num_select, seed, None))


def excess_scores(config: SelectionConfig, evidence: Evidence, num_select: int, seed: int,
                  ) -> np.ndarray:
    """[N] of each sample by gradients alone, on every rank: the inner product of its treated row
    with the excess that the objective takes for its target; all ranks call this."""
    weights = bargain(config, evidence, num_select, seed).weights
    target = excess_gradient(evidence, weights, unit=config.normalize_gradients)
    return evidence.share().known_to_all(treated_scores(config, evidence, target[None], seed)[0])


def _bargain(config: SelectionConfig, evidence: Evidence, num_select: int, seed: int,
             quotas: StatedQuotas | None) -> Bargain:
    count, with_texts = len(evidence.valid_rows), has_texts(config, evidence)
    in_groups = config.is_in_contrast and config.valid_clusters > 0
    if not (in_groups or with_texts):
        return Bargain(np.full(count, 1 / count))
    numbers = valid_groups(evidence, config.valid_clusters, seed) if in_groups else np.zeros(
        count, dtype=np.int64)
    sizes = np.bincount(numbers)
    targets = np.stack([
        excess_gradient(evidence, (numbers == group) / size, unit=config.normalize_gradients)
        for group, size in enumerate(sizes)])
    scores = treated_scores(config, evidence, targets, seed)
    likeness = _likeness(config, evidence, numbers, scores) if with_texts else None

    def settled(whole: np.ndarray) -> np.ndarray:
        best = functools.partial(best_mean, num_select=num_select, max_count=config.max_count)
        within = best if quotas is None else functools.partial(
            _best_within, num_select=num_select, max_count=config.max_count,
            quotas=quotas.of_selections(num_select, config.max_count))
        return group_weights(whole, sizes / count, best, within)

    found = evidence.share().from_leader(settled, scores if likeness is None else scores + likeness)
    return Bargain((found / sizes)[numbers], None if likeness is None else found @ likeness)


def _likeness(config: SelectionConfig, evidence: Evidence, numbers: np.ndarray,
              scores: np.ndarray) -> np.ndarray:
    """[V, n] of the texts to those of each group, with a mean of 0 and a spread in proportion to
    that of the scores [V, n] by gradients."""
    assert evidence.texts is not None
    found, share = evidence.texts.likeness(numbers, evidence.all_reduce_sum), evidence.share()
    mean, spread = _mean_and_spread(found, share)
    factors = np.divide(config.text_weight * _mean_and_spread(scores, share)[1], spread,
                        out=np.zeros_like(spread), where=spread > 0)
    return factors[:, None] * (found - mean[:, None])


def _mean_and_spread(values: np.ndarray, share: Share) -> tuple[np.ndarray, np.ndarray]:
    """[V] each, of values [V, n] of all ranks."""
    mean = share.summed(values.sum(1)) / share.num_samples
    return mean, np.sqrt(share.summed(((values - mean[:, None])**2).sum(1)) / share.num_samples)


def valid_groups(evidence: Evidence, count: int, seed: int) -> np.ndarray:
    """[M] the group of each validation sample: about ``count`` clusters, within its datasets."""
    parts = np.unique(evidence.datasets_of_valid, return_inverse=True)[1]
    found = find_clusters(evidence.valid_rows, Partition(parts, int(parts.max()) + 1), count,
                          Share.of_rank(len(parts)), seed)
    return np.unique(found.numbers, return_inverse=True)[1]


# From values [N] to w / K [N] of the selection of the greatest sum.
Best = Callable[[np.ndarray], np.ndarray]


def group_weights(scores: np.ndarray, shares: np.ndarray, best: Best, within: Best) -> np.ndarray:
    """[V] weights omega that sum to 1. scores: [V, N] of each sample in each group; shares: [V] p;
    best: of all selections; within: of those that keep the quotas."""
    means = scores.mean(1)
    if len(shares) == 1:
        return shares
    most = np.array([of_group @ best(of_group) for of_group in scores]) - means
    # A group in which all samples are alike gains nothing, nor does any from the whole pool.
    if not (most > 1e-12 * np.abs(scores).max()).all():
        return shares

    def omega(gains: np.ndarray) -> np.ndarray:
        return shares / np.maximum(gains, _LEAST * most)

    selected = within(omega(most) @ scores)
    for step in range(_STEPS):
        towards = within(omega(scores @ selected - means) @ scores)
        selected += 2 / (step + 3) * (towards - selected)
    found = omega(scores @ selected - means)
    return found / found.sum()


def best_mean(of_sample: np.ndarray, num_select: int, max_count: int) -> np.ndarray:
    """[N] w / K of the K samples of the greatest value [N], each up to max_count times."""
    if num_select == max_count * len(of_sample):
        return np.full(len(of_sample), 1 / len(of_sample))
    whole, rest = divmod(num_select, max_count)
    order = np.argpartition(-of_sample, whole)  # the last of the K is in its place
    found = np.zeros(len(of_sample))
    found[order[:whole]] = max_count
    found[order[whole]] = rest
    return found / num_select


def _best_within(of_sample: np.ndarray, num_select: int, max_count: int, quotas: Quotas,
                 ) -> np.ndarray:
    """As :func:`best_mean`, of selections that keep the quotas."""
    copies = np.tile(of_sample, max_count)
    feasible = FeasibleSet(np.zeros(len(copies)), num_select, math.inf, quotas)
    return feasible.best(copies).reshape(max_count, -1).sum(0) / num_select
