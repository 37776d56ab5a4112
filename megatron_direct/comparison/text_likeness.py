"""How like the validation set a sample's text is, by its tokens alone: no model is asked.

Data selection with importance resampling (DSIR, Xie et al. 2023, arXiv 2302.03169): unigrams and
bigrams are hashed to 10,000 features, and a sample's score is the log ratio of their frequencies in
the validation set and in the pool. Here it is averaged over the sample's n-grams, since samples
differ in length, and the largest are taken.
"""

from __future__ import annotations

import numpy as np

from megatron_direct.data.samples import Samples

_FEATURES = 10_000  # as in the paper
# Odd constants of splitmix64 and of Knuth: they spread small integers over 64 bits.
_MIX = np.uint64(0x9E3779B97F4A7C15)
_SECOND = np.uint64(0xBF58476D1CE4E5B9)


def hashed_ngrams(tokens: np.ndarray) -> np.ndarray:
    """[2 n - 1] features of the unigrams and bigrams of n tokens."""
    words = tokens.astype(np.uint64) + np.uint64(1)
    with np.errstate(over="ignore"):
        single = words * _MIX
        double = (single[:-1] ^ (single[:-1] >> np.uint64(29))) * _SECOND + words[1:] * _MIX
        mixed = np.concatenate([single, double])
        mixed = (mixed ^ (mixed >> np.uint64(32))) * _SECOND
    return ((mixed >> np.uint64(20)) % np.uint64(_FEATURES)).astype(np.int64)


def ngram_likeness(pool: Samples, numbers: np.ndarray, valid: Samples, valid_numbers: np.ndarray,
                   ) -> np.ndarray:
    """[n] mean log ratio over the n-grams of each sample ``numbers`` [n] of the pool."""
    features = [hashed_ngrams(pool.tokens(int(number))) for number in numbers]
    ratio = np.log(_frequencies([hashed_ngrams(valid.tokens(int(n))) for n in valid_numbers])) \
        - np.log(_frequencies(features))
    return np.array([ratio[some].mean() for some in features])


def _frequencies(texts: list[np.ndarray]) -> np.ndarray:
    """[features] shares of all n-grams, each counted once more than it occurs."""
    counts = np.ones(_FEATURES)
    for some in texts:
        counts += np.bincount(some, minlength=_FEATURES)
    return counts / counts.sum()
