"""What samples are worth to the validation loss, each score judged by what it has not seen.

The alignment of sample i with the validation set is the inner product of its unit gradient with the
mean of the validation set's unit gradients. A score found from such alignments flatters itself: it
fits the noise of the validation samples, of the sketch's hash, and of the sample's own gradient.
So it is cross-fitted. The validation set is divided, by source where sources are known (halves.py),
into halves A and B, and the coordinates of the sketch into halves 1 and 2, which hold the
gradient's entries in different parts of the model, hashed apart, but for what collides along a
layer's longer axis (docs/sketching.md). A score from (A, 1) is judged by
the alignment in (B, 2), and so on for the four pairs that share neither. What repeats in the other
half is worth something; noise does not repeat, wherever it comes from.

With --contrast it is also asked of the *excess* alignment, <g_i, g_val - g_pool>, g_pool being the
mean unit gradient of the pool, whether it repeats: where validation set and pool are alike, the
excess is noise, and there is nothing to choose by.

A score is shrunk before it is used (empirical Bayes): with x_i the alignment in one half, x_c the
mean of its cluster c and x the mean of all,

    worth_i = x + between (x_c - x) + within (x_i - x_c),

between and within being the slopes of the regression of the other half's alignments on x, among
clusters and within them: the shares of the spread that repeat. Two halves together are more
reliable than one (Spearman and Brown): 2 r / (1 + r) in the place of r.

It says how many samples to select (how_many.py), and what groups of them are worth
(group_worth.py).

Shapes: N samples, B blocks of the validation set, k coordinates; "weights" [N] are tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import scipy.special

from megatron_direct.selection.config import SelectionConfig
from megatron_direct.selection.evidence import Evidence, mean_row
from megatron_direct.selection.halves import first_coordinates, source_blocks
from megatron_direct.selection.rows import row_blocks, unit_rows


@dataclass(frozen=True, eq=False)
class Alignments:
    """values: [2, B, N] float32, twice the inner product, over one half of the coordinates, of each
    sample's unit sketch with the mean unit sketch of a block; sizes: [B] validation samples of each
    block; less: [2, N] what is taken off them all, by half of the coordinates, if anything is."""

    values: np.ndarray
    sizes: np.ndarray
    less: np.ndarray | None = None

    def side(self, part: int, first: int) -> Side:
        """One half of the coordinates, and every other block from the first or from the second."""
        return Side(self.values[part, first::2], self.sizes[first::2],
                    None if self.less is None else self.less[part])

    def in_excess_of(self, others: np.ndarray) -> Alignments:
        """Less those with something else, [2, N] by half of the coordinates."""
        return Alignments(self.values, self.sizes, others)


@dataclass(frozen=True, eq=False)
class Side:
    """One of the four quarters of alignments, without a copy of them. values: [B', N]; sizes: [B'];
    less: [N] what is taken off, if anything is."""

    values: np.ndarray
    sizes: np.ndarray
    less: np.ndarray | None

    def mean(self) -> np.ndarray:
        """[N] over the blocks."""
        found = np.zeros(self.values.shape[1])
        for share, of_block in zip(self.sizes / self.sizes.sum(), self.values, strict=True):
            found += share * of_block
        return found if self.less is None else found - self.less

    def by_block(self, chosen: np.ndarray) -> Iterator[np.ndarray]:
        """Of each block [.] those of the chosen samples [.]."""
        less = 0.0 if self.less is None else self.less[chosen]
        for of_block in self.values:
            yield of_block[chosen] - less


def cluster_numbers(config: SelectionConfig, evidence: Evidence, seed: int) -> np.ndarray:
    """[N] the cluster of each candidate, the same on every rank; all ranks call this."""
    # Without shrinkage each pool is one cluster.
    found = evidence.clusters(max(1, config.shrinkage_clusters), seed)
    return evidence.share().known_to_all(found.numbers).astype(np.int64)


def measure_alignments(evidence: Evidence, seed: int) -> Alignments:
    """Of the rows of all ranks, the same on every rank; all ranks call this."""
    return evidence.once(("alignments", seed), lambda: _measure(evidence, seed))


def _measure(evidence: Evidence, seed: int) -> Alignments:
    valid, blocks = unit_rows(evidence.valid_rows), source_blocks(evidence)
    means = np.stack([valid[blocks == block].mean(0) for block in range(blocks.max() + 1)])
    return Alignments(_aligned(evidence, means, seed), np.bincount(blocks).astype(np.float64))


def alignments_with_pool(evidence: Evidence, seed: int) -> np.ndarray:
    """[2, N] as :class:`Alignments`, with the mean unit sketch of the pool; all ranks call this."""
    return _aligned(evidence, mean_row(evidence, unit=True)[None], seed)[:, 0]


def _aligned(evidence: Evidence, means: np.ndarray, seed: int) -> np.ndarray:
    """[2, m, N] float32 with each of means [m, k], by half of the coordinates, on every rank."""
    rows, share = evidence.rows, evidence.share()
    in_first = first_coordinates(rows.shape[1], seed)
    local = np.empty((2, len(means), len(rows)), dtype=np.float32)
    for block in row_blocks(len(rows)):
        unit = unit_rows(rows[block])
        for part, coordinates in enumerate((in_first, ~in_first)):
            local[part, :, block] = 2 * means[:, coordinates] @ unit[:, coordinates].T
    if share.all_reduce_sum is None:
        return local
    whole = np.empty((2, len(means), share.num_samples), dtype=np.float32)
    for part in range(2):
        for number in range(len(means)):  # no more than one of them in float64
            whole[part, number] = share.known_to_all(local[part, number])
    return whole


@dataclass(frozen=True)
class Reliability:
    """Of half of the evidence: the share of the spread of alignments that repeats in the other,
    among clusters and within them."""

    between: float
    within: float

    def of_both_halves(self) -> Reliability:
        return Reliability(*(2 * r / (1 + r) for r in (self.between, self.within)))


@dataclass(frozen=True, eq=False)
class Fold:
    """score: [N] by which samples are chosen, from one half of the evidence, shrunk; judge: the
    alignments with each block of the other half; blocks: [B'] the numbers of these."""

    score: np.ndarray
    judge: Side
    blocks: np.ndarray


@dataclass(frozen=True, eq=False)
class Worth:
    """values: [N] by all evidence, shrunk; folds: what judges it; sizes: [B] validation samples of
    each block; reliability: of half of the evidence; weights: [N] tokens; clusters: [N] numbers."""

    values: np.ndarray
    folds: tuple[Fold, ...]
    sizes: np.ndarray
    reliability: Reliability
    weights: np.ndarray
    clusters: np.ndarray


def estimate_worth(alignments: Alignments, clusters: np.ndarray, weights: np.ndarray) -> Worth:
    """clusters: [N] numbers; weights: [N] tokens."""
    # (half of the coordinates, half of the blocks) that a score is found from; the others judge it.
    seen = [(part, first) for part in (0, 1) for first in (0, 1)]
    judges = [alignments.side(1 - part, 1 - first) for part, first in seen]
    scores = [alignments.side(part, first).mean() for part, first in seen]
    found = [_reliability(x, judge.mean(), clusters, weights)
             for x, judge in zip(scores, judges, strict=True)]
    reliability = Reliability(float(np.mean([r.between for r in found])),
                              float(np.mean([r.within for r in found])))
    blocks = np.arange(len(alignments.sizes))
    folds = tuple(
        Fold(_shrunk(score, clusters, weights, reliability), judge, blocks[1 - first::2])
        for score, judge, (_, first) in zip(scores, judges, seen, strict=True))
    values = _shrunk(np.mean(scores, axis=0), clusters, weights, reliability.of_both_halves())
    return Worth(values, folds, alignments.sizes, reliability, weights, clusters)


def cross_fitted(worth: Worth, judge: Callable[[Fold], np.ndarray]) -> np.ndarray:
    """[C, B] of C choices, which ``judge`` makes by a fold's worth and judges by its blocks
    ([C, B']): the mean over the folds that have a block."""
    found = [judge(fold) for fold in worth.folds]
    sums, judges = np.zeros((len(found[0]), len(worth.sizes))), np.zeros(len(worth.sizes))
    for fold, means in zip(worth.folds, found, strict=True):
        sums[:, fold.blocks] += means
        judges[fold.blocks] += 1
    return sums / judges


@dataclass(frozen=True)
class BlockMean:
    """A mean over blocks, what their scatter says of its variance, and the degrees of freedom of
    that."""

    value: float
    variance: float
    degrees: float

    def margin(self, confidence: float, noise: float = 0.0) -> float:
        """Half of the width of Student's interval; noise: variance beside the scatter."""
        width = scipy.special.stdtrit(self.degrees, (1 + confidence) / 2)
        return float(width * np.sqrt(self.variance + noise))


def mean_over_blocks(by_block: np.ndarray, sizes: np.ndarray) -> BlockMean:
    """Of values [B], weighted by the validation samples of each block.

    What samples of a source have in common does not average out, so a large block may vary as much
    as a small one. With p the blocks' shares and q the sum of their squares, the mean then varies
    q times as much as a block, and (x_b - mean)^2 is 1 - 2 p_b + q of a block's variance on
    average. Where a large block varies less than a small one, the variance comes out too great.
    1 / q is the effective number of blocks (Kish).
    """
    shares = sizes / sizes.sum()
    value = float(by_block @ shares)
    if len(shares) == 1:
        return BlockMean(value, 0.0, 1.0)
    squares = float(shares @ shares)
    variance = (by_block - value) ** 2 @ (shares**2 / (1 - 2 * shares + squares))
    return BlockMean(value, float(variance), max(1 / squares - 1, 1.0))


def _parts(x: np.ndarray, clusters: np.ndarray, weights: np.ndarray,
           ) -> tuple[float, np.ndarray, np.ndarray]:
    """(mean of all, [N] cluster's deviation from it, [N] sample's deviation from its cluster)."""
    totals = np.bincount(clusters, weights)
    means = np.bincount(clusters, weights * x) / np.where(totals > 0, totals, 1.0)
    mean = float(weights @ x / weights.sum())
    return mean, means[clusters] - mean, x - means[clusters]


def _reliability(x: np.ndarray, y: np.ndarray, clusters: np.ndarray, weights: np.ndarray,
                 ) -> Reliability:
    """Slopes of y on x; one that is below 0 by chance counts as 0, one above 1 as 1."""
    slopes = []
    for ours, theirs in zip(_parts(x, clusters, weights)[1:], _parts(y, clusters, weights)[1:],
                            strict=True):
        spread = weights @ ours**2
        slopes.append(float(np.clip(weights @ (ours * theirs) / spread, 0, 1)) if spread else 0.0)
    return Reliability(*slopes)


def _shrunk(x: np.ndarray, clusters: np.ndarray, weights: np.ndarray, kept: Reliability,
            ) -> np.ndarray:
    mean, of_cluster, of_sample = _parts(x, clusters, weights)
    return mean + kept.between * of_cluster + kept.within * of_sample
