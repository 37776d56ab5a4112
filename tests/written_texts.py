"""Texts of samples that are in no file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_direct.data.ngram_likeness import Texts
from megatron_direct.data.samples import SampleSource
from megatron_direct.data.token_features import TokenSource


class Written(SampleSource):
    def __init__(self, texts: Sequence[np.ndarray]):
        self.num_labels, self._texts = np.array([len(text) - 1 for text in texts]), texts

    def tokens(self, sample: int) -> np.ndarray:
        return self._texts[sample]


def written(pool: Sequence[np.ndarray], valid: Sequence[np.ndarray]) -> Texts:
    return Texts.read_from(*(TokenSource(Written(texts), np.arange(len(texts)))
                             for texts in (pool, valid)))


def random_texts(num_pool: int, num_valid: int) -> Texts:
    rng = np.random.default_rng(0)
    return written(*([rng.integers(0, 90, 20) for _ in range(count)]
                     for count in (num_pool, num_valid)))
