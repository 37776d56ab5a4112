"""The halves of the validation set that judge each other's scores."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from selection.test_worth import SIZE, M, N, made_up

from megatron_direct.selection.auto import select_auto, settle, worth_of
from megatron_direct.selection.config import SelectionConfig
from megatron_direct.selection.halves import divide, halves_of, source_blocks


def test_blocks_are_runs_within_a_dataset_and_both_halves_have_each_dataset():
    evidence = dataclasses.replace(made_up(0)[0],
                                   valid_datasets=np.repeat([0, 1, 2], [100, 26, 2]))
    blocks = source_blocks(evidence)
    assert (np.diff(blocks) >= 0).all() and set(np.diff(blocks)) == {0, 1}
    for dataset in range(3):
        here = blocks[evidence.valid_datasets == dataset]
        assert set(here % 2) == {0, 1}
    assert not set(blocks[:100]) & set(blocks[100:])


def test_many_datasets_share_blocks():
    """What is held of each candidate, one number a block, does not grow with them."""
    evidence = dataclasses.replace(made_up(0)[0], valid_datasets=np.repeat(np.arange(M // 2), 2))
    blocks = source_blocks(evidence)
    np.testing.assert_array_equal(np.unique(blocks), np.arange(32))
    np.testing.assert_array_equal(blocks.reshape(-1, 2) % 2, [[0, 1]] * (M // 2))


def _of_sources(sources, datasets=None):
    return dataclasses.replace(made_up(0)[0], valid_datasets=datasets,
                               valid_sources=np.asarray(sources))


def _sizes(blocks, datasets=None):
    """Samples in either half, of each dataset."""
    datasets = np.zeros(M, int) if datasets is None else datasets
    return np.array([np.bincount(datasets[blocks % 2 == half], minlength=datasets.max() + 1)
                     for half in (0, 1)])


@pytest.mark.parametrize("scattered", [False, True])
def test_a_source_is_in_one_block(scattered):
    """Of sizes from 1 to 15, and named by any numbers."""
    sources = 1000 * np.repeat(np.arange(16), np.arange(16))[:M] + 7
    if scattered:
        sources = np.random.default_rng(0).permutation(sources)
    evidence = _of_sources(np.resize(sources, M))
    blocks = source_blocks(evidence)
    for source in np.unique(evidence.valid_sources):
        assert len(set(blocks[evidence.valid_sources == source])) == 1
    np.testing.assert_array_equal(np.unique(blocks), np.arange(blocks.max() + 1))
    assert blocks.max() % 2 == 1  # equally many blocks in either half
    first, second = _sizes(blocks).sum(1)
    assert abs(first - second) <= 2  # the largest first: the small ones even it out
    assert divide(evidence).num_sources == len(np.unique(evidence.valid_sources))
    one, other = halves_of(evidence, seed=3)
    assert not set(evidence.valid_sources[one.valid]) & set(evidence.valid_sources[other.valid])


def test_a_source_that_is_in_several_datasets_is_in_one_half():
    """Each of 12 sources has documents in both; either half has about half of each dataset."""
    rng = np.random.default_rng(1)
    datasets = np.repeat([0, 1], [96, 32])
    sources = np.concatenate([rng.integers(12, size=96), rng.integers(12, size=32)])
    blocks = source_blocks(_of_sources(sources, datasets))
    for source in range(12):
        assert len(set(blocks[sources == source])) == 1
    np.testing.assert_allclose(_sizes(blocks, datasets), [[48, 16]] * 2, atol=6)


def test_samples_of_no_known_source_count_as_of_one_with_those_around_them():
    """The second dataset has no sources; the first has six."""
    datasets = np.repeat([0, 1], [64, 64])
    sources = np.concatenate([np.resize(np.arange(6), 64), np.full(64, -1)])
    evidence = _of_sources(sources, datasets)
    blocks = source_blocks(evidence)
    for source in range(6):
        assert len(set(blocks[sources == source])) == 1
    changes = np.flatnonzero(np.diff(blocks[64:])) + 1
    assert set(changes % 4) == {0}  # sixteen runs of four
    np.testing.assert_allclose(_sizes(blocks, datasets), [[32, 32]] * 2, atol=6)
    assert str(divide(evidence)) == ("6 sources, each in one of them, and runs of consecutive "
                                     "documents whose sources are not known, or too few")


@pytest.mark.parametrize("of_first", [np.zeros(64), np.resize([0, 0, 0, 100], 64)])
def test_a_dataset_of_a_single_source_is_in_both_halves(of_first):
    """64 samples of one source, then of one that the second dataset has too, beside 64 of 32."""
    datasets = np.repeat([0, 1], [64, 64])
    sources = np.concatenate([of_first, 100 + np.arange(64) // 2]).astype(int)
    blocks = source_blocks(_of_sources(sources, datasets))
    assert (_sizes(blocks, datasets) >= 16).all()
    alone = 101 + np.arange(31)  # no sample of the first dataset is of these
    for source in alone:
        assert len(set(blocks[sources == source])) == 1


@pytest.mark.parametrize("sizes", [[M], [64, 64], [32] * 4, [100, 14, 14], [65, *[9] * 7],
                                   [70, *[2] * 29]])
def test_few_or_unequal_sources_are_as_if_they_were_not_known(sizes):
    """Four blocks in either half it takes, or no interval says anything; a source that is half of
    all would be alone."""
    found = divide(_of_sources(np.repeat(np.arange(len(sizes)), sizes)))
    assert not found.is_by_source
    np.testing.assert_array_equal(found.blocks, source_blocks(made_up(0)[0]))
    assert str(found).endswith(f"its {len(sizes)} sources are too few, or too unequal, to divide")


def test_eight_equal_sources_are_enough():
    found = divide(_of_sources(np.repeat(np.arange(8), 16)))
    assert found.is_by_source and sorted(set(found.blocks)) == list(range(8))


def _how_many(evidence):
    config = SelectionConfig()
    return select_auto(config, evidence, worth_of(config, evidence, 0), 0)[2]


def _alike_within_sources(seed: int):
    """Validation samples have a direction for each of their 8 sources and none in common; half of
    the candidates have one of these directions, too. The sources of a test set would be others."""
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((8, SIZE)) / np.sqrt(SIZE)
    sources = rng.permutation(np.arange(M) % 8)
    rows, valid = (rng.standard_normal((count, SIZE)) / np.sqrt(SIZE) for count in (N, M))
    rows[rng.permutation(N)[: N // 2]] += directions[np.arange(N // 2) % 8]
    return dataclasses.replace(
        made_up(0)[0], rows=rows.astype(np.float32),
        valid_rows=(valid + directions[sources]).astype(np.float32), valid_sources=sources)


def test_what_repeats_within_sources_alone_is_nothing_to_choose_by():
    """Of one source in both halves, it seems to repeat: sources that are not known cost this."""
    chosen = {True: 0, False: 0}
    for seed in range(10):
        evidence = _alike_within_sources(seed)
        for known in chosen:
            one = evidence if known else dataclasses.replace(evidence, valid_sources=None)
            config = SelectionConfig()
            found = settle(config, one, worth_of(config, one, seed), N * 100 // 32, seed)
            chosen[known] += found.num_select < N
    assert chosen[True] == 0 and chosen[False] >= 5


def test_it_says_how_many_sources_there_are():
    found = str(_how_many(_of_sources(np.arange(M) % 20)))
    assert "are judged by the other: 20 sources, each in one of them" in found
