"""How like the validation set a sample's text is, by its tokens alone: no model is asked.

Data selection with importance resampling (DSIR, Xie et al. 2023, arXiv 2302.03169): unigrams and
bigrams are hashed to 10,000 features, and a sample's score is the log ratio of their frequencies in
the validation set and in the pool. Here it is averaged over the sample's n-grams, since samples
differ in length, and the largest are taken.
"""

from __future__ import annotations

import numpy as np

from megatron_direct.data.samples import Samples
from megatron_direct.data.token_features import ngram_hashes

_FEATURES = 10_000  # as in the paper


def hashed_ngrams(tokens: np.ndarray) -> np.ndarray:
    """[2 n - 1] features of the unigrams and bigrams of n tokens."""
    return (ngram_hashes(tokens) % np.uint64(_FEATURES)).astype(np.int64)


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
