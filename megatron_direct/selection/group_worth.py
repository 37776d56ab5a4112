"""What groups of candidates (domains, clusters) are worth to the validation set, with intervals.

From the alignments of worth.py, per token as there: of all samples of a group, and of its best
part.
Which group a sample is in was not decided by the validation set, so no choice flatters the first.
The second is cross-fitted, since what the best part is worth would be flattered by what it was
chosen for: in each of the four folds it is chosen by the worth that one side gives, and judged by
the alignments of the other.

Intervals are Student's, of the scatter over blocks of the validation set. Shapes: n of N candidates
on this rank, G groups, B blocks, k sketch coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_direct.selection.evidence import Evidence
from megatron_direct.selection.rows import row_blocks, row_lengths, unit_rows
from megatron_direct.selection.shrinkage import Partition
from megatron_direct.selection.worth import Alignments, Worth, cross_fitted, mean_over_blocks

CONFIDENCE = 0.9


@dataclass(frozen=True)
class WorthEstimate:
    """A value, and the ends of its interval, which has no width where there is a single block."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, by_block: np.ndarray, sizes: np.ndarray) -> WorthEstimate:
        """by_block: [B] the value by each block; sizes: [B] their validation samples."""
        mean = mean_over_blocks(by_block, sizes)
        error = mean.margin(CONFIDENCE)
        return cls(mean.value, mean.value - error, mean.value + error)


@dataclass(frozen=True, eq=False)
class GroupWorth:
    """whole: of all samples of a group; best: of its best part, cross-fitted, or None where nothing
    of the group is selected or there are too few validation samples."""

    whole: WorthEstimate
    best: WorthEstimate | None


def group_worths(alignments: Alignments, weights: np.ndarray, groups: Sequence[np.ndarray],
                 num_best: Sequence[int], worth: Worth | None) -> list[GroupWorth]:
    """Of each group, [.] numbers of candidates.

    weights: [N] tokens; num_best: [G] how many samples the best part of each has; worth: of the
    candidates, None where the validation set is too small for it.
    """
    wholes = [np.mean([[_mean(of_block[group], weights[group]) for of_block in part]
                       for part in alignments.values], axis=0) for group in groups]
    estimates = [WorthEstimate.of(by_block, alignments.sizes) for by_block in wholes]
    if worth is None:
        return [GroupWorth(whole, None) for whole in estimates]

    def best_of_groups(fold) -> np.ndarray:
        best = [group[np.argsort(-fold.score[group], kind="stable")[:count]]
                for group, count in zip(groups, num_best, strict=True)]
        return np.array([[_mean(judged, weights[some]) for judged in fold.judge.by_block(some)]
                         for some in best])

    bests = cross_fitted(worth, best_of_groups)
    return [GroupWorth(whole, WorthEstimate.of(best, alignments.sizes) if count else None)
            for whole, best, count in zip(estimates, bests, num_best, strict=True)]


def _mean(values: np.ndarray, weights: np.ndarray) -> float:
    """The mean per token of values [m]; 0 of no sample."""
    return float(values @ weights / weights.sum()) if len(weights) else 0.0


def typical_samples(evidence: Evidence, groups: Partition, count: int) -> list[np.ndarray]:
    """Of each group the candidates nearest to its mean, nearest first; all ranks call this."""
    share = evidence.share()
    lengths = row_lengths(evidence.rows)
    inverse = np.divide(1.0, lengths, out=np.zeros(len(lengths)), where=lengths > 0)
    centers = share.summed(groups.sums(evidence.rows, inverse))  # mean directions, but for length
    nearness = np.empty(len(evidence.rows))
    for block in row_blocks(len(evidence.rows)):
        nearness[block] = np.einsum("nk,nk->n", unit_rows(evidence.rows[block]),
                                    centers[groups.numbers[block]])
    nearness = share.known_to_all(nearness)
    of_group = share.known_to_all(groups.numbers).astype(np.int64)
    return [members[np.argsort(-nearness[members], kind="stable")[:count]]
            for members in members_of(of_group, groups.count)]


def members_of(of_group: np.ndarray, count: int) -> list[np.ndarray]:
    """Ascending numbers of the candidates in each of ``count`` groups, from [N] groups."""
    order = np.argsort(of_group, kind="stable")
    return np.split(order, np.searchsorted(of_group[order], np.arange(1, count)))
