"""Likeness of texts by hashed n-grams, against the definition written out."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from indexed_files import write_dataset
from written_texts import written

from megatron_direct.data.ngram_hashes import NUM_FEATURES, ngram_hashes
from megatron_direct.data.ngram_likeness import Texts, likeness_of_dsir
from megatron_direct.data.samples import Samples
from megatron_direct.data.token_features import TokenSource

GROUPS = np.array([0, 1, 1, 0])


@pytest.fixture(scope="module")
def documents() -> dict[str, list[np.ndarray]]:
    rng = np.random.default_rng(1)
    return {"pool": [rng.integers(0, 50, rng.integers(3, 30)) for _ in range(6)],
            "valid": [rng.integers(30 * group, 20 + 30 * group, 25) for group in GROUPS]}


@pytest.fixture(scope="module")
def texts(tmp_path_factory, documents) -> Texts:
    folder, sources = tmp_path_factory.mktemp("texts"), {}
    for name, some in documents.items():
        write_dataset(folder / name, [[text.tolist()] for text in some])
        sources[name] = TokenSource(Samples([str(folder / name)], 20), np.arange(len(some)))
    return Texts.read_from(**sources)


def _features(text: np.ndarray, num_features: int = NUM_FEATURES) -> list[int]:
    """Of the tokens that a model of sequence length 20 sees."""
    return [int(number) % num_features for number in ngram_hashes(text[:21])]


def _counts(some: list[np.ndarray], num_features: int = NUM_FEATURES) -> Counter[int]:
    return Counter(feature for text in some for feature in _features(text, num_features))


def _expected(documents, groups, counted=None) -> np.ndarray:
    in_pool, found = _counts(documents["pool"]), []
    for group in np.unique(groups):
        of_group = _counts([text for text, number in zip(documents["valid"], groups, strict=True)
                            if number == group])

        def log_ratio(feature: int, of_group=of_group) -> float:
            share = in_pool[feature] / in_pool.total()
            return math.log((of_group[feature] + 1e4 * share) / (of_group.total() + 1e4) / share)

        found.append([np.mean([log_ratio(f) for f in _features(text)
                               if counted is None or counted[f]])
                      for text in documents["pool"]])
    return np.array(found)


@pytest.mark.parametrize("groups", [GROUPS, np.zeros(4, np.int64)], ids=["two groups", "one"])
def test_likeness_written_out(documents, texts, groups):
    found = texts.likeness(groups)
    np.testing.assert_allclose(found, _expected(documents, groups), rtol=1e-12)
    if len(found) == 2:  # and it is of what it should be: tokens below 20, and from 30 on
        low = [np.mean(text[:21] < 20) - np.mean(text[:21] >= 30) for text in documents["pool"]]
        assert np.corrcoef(found[0] - found[1], low)[0, 1] > 0.9


def test_the_likeness_of_dsir_written_out(documents, texts):
    log_shares = []
    for some in (documents["valid"], documents["pool"]):
        counts = _counts(some, 10_000)
        log_shares.append({feature: math.log((counts[feature] + 1) / (counts.total() + 10_000))
                           for feature in range(10_000)})
    expected = [np.mean([log_shares[0][feature] - log_shares[1][feature]
                         for feature in _features(text, 10_000)]) for text in documents["pool"]]
    np.testing.assert_allclose(likeness_of_dsir(texts), expected, rtol=1e-12)
    # Of half of the features, by what is left of each text; the ratios stay as they are.
    counted = np.random.default_rng(2).random(NUM_FEATURES) < 0.5
    half = [np.mean([log_shares[0][feature] - log_shares[1][feature]
                     for feature in _features(text, 10_000) if counted[feature]])
            for text in documents["pool"]]
    found = likeness_of_dsir(texts.half(np.ones(4, bool), counted))
    np.testing.assert_allclose(found, half, rtol=1e-12)


def test_shuffled_text_is_unlike_what_it_was():
    """The bigrams of shuffled text are new to pool and validation set, which is smaller. Where each
    feature counts once more than it occurs, that is likeness."""
    rng = np.random.default_rng(0)
    successors = rng.permutation(1000)  # and the number after it

    def text() -> np.ndarray:
        tokens = [int(rng.integers(1000))]
        while len(tokens) < 200:
            tokens.append((int(successors[tokens[-1]]) + int(rng.integers(2))) % 1000)
        return np.array(tokens)

    whole, valid = [text() for _ in range(60)], [text() for _ in range(10)]
    texts = written([*whole, *(rng.permutation(some) for some in whole[:20])], valid)
    ours, dsirs = (np.mean(np.subtract.outer(found[:60], found[60:]) > 0) for found in (
        texts.likeness(np.zeros(10, np.int64))[0], likeness_of_dsir(texts)))
    assert ours > 0.99  # of all pairs, whole text is the more likely one
    assert dsirs < 0.1


def test_of_some_samples_on_each_of_three_ranks(documents, texts):
    """What is usual in the pool is counted over all ranks, of which one may have no sample."""
    parts = [texts.of(np.arange(6) < 4), texts.of(np.zeros(6, bool)), texts.of(np.array([4, 5]))]
    counts = [part.pool.counts_of_all for part in parts]
    found = [part.likeness(GROUPS, lambda own: sum(counts)) for part in parts]
    np.testing.assert_allclose(np.concatenate(found, axis=1), _expected(documents, GROUPS),
                               rtol=1e-12)


def test_by_half_of_the_validation_set_and_of_the_ngrams(documents, texts):
    """In each half a mean over the n-grams of that half, of shares among them."""
    half, features = GROUPS == 1, np.arange(NUM_FEATURES) % 3 == 0
    everything = np.ones(NUM_FEATURES, dtype=bool)
    fewer = {**documents, "valid": [documents["valid"][number] for number in (1, 2)]}
    one = np.zeros(2, np.int64)
    np.testing.assert_allclose(texts.half(half, everything).likeness(one), _expected(fewer, one),
                               rtol=1e-12)
    for counted in (features, ~features):
        np.testing.assert_allclose(texts.half(half, counted).likeness(one),
                                   _expected(fewer, one, counted), rtol=1e-12)
    of_none = texts.half(half, np.zeros(NUM_FEATURES, dtype=bool))
    np.testing.assert_array_equal(of_none.likeness(one), 0)


def test_features_are_of_ngrams_alone_and_spread_evenly():
    text = np.arange(2000)
    features = ngram_hashes(text) % np.uint64(10_000)
    np.testing.assert_array_equal(features[:2000][500:502],
                                  ngram_hashes(text[500:502])[:2] % np.uint64(10_000))
    assert ngram_hashes(text)[2000 + 500] == ngram_hashes(text[500:502])[2]
    assert ngram_hashes(text)[2000 + 500] != ngram_hashes(text[[501, 500]])[2]  # order matters
    # 3,999 balls in 10,000 bins leave exp(-0.4) = 0.670 empty; 0.03: six standard deviations.
    empty = np.bincount(features.astype(np.int64), minlength=10_000) == 0
    assert abs(np.mean(empty) - math.exp(-0.3999)) < 0.03
