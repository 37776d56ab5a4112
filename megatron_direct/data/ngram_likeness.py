"""How like the validation set's a sample's text is, by its tokens alone: no model is asked.

Data selection with importance resampling (DSIR, Xie et al. 2023, arXiv 2302.03169): unigrams and
bigrams are hashed, and a sample's score is the log ratio of their frequencies in the validation set
and in the pool. Here it is averaged over the sample's n-grams, since samples differ in length, and
the validation set's frequencies are smoothed towards the pool's, by Dirichlet's prior (Zhai and
Lafferty, TOIS 2004): with counts c of n and a prior that counts as a n-grams

    (c + a p_pool) / (n + a).

DSIR counts each of 10,000 features once more than it occurs. A bigram that is new to both then
counts for a sample, since the pool is larger, and so shuffled text is likely.

Shapes: n samples of the pool on this rank, M validation samples in V groups.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_direct.data.ngram_hashes import NUM_FEATURES, ngram_hashes
from megatron_direct.data.token_features import TokenSource

_AT_ONCE = 1 << 18  # tokens, of whole samples, that are hashed together
_PRIOR = 1e4  # n-grams of the pool, as which it counts
_DSIR_FEATURES = 10_000


@dataclass(frozen=True, eq=False)
class Ngrams:
    """Features of the n-grams of some samples, read when they are first asked for, and kept: 8
    bytes a token."""

    source: TokenSource
    num_features: int = NUM_FEATURES

    def __len__(self) -> int:
        return len(self.source.numbers)

    def of(self, here: np.ndarray) -> Ngrams:
        """Of some of the samples, by a mask or positions."""
        return Ngrams(self.source.of(here), self.num_features)

    @functools.cached_property
    def _parts(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(features of unigrams, of bigrams), [.] each, one sample's after the other's: a sample of
        n tokens has n, and n - 1."""
        return [_features([self.source.samples.tokens(int(number))
                           for number in self.source.numbers[block]], self.num_features)
                for block in self._blocks]

    @functools.cached_property
    def _blocks(self) -> list[slice]:
        """Of samples that are hashed together; none where there are no samples."""
        if not len(self):
            return []
        cuts = np.flatnonzero(np.diff((np.cumsum(self._lengths) - 1) // _AT_ONCE)) + 1
        return [slice(*ends) for ends in itertools.pairwise([0, *cuts, len(self)])]

    @functools.cached_property
    def _lengths(self) -> np.ndarray:
        """[samples] tokens of each."""
        return self.source.samples.num_labels[self.source.numbers].astype(np.int64) + 1

    def counts(self, groups: np.ndarray) -> np.ndarray:
        """[V, features] how often each occurs in each group; groups: [samples] of 0 .. V - 1."""
        size = (int(groups.max(initial=0)) + 1, self.num_features)
        found = np.zeros(size)
        for (single, double), block in zip(self._parts, self._blocks, strict=True):
            lengths = self._lengths[block]
            for features, count in ((single, lengths), (double, lengths - 1)):
                found += np.bincount(
                    np.repeat(groups[block], count) * self.num_features + features,
                    minlength=found.size).reshape(size)
        return found

    @functools.cached_property
    def counts_of_all(self) -> np.ndarray:
        """[1, features]"""
        return self.counts(np.zeros(len(self), dtype=np.int64))

    def means(self, values: np.ndarray) -> np.ndarray:
        """[V, samples] the mean of values [V, features] over the n-grams of each sample."""
        parts = [np.empty((len(values), 0))]
        for (single, double), block in zip(self._parts, self._blocks, strict=True):
            lengths = self._lengths[block]
            sums = [np.stack([np.add.reduceat(value[features], _starts(count)) for value in values])
                    for features, count in ((single, lengths), (double, lengths - 1))]
            parts.append((sums[0] + sums[1]) / (2 * lengths - 1))
        return np.concatenate(parts, axis=1)


@dataclass(frozen=True, eq=False)
class Texts:
    """pool: the n samples of this rank; valid: the M validation samples, the same on each rank;
    counted: [features] bool, those that count, None for all."""

    pool: Ngrams
    valid: Ngrams
    counted: np.ndarray | None = None

    @classmethod
    def read_from(cls, pool: TokenSource, valid: TokenSource) -> Texts:
        return cls(Ngrams(pool), Ngrams(valid))

    def of(self, here: np.ndarray) -> Texts:
        """With some of the pool's samples, by a mask or positions."""
        return Texts(self.pool.of(here), self.valid, self.counted)

    def half(self, valid: np.ndarray, counted: np.ndarray) -> Texts:
        """What some of the validation samples [M] bool, and some of the features [features] bool,
        tell of the same candidates."""
        return Texts(self.pool, self.valid.of(valid), counted)

    def likeness(self, groups: np.ndarray,
                 all_reduce_sum: Callable[[np.ndarray], np.ndarray] = lambda array: array,
                 ) -> np.ndarray:
        """[V, n] mean log ratio over the n-grams of each sample of the pool that count, 0 of none,
        for each of the groups (numbers 0 .. V - 1 [M]); all ranks that share the pool call this."""
        ratios = _log_ratios(self.valid.counts(groups), all_reduce_sum(self.pool.counts_of_all))
        return _means(self.pool, ratios, self.counted)


def likeness_of_dsir(texts: Texts) -> np.ndarray:
    """[n] of the pool's samples, all of them on this rank, to the whole validation set, with the
    features and the smoothing that DSIR has. Of half of the features, as many of DSIR's count."""
    pool, valid = (Ngrams(some.source, _DSIR_FEATURES) for some in (texts.pool, texts.valid))
    ratios = _log_shares(valid.counts_of_all) - _log_shares(pool.counts_of_all)
    counted = None if texts.counted is None else texts.counted[:_DSIR_FEATURES]
    return _means(pool, ratios, counted)[0]


def _means(pool: Ngrams, ratios: np.ndarray, counted: np.ndarray | None) -> np.ndarray:
    """[V, n] of ratios [V, features], over the n-grams of each sample that count."""
    if counted is None:
        return pool.means(ratios)
    shares = pool.means(counted[None].astype(np.float64))
    return np.divide(pool.means(ratios * counted), shares,
                     out=np.zeros((len(ratios), len(pool))), where=shares > 0)


def _features(texts: list[np.ndarray], num_features: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashed as one text, without the bigrams that join two of them."""
    lengths = np.array([len(text) for text in texts])
    hashes = (ngram_hashes(np.concatenate(texts)) % np.uint64(num_features)).astype(np.uint32)
    single, double = np.split(hashes, [int(lengths.sum())])
    return single, np.delete(double, np.cumsum(lengths)[:-1] - 1)


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)[:-1]])


def _log_ratios(counts: np.ndarray, in_pool: np.ndarray) -> np.ndarray:
    """[V, features] of counts [V, features] and [1, features]: log of smoothed frequency in each
    group over that in the pool. What the pool does not have is in none of its samples."""
    shares, size = np.maximum(in_pool, 0.5) / in_pool.sum(), counts.sum(1, keepdims=True)
    return np.log((counts / shares + _PRIOR) / (size + _PRIOR))


def _log_shares(counts: np.ndarray) -> np.ndarray:
    """Log frequencies, each feature counted once more than it occurs."""
    counts = counts + 1
    return np.log(counts / counts.sum(1, keepdims=True))
