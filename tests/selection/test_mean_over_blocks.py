"""Means over blocks of the validation set, and their intervals, where sources differ in size."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import scipy.stats
from selection.test_worth import SIZE, made_up

from megatron_direct.selection.group_worth import CONFIDENCE, WorthEstimate
from megatron_direct.selection.halves import source_blocks
from megatron_direct.selection.how_many import gain_of
from megatron_direct.selection.worth import mean_over_blocks

# Samples of each of 40 sources, by Zipf's law, 260 in all: the largest has 60.
ZIPF = np.maximum(1, np.round(256 / np.arange(1, 41) / (1 / np.arange(1, 41)).sum())).astype(int)


def _block_parts(source_sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """([B, S] share of each source in a block's samples, [B] samples)."""
    sources = np.repeat(np.arange(len(source_sizes)), source_sizes)
    evidence = dataclasses.replace(made_up(0)[0], valid_sources=sources, valid_rows=np.zeros(
        (len(sources), SIZE), np.float32))
    blocks = source_blocks(evidence)
    samples = np.zeros((blocks.max() + 1, len(source_sizes)))
    np.add.at(samples, (blocks, sources), 1)
    return samples / samples.sum(1, keepdims=True), samples.sum(1)


def test_blocks_of_equal_size_give_the_textbook_interval():
    values = np.random.default_rng(0).standard_normal(16)
    found = mean_over_blocks(values, np.full(16, 8.0))
    assert found.value == pytest.approx(values.mean())
    assert found.variance == pytest.approx(values.var(ddof=1) / 16, rel=1e-12)
    assert found.degrees == pytest.approx(15, rel=1e-12)
    interval = scipy.stats.t.interval(CONFIDENCE, 15, values.mean(), scipy.stats.sem(values))
    estimate = WorthEstimate.of(values, np.full(16, 8.0))
    assert (estimate.low, estimate.high) == pytest.approx(interval)


def test_where_each_source_has_an_effect_of_its_own_nothing_seems_to_be_gained():
    """Effects of sources do not average out within a source, whatever its size."""
    parts, sizes = _block_parts(ZIPF)
    effects = np.random.default_rng(0).standard_normal((10_000, len(ZIPF)))
    false_gains = sum(gain_of(parts @ effect, sizes, 0.0).low > 0 for effect in effects)
    # Exceeded with a chance of 1e-4 at the nominal rate, one side of 99.9 %. Were
    # variances taken to fall with size, it would be 2 %.
    assert false_gains <= scipy.stats.binom.ppf(1 - 1e-4, len(effects), 0.0005)


@pytest.mark.parametrize("alike", [True, False])
def test_the_variance_of_a_mean_over_blocks_of_unequal_size(alike):
    """Unbiased where all blocks vary alike; not too small where variance falls with size."""
    sizes = _block_parts(ZIPF)[1]
    scale = np.ones(len(sizes)) if alike else np.sqrt(sizes.mean() / sizes)
    values = np.random.default_rng(1).standard_normal((4000, len(sizes))) * scale
    shares = sizes / sizes.sum()
    truth = float(shares**2 @ scale**2)
    found = np.array([mean_over_blocks(one, sizes).variance for one in values]) / truth
    error = found.std() / np.sqrt(len(found))
    assert found.mean() - 1 > -4 * error
    assert found.mean() - 1 < 4 * error + (0 if alike else 0.1)


def test_a_single_block_has_an_interval_without_width():
    estimate = WorthEstimate.of(np.array([0.3]), np.array([5.0]))
    assert estimate.low == estimate.value == estimate.high == 0.3
