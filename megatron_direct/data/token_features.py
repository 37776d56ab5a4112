"""What a sample's tokens tell of it, and a smaller model's loss of it, if there is one.

Features of n tokens: its length; how many of them are different; how usual its unigrams and bigrams
are in the pool, and how much more usual its bigrams than its unigrams would make them, which tells
text from shuffled text; how much more usual they are in the validation set than in the pool; its
dataset; and the shares of its unigrams and bigrams that are hashed to each of 256 buckets. Of a
smaller model: its mean loss per token, and that less the mean of the sample's dataset, in units of
the dataset's spread.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_direct.data.ngram_hashes import ngram_hashes
from megatron_direct.data.samples import Samples

# Samples of the pool, and of the validation set, by which the usual is known.
_REFERENCE = 20_000
_BUCKETS = 1 << 18  # of counts: a few times the bigrams that so many samples hold
_HASHED = 256


@dataclass(frozen=True)
class TokenSource:
    """Some samples of a set, by number."""

    samples: Samples
    numbers: np.ndarray

    def of(self, here: np.ndarray | slice) -> TokenSource:
        """Some of these, by a mask or positions."""
        return TokenSource(self.samples, self.numbers[here])

    def hashes(self) -> Iterator[tuple[np.ndarray, int]]:
        """(hashes, n) of each sample."""
        for number in self.numbers:
            tokens = self.samples.tokens(int(number))
            yield ngram_hashes(tokens), len(tokens)

    def some(self, count: int, seed: int) -> TokenSource:
        if len(self.numbers) <= count:
            return self
        return TokenSource(self.samples, np.sort(
            np.random.default_rng(seed).choice(self.numbers, count, replace=False)))


def token_features(pool: TokenSource, valid: TokenSource, seed: int,
                   losses: np.ndarray | None = None) -> np.ndarray:
    """[N, F] float32 of the pool's samples; what is usual is counted in some of them.

    losses: [N] of a smaller model, two columns more; one that is not finite counts as the mean of
    its dataset.
    """
    single, double = _log_shares(pool.some(_REFERENCE, seed))
    likeness = [of_valid - of_pool for of_valid, of_pool in zip(
        _log_shares(valid.some(_REFERENCE, seed)), (single, double), strict=True)]
    datasets = pool.samples.dataset_of(pool.numbers)
    first_loss = 6 + len(pool.samples.prefixes)
    found = np.zeros((len(pool.numbers), first_loss + (losses is not None) * 2 + _HASHED),
                     np.float32)
    if losses is not None:
        found[:, first_loss: first_loss + 2] = _loss_features(losses, datasets).T
    for row, (hashes, count), dataset in zip(found, pool.hashes(), datasets, strict=True):
        buckets = hashes % np.uint64(_BUCKETS)
        one, two = buckets[:count], buckets[count:]
        usual = single[one]
        row[:6] = (np.log(count), len(np.unique(one)) / count, usual.mean(), double[two].mean(),
                   (double[two] - usual[:-1] - usual[1:]).mean(),
                   np.concatenate([likeness[0][one], likeness[1][two]]).mean())
        row[6 + dataset] = 1
        row[-_HASHED:] = np.sqrt(np.bincount(
            (hashes % np.uint64(_HASHED)).astype(np.int64), minlength=_HASHED) / len(hashes))
    return found


def _loss_features(losses: np.ndarray, datasets: np.ndarray) -> np.ndarray:
    """[2, N] losses, and their deviations from the mean of their dataset in units of its spread."""
    finite = np.isfinite(losses)
    counts = np.maximum(np.bincount(datasets, finite), 1)
    means = np.bincount(datasets, np.where(finite, losses, 0)) / counts
    known = np.where(finite, losses, means[datasets])
    deviations = known - means[datasets]
    spreads = np.sqrt(np.bincount(datasets, deviations**2) / counts)
    spreads[spreads <= 1e-9] = 1.0
    return np.stack([known, deviations / spreads[datasets]])


def _log_shares(source: TokenSource) -> tuple[np.ndarray, np.ndarray]:
    """[buckets] each: log share of the unigrams, and of the bigrams, counted once more than they
    occur."""
    counts = np.ones((2, _BUCKETS))
    for hashes, count in source.hashes():
        buckets = (hashes % np.uint64(_BUCKETS)).astype(np.int64)
        for part, here in zip(counts, (buckets[:count], buckets[count:]), strict=True):
            np.add.at(part, here, 1)
    single, double = np.log(counts / counts.sum(1, keepdims=True))
    return single, double
