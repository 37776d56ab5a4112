"""Arms that other teams would try: draws apart, likeness of texts, averages."""

from __future__ import annotations

import math

import numpy as np
import pytest
from indexed_files import write_dataset

from megatron_direct.comparison.arms import REGISTRY
from megatron_direct.comparison.rivals import drawn_apart
from megatron_direct.comparison.text_likeness import hashed_ngrams, ngram_likeness
from megatron_direct.curvature.spectrum import Directions
from megatron_direct.data.samples import Samples
from megatron_direct.selection.evidence import Evidence


def _evidence(rows: np.ndarray, target: np.ndarray) -> Evidence:
    count, size = rows.shape
    return Evidence(rows.astype(np.float32), np.full(count, 9), np.zeros(count, np.int64), 1,
                    np.arange(count), np.tile(target, (3, 1)).astype(np.float32),
                    Directions(np.ones(1), np.eye(1, size), 1))


def test_the_draw_avoids_what_it_has_and_what_does_not_help():
    """Two kinds that help alike, one of them in four fifths of the pool, and one that harms."""
    rng = np.random.default_rng(0)
    kinds = np.eye(3, 64)
    kind = np.repeat([0, 1, 2], [160, 40, 100])
    target = kinds[0] + kinds[1] - kinds[2]
    rows = kinds[kind] + 0.03 * rng.standard_normal((300, 64))
    counts = np.zeros(3)
    for seed in range(20):
        chosen = drawn_apart(_evidence(rows, target), 60, np.random.default_rng(seed))
        assert len(np.unique(chosen)) == 60
        counts += np.bincount(kind[chosen], minlength=3) / 20
    # In proportion it would be 48 and 12 of what helps; 20 each if all kinds were alike.
    assert counts[1] > 18 and counts[2] < 12


def test_likeness_written_out(tmp_path):
    rng = np.random.default_rng(1)
    texts = {"pool": [rng.integers(0, 50, 30) for _ in range(6)],
             "valid": [rng.integers(0, 20, 25) for _ in range(4)]}
    for name, documents in texts.items():
        write_dataset(tmp_path / name, [[text.tolist()] for text in documents])
    pool, valid = (Samples([str(tmp_path / name)], 20) for name in texts)
    found = ngram_likeness(pool, np.arange(6), valid, np.arange(4))

    counts = {name: dict.fromkeys(range(10_000), 1) for name in texts}
    cut = {name: [text[:21] for text in documents] for name, documents in texts.items()}
    for name, documents in cut.items():
        for text in documents:
            for feature in hashed_ngrams(text):
                counts[name][int(feature)] += 1
    totals = {name: sum(of_name.values()) for name, of_name in counts.items()}
    for text, score in zip(cut["pool"], found, strict=True):
        ratios = [math.log(counts["valid"][int(f)] / totals["valid"])
                  - math.log(counts["pool"][int(f)] / totals["pool"])
                  for f in hashed_ngrams(text)]
        assert len(ratios) == 2 * len(text) - 1
        assert score == pytest.approx(np.mean(ratios))
    likest = np.argsort([-np.mean(text < 20) for text in cut["pool"]])
    assert found[likest[0]] > found[likest[-1]]


def test_features_are_of_ngrams_alone_and_spread_evenly():
    text = np.arange(2000)
    features = hashed_ngrams(text)
    np.testing.assert_array_equal(features[:2000][500:502], hashed_ngrams(text[500:502])[:2])
    assert features[2000 + 500] == hashed_ngrams(text[500:502])[2]
    assert features[2000 + 500] != hashed_ngrams(text[[501, 500]])[2]  # order matters
    # 3,999 balls in 10,000 bins leave exp(-0.4) = 0.670 empty; 0.01: six standard deviations.
    assert abs(np.mean(np.bincount(features, minlength=10_000) == 0) - math.exp(-0.3999)) < 0.03


def test_averaged_arms_select_as_those_that_they_are_named_after():
    for name in ("random", "whole-pool", "direct"):
        for suffix, final in (("averaged", None), ("constant-averaged", 1.0),
                              ("moderate-averaged", 0.3)):
            arm = REGISTRY[f"{name}-{suffix}"]
            assert (arm.of, arm.needs) == (name, REGISTRY[name].needs)
            assert arm.choose is REGISTRY[name].choose
            assert arm.recipe.average > 0 and arm.recipe.final == final
            assert REGISTRY[name].recipe == type(arm.recipe)()
    assert REGISTRY["stable-averaged"].recipe is None
