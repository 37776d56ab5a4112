"""How like the validation set's a sample's text is, by its tokens alone: no model is asked.

Data selection with importance resampling (DSIR, Xie et al. 2023, arXiv 2302.03169): unigrams and
bigrams are hashed to 10,000 features, and a sample's score is the log ratio of their frequencies in
the validation set and in the pool. Here it is averaged over the sample's n-grams, since samples
differ in length.

Shapes: n samples of the pool on this rank, M validation samples in V groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from megatron_direct.data.token_features import TokenSource

_FEATURES = 10_000  # as in the paper
_AT_ONCE = 512  # samples whose n-grams are held


@dataclass(frozen=True)
class Texts:
    """pool: the n samples of this rank; valid: the M validation samples, the same on each rank."""

    pool: TokenSource
    valid: TokenSource

    def of(self, here: np.ndarray) -> Texts:
        """With some of the pool's samples, by a mask or positions."""
        return replace(self, pool=self.pool.of(here))

    def of_valid(self, here: np.ndarray) -> Texts:
        return replace(self, valid=self.valid.of(here))

    def likeness(self, groups: np.ndarray,
                 all_reduce_sum: Callable[[np.ndarray], np.ndarray] = lambda array: array,
                 ) -> np.ndarray:
        """[V, n] mean log ratio over the n-grams of each sample of the pool, for each of the groups
        (numbers 0 .. V - 1 [M]); all ranks that share the pool call this."""
        in_pool = all_reduce_sum(_counts(self.pool, np.zeros(len(self.pool.numbers), np.int64), 1))
        ratios = _log_shares(_counts(self.valid, groups, groups.max() + 1)) - _log_shares(in_pool)
        found = np.empty((len(ratios), len(self.pool.numbers)))
        for part, features, lengths in _in_parts(self.pool):
            starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
            for likeness, ratio in zip(found, ratios, strict=True):
                likeness[part] = np.add.reduceat(ratio[features], starts) / lengths
        return found


def _in_parts(source: TokenSource) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """(which samples, their features one after the other, how many each has); a sample of n tokens
    has 2 n - 1."""
    for first in range(0, len(source.numbers), _AT_ONCE):
        part = slice(first, min(first + _AT_ONCE, len(source.numbers)))
        of_sample = [(hashes % np.uint64(_FEATURES)).astype(np.int64)
                     for hashes, _ in source.of(part).hashes()]
        yield part, np.concatenate(of_sample), np.array([len(some) for some in of_sample])


def _counts(source: TokenSource, groups: np.ndarray, num_groups: int) -> np.ndarray:
    """[V, features] how often each occurs in each group."""
    counts = np.zeros((num_groups, _FEATURES))
    for part, features, lengths in _in_parts(source):
        of_feature = np.repeat(groups[part], lengths)
        counts += np.bincount(of_feature * _FEATURES + features,
                              minlength=counts.size).reshape(counts.shape)
    return counts


def _log_shares(counts: np.ndarray) -> np.ndarray:
    """Log frequencies, each feature counted once more than it occurs."""
    counts = counts + 1
    return np.log(counts / counts.sum(1, keepdims=True))
