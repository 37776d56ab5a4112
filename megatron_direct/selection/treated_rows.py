"""What the objective sums up: whole sketches, treated, or flat parts of them.

Sketches are brought to one length, since the length of a single sample's gradient says more about
noise than about worth; shrunk towards the means of their clusters (shrinkage.py); and weighted by
the sample's tokens, since Megatron packs samples into sequences, in which each token counts alike.
All of that is linear in the rows, so that inner products need no copy of them.

Shapes: n of N candidates on this rank, k sketch coordinates, V targets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_direct.selection.config import SelectionConfig
from megatron_direct.selection.evidence import Evidence, flat_rows, typical_length
from megatron_direct.selection.objectives import find_objective
from megatron_direct.selection.rows import row_blocks
from megatron_direct.selection.shrinkage import Partition, shrink


def summed_rows(config: SelectionConfig, evidence: Evidence, seed: int, spare: int = 0,
                ) -> np.ndarray:
    """[n, k + spare] the rows that the objective sums up, as float32, behind treated ones so many
    coordinates to be written yet; all ranks call this."""
    if not find_objective(config.objective).treats_sketches:
        return flat_rows(evidence.rows, evidence.directions, config.flat_subspace)
    by = _Treatment.of(config, evidence, seed)
    count, size = evidence.rows.shape
    # The one copy of the rows; what follows changes it in place.
    wide = np.empty((count, size + spare), dtype=np.float32)
    rows = wide[:, :size]
    rows[:] = evidence.rows
    _scale(rows, by.factors)
    if by.clusters is not None:
        shrink(rows, by.weights, by.clusters, config.kept_deviation, evidence.share())
    _scale(rows, by.weights)
    return wide


def treated_scores(config: SelectionConfig, evidence: Evidence, targets: np.ndarray, seed: int,
                   ) -> np.ndarray:
    """[V, n] inner products of treated rows with targets [V, k]; all ranks call this."""
    by, share = _Treatment.of(config, evidence, seed), evidence.share()
    scores = np.empty((len(targets), len(evidence.rows)))
    for block in row_blocks(len(evidence.rows)):
        scores[:, block] = targets @ evidence.rows[block].T.astype(np.float64) * by.factors[block]
    if by.clusters is not None:
        sums = share.summed(np.stack([by.clusters.totals(by.weights * one) for one in scores]))
        totals = share.summed(by.clusters.totals(by.weights))
        means = (sums / np.maximum(totals, np.finfo(np.float64).tiny))[:, by.clusters.numbers]
        scores = means + config.kept_deviation * (scores - means)
    return scores * by.weights


@dataclass(frozen=True, eq=False)
class _Treatment:
    """factors: [n] that bring rows to one length; clusters: None without shrinkage; weights: [n]
    by tokens."""

    factors: np.ndarray
    clusters: Partition | None
    weights: np.ndarray

    @classmethod
    def of(cls, config: SelectionConfig, evidence: Evidence, seed: int) -> _Treatment:
        # Before any row is copied, since a search of clusters needs a copy of its own.
        clusters = evidence.clusters(config.shrinkage_clusters, seed) \
            if config.shrinkage_clusters else None
        factors = weights = np.ones(len(evidence.rows))
        if config.normalize_gradients:  # a row of zeros stays one
            lengths = evidence.lengths()
            factors = np.divide(typical_length(evidence), lengths, out=np.zeros_like(lengths),
                                where=lengths > 0)
        if config.weight_by_tokens:
            labels, share = evidence.labels.astype(np.float64), evidence.share()
            weights = labels * share.num_samples / share.summed(np.array([labels.sum()]))[0]
        return cls(factors, clusters, weights)


def _scale(rows: np.ndarray, factors: np.ndarray) -> None:
    """Multiplies each of the rows [n, k] in place, in float64 arithmetic."""
    for block in row_blocks(len(rows)):
        rows[block] = rows[block] * factors[block, None]
