"""The worth of groups against sums written out sample by sample, and its honesty."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from selection.test_spread_selection import ThreadRanks

from megatron_direct.curvature.spectrum import Directions
from megatron_direct.selection.auto import worth_of
from megatron_direct.selection.config import SelectionConfig
from megatron_direct.selection.evidence import Evidence
from megatron_direct.selection.group_worth import group_worths, members_of, typical_samples
from megatron_direct.selection.halves import first_coordinates, source_blocks
from megatron_direct.selection.shrinkage import Partition
from megatron_direct.selection.worth import measure_alignments

DIM = 24
CONFIG = SelectionConfig(shrinkage_clusters=2)


def _evidence(rows, valid, ids=None, all_reduce_sum=lambda array: array):
    count = len(rows)
    return Evidence(rows.astype(np.float32), np.ones(count, int), np.zeros(count, int), 1,
                    np.arange(count) if ids is None else ids, valid.astype(np.float32),
                    Directions(np.ones(1), np.eye(1, DIM), 1), all_reduce_sum)


def _unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _instance(seed=0, count=60, num_valid=20):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((count, DIM)), rng.standard_normal((num_valid, DIM)) + 0.3,
            rng.integers(0, 3, count))


def _worths(evidence, groups, num_best, seed=1):
    """groups: [N] numbers."""
    return group_worths(measure_alignments(evidence, seed),
                        evidence.share().known_to_all(evidence.labels),
                        members_of(groups, len(num_best)), num_best,
                        worth_of(CONFIG, evidence, seed))


def test_worths_written_out():
    rows, valid, groups = _instance()
    tokens = np.random.default_rng(2).integers(1, 9, len(rows))
    evidence = dataclasses.replace(_evidence(rows, valid), labels=tokens)
    number = np.array([5, 0, 8])
    found = _worths(evidence, groups, number)
    # Four folds: half of the blocks, and of the coordinates; judged by the two other halves.
    blocks, first = source_blocks(evidence), first_coordinates(DIM, 1)
    folds = worth_of(CONFIG, evidence, 1).folds
    sides = [(part, half) for part in (first, ~first) for half in (0, 1)]
    for group, worth in enumerate(found):
        here = np.flatnonzero(groups == group)
        cosines = (_unit(rows) @ _unit(valid).T).mean(1)
        assert worth.whole.value == pytest.approx(np.average(cosines[here], weights=tokens[here]),
                                                  abs=1e-6)
        assert worth.whole.low < worth.whole.value < worth.whole.high
        if number[group] == 0:
            assert worth.best is None
            continue
        judged = []
        for fold, (part, half) in zip(folds, sides, strict=True):
            best = here[np.argsort(-fold.score[here])[: number[group]]]
            others = _unit(valid)[blocks % 2 != half].mean(0)
            alignments = 2 * _unit(rows)[best][:, ~part] @ others[~part]
            judged.append(np.average(alignments, weights=tokens[best]))
        assert worth.best.value == pytest.approx(np.mean(judged), abs=1e-6)


def test_choosing_among_noise_is_worth_nothing():
    """What one half of the validation set flatters, the other does not."""
    rng = np.random.default_rng(3)
    flattered, fitted = [], []
    for seed in range(40):
        rows, valid = rng.standard_normal((80, DIM)), rng.standard_normal((16, DIM))
        found, = _worths(_evidence(rows, valid), np.zeros(80, int), [10], seed)
        fitted.append(found.best.value)
        flattered.append(np.sort(_unit(rows) @ _unit(valid).mean(0))[-10:].mean())
    error = np.std(fitted) / np.sqrt(len(fitted))
    assert abs(np.mean(fitted)) < 3 * error
    assert np.mean(flattered) > 10 * error  # so the test can fail


def test_the_best_part_of_a_group_with_a_harmful_half_is_worth_more_than_the_group():
    rng = np.random.default_rng(4)
    rows = rng.standard_normal((80, DIM)) + np.where(np.arange(80) < 40, 0.8, -0.8)[:, None]
    valid = rng.standard_normal((32, DIM)) + 0.5
    found, = _worths(_evidence(rows, valid), np.zeros(80, int), [40])
    truth = (_unit(rows) @ _unit(valid).mean(0))[:40].mean()
    assert found.whole.high < found.best.low and found.best.value == pytest.approx(truth, rel=0.1)


def test_the_interval_covers_what_more_validation_samples_would_say():
    """Of 60 draws of a validation set, about 9 in 10 intervals hold the worth to the population."""
    rng = np.random.default_rng(5)
    rows, population = rng.standard_normal((30, DIM)) + 0.2, rng.standard_normal((4000, DIM)) + 0.4
    truth = (_unit(rows) @ _unit(population).mean(0)).mean()
    inside = 0
    for seed in range(60):
        valid = population[rng.choice(4000, 64, replace=False)]
        found, = _worths(_evidence(rows, valid), np.zeros(30, int), [3], seed)
        inside += found.whole.low <= truth <= found.whole.high
    assert 44 <= inside <= 60  # 54 expected; below 44 has a probability of 1e-4


def test_too_few_validation_samples_leave_the_best_part_open():
    rows, valid, groups = _instance(num_valid=1)
    evidence = _evidence(rows, valid)
    for worth in group_worths(measure_alignments(evidence, 1), evidence.labels,
                              members_of(groups, 3), [1, 1, 1], None):
        assert worth.best is None and worth.whole.low == worth.whole.value == worth.whole.high


def test_typical_samples_are_the_nearest_to_the_mean():
    rows, valid, groups = _instance(7)
    found = typical_samples(_evidence(rows, valid), Partition(groups, 3), 4)
    for group, samples in enumerate(found):
        here = np.flatnonzero(groups == group)
        nearness = _unit(rows)[here] @ _unit(rows)[here].mean(0)
        np.testing.assert_array_equal(samples, here[np.argsort(-nearness)[:4]])


def test_spread_rows_give_the_same():
    rows, valid, groups = _instance(9)
    number, meeting = np.array([5, 2, 8]), ThreadRanks(2)
    expected = _worths(_evidence(rows, valid), groups, number)

    def on_rank(rank):
        ids = np.arange(len(rows))[rank::2]
        return _worths(_evidence(rows[ids], valid, ids,
                                 lambda array: meeting.all_reduce_sum(rank, array)),
                       groups, number)

    for found in meeting.run(on_rank):
        for one, other in zip(found, expected, strict=True):
            assert one.whole.value == pytest.approx(other.whole.value, abs=1e-7)
            assert one.best.value == pytest.approx(other.best.value, abs=1e-7)
            assert one.best.low == pytest.approx(other.best.low, abs=1e-7)
