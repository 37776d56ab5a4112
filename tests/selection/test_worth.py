"""The worth of groups against sums written out sample by sample, and its honesty."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from megatron_direct.curvature.spectrum import Directions
from megatron_direct.selection.evidence import Evidence
from megatron_direct.selection.shrinkage import Partition
from megatron_direct.selection.worth import cosines, group_worths, typical_samples

DIM = 24


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
            rng.integers(0, 3, count), np.arange(num_valid) < num_valid // 2)


def test_worths_written_out():
    rows, valid, groups, halves = _instance()
    number = np.array([5, 0, 8])
    found = group_worths(_evidence(rows, valid), Partition(groups, 3), number, halves, seed=1)

    def cosine_with(which):
        return (_unit(rows) @ _unit(valid)[which].T).mean(1)

    for group, worth in enumerate(found):
        here = np.flatnonzero(groups == group)
        assert worth.whole.value == pytest.approx(cosine_with(slice(None))[here].mean(), abs=1e-6)
        assert worth.whole.low < worth.whole.value < worth.whole.high
        if number[group] == 0:
            assert worth.best is None
            continue
        both = []
        for fitted in (halves, ~halves):
            best = here[np.argsort(-cosine_with(fitted)[here])[: number[group]]]
            both.append(cosine_with(~fitted)[best].mean())
        assert worth.best.value == pytest.approx(np.mean(both), abs=1e-6)


def test_choosing_among_noise_is_worth_nothing():
    """What one half of the validation set flatters, the other does not."""
    rng = np.random.default_rng(3)
    flattered, fitted = [], []
    for seed in range(40):
        rows, valid = rng.standard_normal((80, DIM)), rng.standard_normal((16, DIM))
        found, = group_worths(_evidence(rows, valid), Partition(np.zeros(80, int), 1),
                              np.array([10]), np.arange(16) < 8, seed)
        fitted.append(found.best.value)
        flattered.append(np.sort(cosines(rows, valid.mean(0)[None])[:, 0])[-10:].mean())
    error = np.std(fitted) / np.sqrt(len(fitted))
    assert abs(np.mean(fitted)) < 3 * error
    assert np.mean(flattered) > 10 * error  # so the test can fail


def test_the_interval_covers_what_more_validation_samples_would_say():
    """Of 60 draws of a validation set, about 9 in 10 intervals hold the worth to the population."""
    rng = np.random.default_rng(5)
    rows, population = rng.standard_normal((30, DIM)) + 0.2, rng.standard_normal((4000, DIM)) + 0.4
    truth = (_unit(rows) @ _unit(population).mean(0)).mean()
    inside = 0
    for seed in range(60):
        valid = population[rng.choice(4000, 64, replace=False)]
        found, = group_worths(_evidence(rows, valid), Partition(np.zeros(30, int), 1),
                              np.array([3]), np.arange(64) < 32, seed)
        inside += found.whole.low <= truth <= found.whole.high
    assert 44 <= inside <= 60  # 54 expected; below 44 has a probability of 1e-4


def test_typical_samples_are_the_nearest_to_the_mean():
    rows, valid, groups, _ = _instance(7)
    found = typical_samples(_evidence(rows, valid), Partition(groups, 3), 4)
    for group, samples in enumerate(found):
        here = np.flatnonzero(groups == group)
        nearness = _unit(rows)[here] @ _unit(rows)[here].mean(0)
        np.testing.assert_array_equal(samples, here[np.argsort(-nearness)[:4]])


def test_spread_rows_give_the_same():
    rows, valid, groups, halves = _instance(9)
    number = np.array([5, 2, 8])
    expected = group_worths(_evidence(rows, valid), Partition(groups, 3), number, halves, 1)
    parts, found, barrier = {}, {}, threading.Barrier(2)

    def on_rank(rank):
        def all_reduce_sum(array):
            parts[rank] = np.array(array, dtype=float)
            barrier.wait(60)
            total = parts[0] + parts[1]
            barrier.wait(60)
            return total

        ids = np.arange(len(rows))[rank::2]
        found[rank] = group_worths(_evidence(rows[ids], valid, ids, all_reduce_sum),
                                   Partition(groups[ids], 3), number, halves, 1)

    threads = [threading.Thread(target=on_rank, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for rank in range(2):
        for one, other in zip(found[rank], expected, strict=True):
            assert one.whole.value == pytest.approx(other.whole.value, abs=1e-7)
            assert one.best.value == pytest.approx(other.best.value, abs=1e-7)
            assert one.best.low == pytest.approx(other.best.low, abs=1e-7)
