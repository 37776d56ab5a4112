"""What groups of candidates (domains, clusters) are worth to the validation set, with intervals.

The worth of a sample is the mean cosine of its gradient's sketch with those of the validation
samples; that of a group is the mean over its samples. (The cosine with their mean would be biased:
the fewer validation samples, the longer the noise in their mean, and the smaller the cosine.) Which
group a sample is in was not decided by the validation set, so no choice flatters this estimate.
What the best part of a group is worth would be flattered by the samples that it was chosen for: it
is *cross-fitted*, chosen by one half of the validation set and judged on the other, both ways.

Intervals are of a bootstrap over validation samples. Shapes: n of N candidates on this rank, G
groups, M validation samples, B resamples, k sketch coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_direct.selection.evidence import Evidence
from megatron_direct.selection.rows import row_blocks
from megatron_direct.selection.share import Share
from megatron_direct.selection.shrinkage import Partition

CONFIDENCE = 0.9
_RESAMPLES = 1000


@dataclass(frozen=True)
class WorthEstimate:
    """A value, and the ends of its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class GroupWorth:
    """whole: of all samples of a group; best: of its best part, cross-fitted, or None where nothing
    of the group is selected or there are too few validation samples."""

    whole: WorthEstimate
    best: WorthEstimate | None


def group_worths(evidence: Evidence, groups: Partition, num_best: np.ndarray, halves: np.ndarray,
                 seed: int) -> list[GroupWorth]:
    """Of each group; all ranks call this.

    num_best: [G] how many samples the best part of each has. halves: [M] bool, True for one half of
    the validation samples.
    """
    share, rng = evidence.share(), np.random.default_rng(seed)
    valid = _unit(evidence.valid_rows.astype(np.float64))
    everyone = np.ones(len(evidence.rows))
    sizes = share.summed(groups.totals(everyone))
    wholes = _estimates(_mean_directions(evidence, groups, everyone, share),
                        _resampled(valid, rng))
    if min(halves.sum(), (~halves).sum()) < 2:
        return [GroupWorth(whole, None) for whole in wholes]
    count = np.minimum(num_best, sizes).astype(np.int64)
    draws = []
    for fitted in (halves, ~halves):
        scores = share.gathered(cosines(evidence.rows, valid[fitted].mean(0)[None])[:, 0])
        best = _largest_of_groups(scores, share.gathered(groups.numbers).astype(np.int64), count)
        directions = _mean_directions(evidence, groups, share.here(best.astype(np.float64)), share)
        draws.append(directions @ _resampled(valid[~fitted], rng).T)
    both = (draws[0] + draws[1]) / 2
    return [GroupWorth(whole, _estimate(values) if number else None)
            for whole, values, number in zip(wholes, both, count, strict=True)]


def typical_samples(evidence: Evidence, groups: Partition, count: int) -> list[np.ndarray]:
    """Of each group the candidates nearest to its mean, nearest first; all ranks call this."""
    share = evidence.share()
    centers = _mean_directions(evidence, groups, np.ones(len(evidence.rows)), share)
    nearness = np.empty(len(evidence.rows))
    for block in row_blocks(len(evidence.rows)):
        unit = _unit(evidence.rows[block].astype(np.float64))
        nearness[block] = np.einsum("nk,nk->n", unit, centers[groups.numbers[block]])
    nearness = share.gathered(nearness)
    of_group = share.gathered(groups.numbers).astype(np.int64)
    order = np.lexsort((np.arange(len(nearness)), -nearness, of_group))
    return [part[:count] for part in _parts(order, of_group[order], groups.count)]


def cosines(rows: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """[n, m] of each row [n, k] with each direction [m, k]; 0 where either has no length."""
    directions, found = _unit(directions), np.empty((len(rows), len(directions)))
    for block in row_blocks(len(rows)):
        found[block] = _unit(rows[block].astype(np.float64)) @ directions.T
    return found


def _unit(rows: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)


def _mean_directions(evidence: Evidence, groups: Partition, taken: np.ndarray, share: Share,
                     ) -> np.ndarray:
    """[G, k] means of the unit sketches of those that are taken [n], as 0 or 1."""
    lengths = np.sqrt(np.einsum("nk,nk->n", evidence.rows, evidence.rows, dtype=np.float64))
    weights = np.divide(taken, lengths, out=np.zeros(len(taken)), where=lengths > 0)
    sums = share.summed(groups.sums(evidence.rows, weights))
    return sums / np.maximum(share.summed(groups.totals(taken)), 1)[:, None]


def _resampled(valid: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[1 + B, k] means of the validation samples [m, k] as they are, and resampled."""
    count = len(valid)
    weights = rng.multinomial(count, np.full(count, 1 / count), size=_RESAMPLES)
    return np.concatenate([np.ones((1, count)), weights]) @ valid / count


def _estimates(directions: np.ndarray, means: np.ndarray) -> list[WorthEstimate]:
    return [_estimate(values) for values in directions @ means.T]


def _estimate(values: np.ndarray) -> WorthEstimate:
    """Of [1 + B] values, the first of them the estimate itself."""
    low, high = np.quantile(values[1:], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return WorthEstimate(float(values[0]), float(low), float(high))


def _largest_of_groups(scores: np.ndarray, of_group: np.ndarray, count: np.ndarray) -> np.ndarray:
    """[N] bool: of each group the ``count`` [G] largest scores [N]; ties go to lower ids."""
    order = np.lexsort((np.arange(len(scores)), -scores, of_group))
    chosen = np.zeros(len(scores), dtype=bool)
    for part, number in zip(_parts(order, of_group[order], len(count)), count, strict=True):
        chosen[part[:number]] = True
    return chosen


def _parts(order: np.ndarray, of_group: np.ndarray, count: int) -> Sequence[np.ndarray]:
    """``order``, cut into the groups that ascend in ``of_group``."""
    return np.split(order, np.searchsorted(of_group, np.arange(1, count)))
