"""Features of tokens against their definitions, and that shuffled text shows."""

from __future__ import annotations

import numpy as np
import pytest
from indexed_files import write_dataset

from megatron_direct.data.samples import Samples
from megatron_direct.data.token_features import TokenSource, token_features


def _sentences(rng, count, words):
    """Text in which a word tells the next: of pairs (2 i, 2 i + 1)."""
    return [np.stack([2 * (pair := rng.choice(words // 2, 20)), 2 * pair + 1], 1).ravel()
            for _ in range(count)]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
    sound = _sentences(rng, 60, 60)
    shuffled = [rng.permutation(text) for text in sound[:20]]
    texts = {"a": sound[20:] + shuffled, "b": _sentences(rng, 30, 200),
             "valid": _sentences(rng, 20, 200)}
    for name, documents in texts.items():
        write_dataset(folder / name, [[text.tolist()] for text in documents])
    pool = Samples([str(folder / "a"), str(folder / "b")], 64)
    valid = Samples([str(folder / "valid")], 64)
    return texts, token_features(TokenSource(pool, np.arange(90)),
                                 TokenSource(valid, np.arange(20)), 0)


def test_lengths_kinds_and_datasets(sets):
    texts, found = sets
    for row, text in zip(found, [*texts["a"], *texts["b"]], strict=True):
        assert row[0] == pytest.approx(np.log(len(text)))
        assert row[1] == pytest.approx(len(np.unique(text)) / len(text))
    np.testing.assert_array_equal(found[:, 6:8], np.repeat(np.eye(2), [60, 30], axis=0))
    # Square roots of shares: of length 1.
    np.testing.assert_allclose(np.linalg.norm(found[:, 8:], axis=1), 1, rtol=1e-5)


def test_shuffled_text_shows_in_its_bigrams(sets):
    """By 1.2 in its unigrams nothing shows: they are the same words."""
    _, found = sets
    sound, shuffled = found[:40], found[40:60]
    assert sound[:, 4].min() > shuffled[:, 4].max()
    assert abs(sound[:, 2].mean() - shuffled[:, 2].mean()) < 0.05


def test_likeness_to_the_validation_set_shows(sets):
    _, found = sets
    assert found[60:, 5].min() > found[:60, 5].max()
