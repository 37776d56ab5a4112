"""Features of tokens against their definitions, and that shuffled text shows."""

from __future__ import annotations

import numpy as np
import pytest
from indexed_files import write_dataset

from megatron_direct.data.samples import Samples
from megatron_direct.data.token_features import TokenSource, token_features
from megatron_direct.selection.distilled import Sketched


def _sentences(rng, count, words):
    """Text in which a word tells the next: of pairs (2 i, 2 i + 1)."""
    return [np.stack([2 * (pair := rng.choice(words // 2, 20)), 2 * pair + 1], 1).ravel()
            for _ in range(count)]


def _sources(folder) -> tuple[TokenSource, TokenSource]:
    """The pool's and the validation set's."""
    pool = Samples([str(folder / "a"), str(folder / "b")], 64)
    return TokenSource(pool, np.arange(90)), TokenSource(
        Samples([str(folder / "valid")], 64), np.arange(20))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sets")


@pytest.fixture(scope="module")
def sets(folder):
    rng = np.random.default_rng(0)
    sound = _sentences(rng, 60, 60)
    shuffled = [rng.permutation(text) for text in sound[:20]]
    texts = {"a": sound[20:] + shuffled, "b": _sentences(rng, 30, 200),
             "valid": _sentences(rng, 20, 200)}
    for name, documents in texts.items():
        write_dataset(folder / name, [[text.tolist()] for text in documents])
    return texts, token_features(*_sources(folder), 0)


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


def test_losses_of_a_smaller_model_stand_beside_the_others(sets, folder):
    rng = np.random.default_rng(1)
    losses = np.concatenate([3 + rng.standard_normal(60), 6 + 2 * rng.standard_normal(30)])
    losses[[5, 70]] = np.nan, np.inf
    found = token_features(*_sources(folder), 0, losses)
    np.testing.assert_array_equal(np.delete(found, (8, 9), axis=1), sets[1])
    for first, last, unknown in ((0, 60, 5), (60, 90, 70)):
        finite = np.delete(np.arange(first, last), unknown - first)
        np.testing.assert_allclose(found[finite, 8], losses[finite], rtol=1e-6)
        assert found[unknown, 8] == pytest.approx(losses[finite].mean(), rel=1e-6)
        # Of mean 0 and variance 1 over the samples of one dataset whose losses are known.
        assert found[finite, 9].mean() == pytest.approx(0, abs=1e-6)
        assert found[finite, 9].var() == pytest.approx(1, rel=1e-5)
        assert found[unknown, 9] == 0
    np.testing.assert_array_equal(token_features(*_sources(folder), 0, np.full(90, 2.0))[:, 9], 0)


def test_a_target_that_follows_the_losses_is_predicted_by_them_alone(tmp_path):
    """Of 800 samples half have sketches; worth is what the smaller model knows, and noise."""
    rng = np.random.default_rng(2)
    for name, count in (("pool", 800), ("valid", 20)):
        write_dataset(tmp_path / name, [[t.tolist()] for t in _sentences(rng, count, 200)])
    pool, valid = (TokenSource(Samples([str(tmp_path / name)], 64), np.arange(count))
                   for name, count in (("pool", 800), ("valid", 20)))
    losses = rng.standard_normal(800)
    worth = -losses + 0.3 * rng.standard_normal(800)
    known = np.zeros(800, dtype=bool)
    known[rng.permutation(800)[:400]] = True
    correlations = {}
    for name, given in (("tokens", None), ("losses", losses)):
        _, found = Sketched(token_features(pool, valid, 0, given), known,
                            worth[known] > np.median(worth), worth[known],
                            np.full(400, 20)).extended(400, 0)
        correlations[name] = found.rank_correlation
    # A rank correlation of 400 independent pairs has a standard error of 0.05; with no noise, and
    # no other feature, it would be that of worth and losses, 0.95.
    assert abs(correlations["tokens"]) < 0.2 and correlations["losses"] > 0.6
