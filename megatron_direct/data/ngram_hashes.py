"""N-grams of tokens as numbers that are spread evenly."""

from __future__ import annotations

import numpy as np

# Of a text's n-grams, by which texts are compared: so many that a bigram which is in no text is in
# most cases seen to be.
NUM_FEATURES = 1 << 18
# A token, of those that are kept.
BYTES_OF_TEXT = 8
# Odd constants of splitmix64 and of Knuth: they spread small integers over 64 bits.
_MIX = np.uint64(0x9E3779B97F4A7C15)
_SECOND = np.uint64(0xBF58476D1CE4E5B9)


def ngram_hashes(tokens: np.ndarray) -> np.ndarray:
    """[2 n - 1] 44 well mixed bits of each unigram and then of each bigram of n tokens."""
    words = tokens.astype(np.uint64) + np.uint64(1)
    with np.errstate(over="ignore"):
        single = words * _MIX
        double = (single[:-1] ^ (single[:-1] >> np.uint64(29))) * _SECOND + words[1:] * _MIX
        mixed = np.concatenate([single, double])
        mixed = (mixed ^ (mixed >> np.uint64(32))) * _SECOND
    return mixed >> np.uint64(20)
