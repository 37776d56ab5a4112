"""What sketches tell of the candidates: stiff costs and flat parts.

Inner products of sketches stand for those of gradients (shapes: N candidates, n of them on this
rank, M validation samples, k sketch coordinates, p eigenpairs). With g_i sample i's gradient and
(lambda_j, v_j) the leading eigenpairs of the validation loss's curvature, stiff up to the elbow:

    a_i = sum over stiff j of lambda_j <g_i, v_j>^2      stiff cost
    flat(g_i) = g_i less its part along the stiff v_j    (or its part along the v_j after them)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from megatron_direct.curvature.spectrum import Directions
from megatron_direct.errors import UserError
from megatron_direct.selection.rows import row_blocks, row_lengths, unit_rows
from megatron_direct.selection.share import AllReduceSum, Share
from megatron_direct.selection.shrinkage import Partition, find_clusters

if TYPE_CHECKING:  # it reads samples, for which torch is imported
    from megatron_direct.data.ngram_likeness import Texts

T = TypeVar("T")

# Lengths count up to so many medians in a mean of them. Gradients that have not exploded stay
# below, so that their mean is left as it is; one that has adds at most 10 / N of the median.
_LONGEST = 10.0


@dataclass(frozen=True, eq=False)
class Half:
    """Of evidence: coordinates: [k] bool of the sketches; valid: [M] bool validation samples;
    features: [features] bool of the n-grams of texts."""

    coordinates: np.ndarray
    valid: np.ndarray
    features: np.ndarray


@dataclass(frozen=True)
class Evidence:
    """What is known of the candidates that this rank holds, n of all N.

    rows: [n, k] sketches; labels: [n] tokens that a sample is trained on; datasets: [n] number of
    the pool, below num_datasets; ids: [n] numbers of the candidates, 0..N-1 over all ranks;
    all_reduce_sum: as solve_selection takes it; valid_rows: [M, k] sketches of the validation
    samples, the same on each rank; valid_datasets: [M] ascending numbers of the datasets that they
    are from, None for a single one; valid_sources: [M] numbers of their sources, below 0 where it
    is not known, None where none is; texts: of the candidates and of the validation samples, None
    where tokens are not known.
    """

    rows: np.ndarray
    labels: np.ndarray
    datasets: np.ndarray
    num_datasets: int
    ids: np.ndarray
    valid_rows: np.ndarray
    directions: Directions
    all_reduce_sum: AllReduceSum = lambda array: array
    valid_datasets: np.ndarray | None = None
    valid_sources: np.ndarray | None = None
    texts: Texts | None = None
    # Of these rows and no others: what is derived from this evidence begins without any.
    _found: dict[tuple, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def datasets_of_valid(self) -> np.ndarray:
        """[M] the number of the dataset that each validation sample is from."""
        if self.valid_datasets is None:
            return np.zeros(len(self.valid_rows), dtype=np.int64)
        return self.valid_datasets

    def share(self) -> Share:
        """This rank's share of the candidates; all ranks call this."""
        return Share.of_rank(len(self.rows), self.ids, self.all_reduce_sum)

    def pools(self) -> Partition:
        return Partition(self.datasets, self.num_datasets)

    def clusters(self, count: int, seed: int) -> Partition:
        """About so many clusters of the candidates, within their pools; all ranks call this."""
        return self.once(("clusters", count, seed), lambda: find_clusters(
            self.rows, self.pools(), count, self.share(), seed))

    def lengths(self) -> np.ndarray:
        """[n] of this rank's rows."""
        return self.once(("lengths",), lambda: row_lengths(self.rows))

    def stiff_costs(self) -> np.ndarray:
        """[n] of this rank's candidates (:func:`stiff_costs`)."""
        return self.once(("stiff costs",), lambda: stiff_costs(self.rows, self.directions))

    def once(self, what: tuple, find: Callable[[], T]) -> T:
        """What ``find`` makes of this evidence, made when it is first asked for."""
        if what not in self._found:
            self._found[what] = find()
        return self._found[what]

    def of(self, kept: np.ndarray) -> Evidence:
        """Of some of all candidates, by a mask [N], numbered anew; all ranks hold the same mask."""
        if kept.all():
            return self
        here = kept[self.ids]
        # Their clusters are found anew: as many as all had, which part what is left more finely.
        return dataclasses.replace(
            self, rows=self.rows[here], labels=self.labels[here], datasets=self.datasets[here],
            ids=(np.cumsum(kept) - 1)[self.ids[here]],
            texts=None if self.texts is None else self.texts.of(here))

    def half(self, part: Half) -> Evidence:
        """What half of it tells of the same candidates: inner products over its coordinates, scaled
        to those over all.

        The two halves find clusters of their own, since they are to share nothing.
        """
        kept = part.coordinates
        scale = np.float32(np.sqrt(len(kept) / kept.sum()))
        directions = dataclasses.replace(
            self.directions, sketches=self.directions.sketches[:, kept] * scale)
        return dataclasses.replace(
            self, rows=self.rows[:, kept] * scale, directions=directions,
            valid_rows=self.valid_rows[part.valid][:, kept] * scale,
            valid_datasets=(None if self.valid_datasets is None
                            else self.valid_datasets[part.valid]),
            valid_sources=(None if self.valid_sources is None
                           else self.valid_sources[part.valid]),
            texts=None if self.texts is None else self.texts.half(part.valid, part.features))


def mean_row(evidence: Evidence, *, unit: bool) -> np.ndarray:
    """[k] mean of the candidates of all ranks, each brought to length 1 if ``unit``; all ranks call
    this. Each sample counts the same, as in the mean of the validation set."""
    return evidence.once(("mean row", unit), lambda: _mean_row(evidence, unit))


def _mean_row(evidence: Evidence, unit: bool) -> np.ndarray:
    weights = np.ones(len(evidence.rows))
    if unit:
        lengths = evidence.lengths()
        weights = np.divide(weights, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    everyone, share = Partition(np.zeros(len(weights), dtype=np.int64), 1), evidence.share()
    return share.summed(everyone.sums(evidence.rows, weights))[0] / share.num_samples


def typical_length(evidence: Evidence) -> float:
    """The mean length of the candidates' rows of all ranks, each counted up to _LONGEST medians;
    all ranks call this."""
    share, lengths = evidence.share(), evidence.lengths()
    limited = np.minimum(lengths, share.from_leader(_longest_counted, lengths))
    return float(share.summed(np.array([limited.sum()]))[0]) / share.num_samples


def _longest_counted(lengths: np.ndarray) -> float:
    """Of lengths [N], of which those of rows of zeros tell nothing."""
    above = lengths[lengths > 0]
    return _LONGEST * float(np.median(above)) if len(above) else 0.0


def mean_gradient(valid_rows: np.ndarray, weights: np.ndarray, *, unit: bool) -> np.ndarray:
    """[k] of the validation samples [M, k], with weights [M] that sum to 1; unit: of their
    directions, in units of their typical length."""
    if not unit:
        return weights @ valid_rows
    return _typical(row_lengths(valid_rows)) * (weights @ unit_rows(valid_rows))


def _typical(lengths: np.ndarray) -> float:
    return float(np.minimum(lengths, _longest_counted(lengths)).mean())


def excess_gradient(evidence: Evidence, weights: np.ndarray, *, unit: bool) -> np.ndarray:
    """[k] what the mean validation gradient, with weights [M] that sum to 1, has in excess of the
    pool's; all ranks call this.

    With one Hessian for both, an annealing over the pool that ends at theta with g_pool(theta) = 0
    has moved by -H^-1 g_pool, so that g_val(theta) = g_val + H (theta - theta_0) = g_val - g_pool:
    the validation gradient that is left where the pool has nothing more to teach.
    unit: of directions, in units of the typical length of the validation gradients.
    """
    valid, pool = evidence.valid_rows, mean_row(evidence, unit=unit)
    length = _typical(row_lengths(valid)) if unit else 1.0
    return mean_gradient(valid, weights, unit=unit) - length * pool


def stiff_costs(rows: np.ndarray, directions: Directions) -> np.ndarray:
    """[N] a_i = sum_j lambda_j <g_i, v_j>^2 over stiff j, with inner products of sketches."""
    stiff = directions.sketches[: directions.num_stiff].astype(np.float64)
    costs = np.empty(len(rows))
    for block in row_blocks(len(rows)):
        projections = rows[block].astype(np.float64) @ stiff.T
        costs[block] = projections**2 @ directions.eigenvalues[: len(stiff)]
    return costs


def flat_rows(rows: np.ndarray, directions: Directions, subspace: str) -> np.ndarray:
    """[N, k] the part of each sketch in the flat subspace.

    complement: what is left once the stiff directions are projected out; bulk: the projection on
    the computed directions after them with eigenvalues above zero.
    """
    if subspace == "complement":
        basis = _orthonormal(directions.sketches[: directions.num_stiff])
        return _in_blocks(lambda block: block - (block @ basis) @ basis.T, rows)
    bulk = directions.sketches[directions.num_stiff:][
        directions.eigenvalues[directions.num_stiff:] > 0]
    if len(bulk) == 0:
        raise UserError("--flat-subspace bulk: no computed direction after the elbow has a "
                        "positive eigenvalue. Raise --num-eigenpairs.")
    basis = _orthonormal(bulk)
    return _in_blocks(lambda block: (block @ basis) @ basis.T, rows)


def _in_blocks(project: Callable[[np.ndarray], np.ndarray], rows: np.ndarray) -> np.ndarray:
    """float32 rows out of float64 arithmetic, without a float64 copy of all rows."""
    result = np.empty_like(rows, dtype=np.float32)
    for block in row_blocks(len(rows)):
        result[block] = project(rows[block].astype(np.float64))
    return result


def _orthonormal(vectors: np.ndarray) -> np.ndarray:
    """[k, p] orthonormal basis of the span of [p, k]."""
    return np.linalg.qr(vectors.T.astype(np.float64))[0]
