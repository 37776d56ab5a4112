"""Worth, the number of samples and stability, on sketches of which the truth is known."""

from __future__ import annotations

import dataclasses
import tracemalloc

import numpy as np
import pytest
from selection.test_spread_selection import ThreadRanks, uneven_shares
from written_texts import written

from megatron_direct.curvature.spectrum import Directions
from megatron_direct.errors import UserError
from megatron_direct.selection.auto import select_auto, settle, worth_of
from megatron_direct.selection.choice import choose, drawn_within
from megatron_direct.selection.config import SelectionConfig
from megatron_direct.selection.evidence import Evidence, stiff_costs
from megatron_direct.selection.halves import first_coordinates, source_blocks
from megatron_direct.selection.how_many import (
    effective_tokens,
)
from megatron_direct.selection.stability import halves, stability
from megatron_direct.selection.worth import (
    alignments_with_pool,
    cluster_numbers,
    measure_alignments,
)

N, M, SIZE, TOKENS = 600, 128, 512, 100
CONFIG = SelectionConfig()


def made_up(seed: int, kind: str = "equal") -> tuple[Evidence, np.ndarray]:
    """(sketches, [N] bool: what harms). Every gradient is noise and a share of the validation
    gradient. equal: the same share of it in all; no-target: in none, nor in the validation set's;
    harmful: the opposite in a quarter, which is two clusters of eight.
    """
    rng = np.random.default_rng(seed)
    target = rng.standard_normal(SIZE)
    target /= np.linalg.norm(target)
    cluster, shares, harms = np.arange(N) * 8 // N, np.full(N, 0.1), np.zeros(N, dtype=bool)
    centers = np.zeros((8, SIZE))
    if kind == "no-target":
        shares[:] = 0
    if kind == "harmful":
        harms = cluster < 2
        shares[harms] = -0.1
        centers = rng.standard_normal((8, SIZE)) / np.sqrt(SIZE)
        centers -= np.outer(centers @ target, target)
    rows = rng.standard_normal((N, SIZE)) / np.sqrt(SIZE) + centers[cluster] + np.outer(
        shares, target)
    valid = rng.standard_normal((M, SIZE)) / np.sqrt(SIZE)
    if kind != "no-target":
        valid += 0.5 * target
    values, vectors = np.linalg.eigh(valid.T @ valid / M)
    directions = Directions(values[::-1][:16].copy(), vectors.T[::-1][:16].copy(), 8)
    return Evidence(rows.astype(np.float32), np.full(N, TOKENS), np.zeros(N, np.int64), 1,
                    np.arange(N), valid.astype(np.float32), directions), harms


def _auto(evidence: Evidence, seed: int):
    return select_auto(CONFIG, evidence, worth_of(CONFIG, evidence, seed), seed)


def _is_whole_pool(seed: int, kind: str, contrast: bool) -> bool:
    config, evidence = SelectionConfig(contrast=contrast), made_up(seed, kind)[0]
    # A short annealing: repetition costs nothing, so that only the worth decides.
    found = settle(config, evidence, worth_of(config, evidence, seed), N * TOKENS // 32, seed)
    return found.num_select == N


@pytest.mark.parametrize("contrast", [True, False])
@pytest.mark.parametrize("kind", ["equal", "no-target"])
def test_where_nothing_is_to_be_gained_the_whole_pool_is_selected(kind, contrast):
    # All of these 12; the slow test states the rate.
    assert all(_is_whole_pool(seed, kind, contrast) for seed in range(12))


@pytest.mark.slow
@pytest.mark.parametrize("contrast", [True, False])
@pytest.mark.parametrize("kind", ["equal", "no-target"])
def test_the_whole_pool_is_selected_in_at_least_95_of_100_seeds(kind, contrast):
    assert sum(_is_whole_pool(seed, kind, contrast) for seed in range(100)) >= 95


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_harmful_quarter_is_left_out(seed):
    evidence, harms = made_up(seed, "harmful")
    selection, costs, how_many = _auto(evidence, seed)
    assert costs.least <= costs.average and len(selection.indices) == how_many.num_select < N
    assert harms[selection.indices].mean() < 0.02
    assert how_many.over_pool.low > 0 and how_many.over_random.low > 0
    assert abs(how_many.num_harmful - harms.sum()) < 0.1 * N
    assert "predicted gain over the whole pool +" in str(how_many)


@pytest.mark.parametrize("seed", [0, 1])
def test_in_contrast_a_harmful_quarter_is_left_out_of_half(seed):
    evidence, harms = made_up(seed, "harmful")
    config = SelectionConfig(num_select=N // 2)
    assert harms[choose(config, evidence, seed, {}).selection.indices].mean() < 0.02


@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_drawn_in_contrast_is_sound_by_the_excess(seed):
    """A direction that all samples have in common, to differing degrees, which the curvature is of
    and which says nothing of what a sample is worth beside the pool."""
    rng = np.random.default_rng(seed)
    common, useful = np.linalg.qr(rng.standard_normal((SIZE, 2)))[0].T
    harms = rng.random(N) < 0.25
    noise = rng.standard_normal((N + M, SIZE)) / np.sqrt(SIZE)
    rows = np.outer(0.6 * (1 + 0.3 * rng.standard_normal(N)), common) + np.outer(
        np.where(harms, -0.1, 0.1), useful) + noise[:N]
    valid = 0.6 * common + 0.16 * useful + noise[N:]
    values, vectors = np.linalg.eigh(valid.T @ valid / M)
    evidence = Evidence(rows.astype(np.float32), np.full(N, TOKENS), np.zeros(N, np.int64), 1,
                        np.arange(N), valid.astype(np.float32),
                        Directions(values[::-1][:64].copy(), vectors.T[::-1][:64].copy(), 8))
    config = SelectionConfig(num_select=N // 2)
    drawn, solved = (harms[choose(config_, evidence, seed, {}).selection.indices].sum()
                     for config_ in (config, dataclasses.replace(config, draw_unstable=False)))
    assert solved < 15 and drawn <= solved + 5


def test_alignments_with_the_pool_written_out():
    evidence, _ = made_up(3)
    with_pool = alignments_with_pool(evidence, seed=5)
    rows = evidence.rows / np.linalg.norm(evidence.rows, axis=1, keepdims=True)
    first = first_coordinates(SIZE, 5)
    for part, some in enumerate((first, ~first)):
        expected = 2 * rows[:, some] @ rows[:, some].mean(0)
        np.testing.assert_allclose(with_pool[part], expected, atol=1e-6)


def test_weights_by_tokens_are_refused_in_contrast():
    with pytest.raises(UserError, match="add --no-contrast"):
        SelectionConfig(weight_by_tokens=True)
    SelectionConfig(weight_by_tokens=True, objective="flat-energy", num_select=1)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_of_a_pool_that_is_worth_nothing_no_part_is_taken(seed):
    """All of it points away from the target, half of it more so: the part that does less harm is
    not the better one for being the smaller."""
    rng = np.random.default_rng(seed)
    target = np.eye(SIZE)[0]
    rows = rng.standard_normal((N, SIZE)) / np.sqrt(SIZE) - np.outer(
        np.where(rng.random(N) < 0.5, 0.1, 0.3), target)
    valid = rng.standard_normal((M, SIZE)) / np.sqrt(SIZE) + 0.5 * target
    evidence = dataclasses.replace(made_up(seed)[0], rows=rows.astype(np.float32),
                                   valid_rows=valid.astype(np.float32))
    selection, _, how_many = _auto(evidence, seed)
    assert how_many.worth_of_pool < 0 and how_many.is_whole_pool
    np.testing.assert_array_equal(selection.indices, np.arange(N))


def test_nothing_to_gain_is_said():
    evidence, _ = made_up(0, "equal")
    selection, _, how_many = _auto(evidence, 0)
    np.testing.assert_array_equal(selection.indices, np.arange(N))
    assert how_many.is_whole_pool and "nothing to gain" in str(how_many)


def test_nothing_to_gain_is_the_whole_pool_once_whatever_counts_are_allowed():
    evidence, _ = made_up(0, "equal")
    found = choose(dataclasses.replace(CONFIG, max_count=3), evidence, 0, {})
    np.testing.assert_array_equal(found.selection.indices, np.arange(N))


def test_a_number_that_is_given_is_the_number():
    evidence, _ = made_up(0, "harmful")
    config = dataclasses.replace(CONFIG, num_select=50)
    found = choose(config, evidence, 0, {})
    assert len(found.selection.indices) == 50 and found.how_many is None


def test_the_pool_once_is_the_length_where_none_is_given():
    evidence, _ = made_up(1, "harmful")
    given = dataclasses.replace(CONFIG, anneal_tokens=77)
    assert choose(given, evidence, 1, {}).how_many.annealing_tokens == 77
    assert choose(CONFIG, evidence, 1, {}).how_many.annealing_tokens == N * TOKENS


def test_alignments_written_out():
    """Cosines in each half of the coordinates, twice, averaged over the samples of each block."""
    evidence, _ = made_up(3)
    found, blocks = measure_alignments(evidence, seed=5), source_blocks(evidence)
    first = first_coordinates(SIZE, 5)
    assert first.sum() == SIZE // 2
    rows, valid = ((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(float)
                   for x in (evidence.rows, evidence.valid_rows))
    for part, some in enumerate((first, ~first)):
        for block in (0, 7):
            expected = 2 * rows[:, some] @ valid[blocks == block][:, some].mean(0)
            # 1e-6: lengths are of float32 rows.
            np.testing.assert_allclose(found.values[part, block], expected, atol=1e-6)


def test_effective_tokens_at_the_ends():
    unique = np.array([50.0, 100.0, 400.0])
    np.testing.assert_allclose(effective_tokens(unique, 100.0, 1e9), 100, rtol=1e-6)
    # Without end the fresh tokens count 1 + R times.
    assert effective_tokens(np.array([1.0]), 1e6, 15.0)[0] == pytest.approx(16)
    assert effective_tokens(np.array([1.0]), 4.0, 15.0)[0] == pytest.approx(
        1 + 15 * (1 - np.exp(-3 / 15)))


@pytest.mark.parametrize("ranks", [2, 3])
def test_spread_rows_give_the_same_worth(ranks):
    evidence, _ = made_up(4, "harmful")
    whole = _auto(evidence, 4)
    meeting, shares = ThreadRanks(ranks), uneven_shares(N, ranks, np.random.default_rng(ranks))

    def work(rank):
        here = shares[rank]
        part = dataclasses.replace(
            evidence, rows=evidence.rows[here], labels=evidence.labels[here],
            datasets=evidence.datasets[here], ids=here,
            all_reduce_sum=lambda array: meeting.all_reduce_sum(rank, array))
        return _auto(part, 4)

    for found, costs, how_many in meeting.run(work):
        np.testing.assert_array_equal(found.indices, whole[0].indices)
        np.testing.assert_allclose((costs.least, costs.average),
                                   (whole[1].least, whole[1].average), rtol=1e-5)
        assert how_many.num_select == whole[2].num_select < N


def test_too_small_a_validation_set_is_refused():
    evidence = made_up(0)[0]
    few = dataclasses.replace(evidence, valid_rows=evidence.valid_rows[:7])
    with pytest.raises(UserError, match="--num-select auto .* 7 samples are too few"):
        worth_of(CONFIG, few, 0)


def test_stability_counts_what_two_halves_share():
    clusters = np.repeat([0, 1], [6, 4])
    first, second = np.zeros(10, bool), np.zeros(10, bool)
    first[[0, 1, 2, 6]], second[[0, 1, 6, 7]] = True, True
    found = stability(first, second, clusters)
    # Two of the first cluster, one of the second.
    assert found.samples == 3 / 4 and found.clusters == 3 / 4
    assert found.by_chance == pytest.approx((3 * 2 / 6 + 1 * 2 / 4) / 4)


def test_a_selection_of_noise_does_not_repeat_and_one_of_substance_does():
    shared = {}
    for kind in ("equal", "harmful"):
        evidence, _ = made_up(2, kind)
        count = N // 2 if kind == "equal" else 450
        shared[kind] = stability(*halves(CONFIG, evidence, count, 2),
                                 cluster_numbers(CONFIG, evidence, 2))
    # Half of the pool at random shares half of it; 0.05: two standard errors of 300 draws.
    assert abs(shared["equal"].samples - shared["equal"].by_chance) < 0.08
    assert shared["harmful"].clusters > 0.9 and shared["harmful"].samples > 0.8


def test_texts_that_say_nothing_repeat_no_more_than_chance():
    """Each half has n-grams of its own: those of one sample are the same in both."""
    evidence, _ = made_up(4, "no-target")
    rng = np.random.default_rng(0)
    usual = 1 / np.arange(1, 2001)
    texts = written(*([rng.choice(2000, 60, p=usual / usual.sum()) for _ in range(count)]
                      for count in (N, M)))
    config = dataclasses.replace(CONFIG, text_weight=3.0)
    found = stability(*halves(config, dataclasses.replace(evidence, texts=texts), N // 2, 4),
                      cluster_numbers(config, evidence, 4))
    # 0.08: two standard errors of 300 draws, and what the lengths of texts have in common.
    assert abs(found.samples - found.by_chance) < 0.08


def test_memory_beside_the_rows_is_a_hundred_numbers_a_candidate():
    """64 alignments of each in float32, and what the solver needs."""
    rng, count = np.random.default_rng(0), 8_000
    rows = rng.standard_normal((count, 16)).astype(np.float32)
    valid = (rng.standard_normal((M, 16)) + 2 * np.eye(16)[0]).astype(np.float32)
    tracemalloc.start()
    try:
        for config in (CONFIG, SelectionConfig(num_select=count // 2)):
            choose(config, Evidence(rows, np.full(count, TOKENS), np.zeros(count, np.int64), 1,
                                    np.arange(count), valid,
                                    Directions(np.ones(8), np.eye(8, 16), 4)), 0, {})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 110 * 8 * count


@pytest.mark.parametrize(("flags", "words"), [
    ({"quotas": ("a:1:2",)}, "--quotas needs a number of samples"),
    ({"objective": "flat-energy"}, "--num-select auto is for --objective descent"),
])
def test_auto_is_refused_where_a_number_is_needed(flags, words):
    with pytest.raises(UserError, match=words):
        SelectionConfig(**flags).require_number_where_needed()
    SelectionConfig(num_select=3, **flags).require_number_where_needed()


@pytest.mark.parametrize("count", [0, True, 2.5, "many"])
def test_a_number_is_an_integer_of_at_least_one(count):
    with pytest.raises(UserError, match="--num-select is"):
        SelectionConfig(num_select=count)


def test_the_draw_keeps_what_repeats_and_the_share_of_each_cluster():
    rng = np.random.default_rng(6)
    clusters, chosen = rng.integers(0, 4, 400), rng.random(400) < 0.4
    kept, allowed = chosen & (rng.random(400) < 0.5), chosen | (rng.random(400) < 0.5)
    drawn = drawn_within(chosen, kept, allowed, clusters, seed=1)
    assert (drawn >= kept).all() and (drawn <= allowed).all() and not (drawn == chosen).all()
    np.testing.assert_array_equal(np.bincount(clusters[drawn]), np.bincount(clusters[chosen]))
    # One sample that is no longer kept, but may be drawn, displaces one other at most.
    fewer = kept.copy()
    fewer[np.flatnonzero(kept)[0]] = False
    assert (drawn_within(chosen, fewer, allowed, clusters, seed=1) != drawn).sum() <= 2
    assert (drawn_within(chosen, kept, allowed, clusters, seed=2) != drawn).sum() > 20


def test_a_choice_draws_only_what_does_not_repeat():
    evidence, harms = made_up(5, "harmful")
    config = dataclasses.replace(CONFIG, num_select=300)
    drawn = choose(config, evidence, 5, {})
    solved = choose(dataclasses.replace(config, draw_unstable=False), evidence, 5, {})
    shared = np.intersect1d(drawn.selection.indices, solved.selection.indices)
    first, second = halves(config, evidence, 300, 5)
    repeats = np.intersect1d(solved.selection.indices, np.flatnonzero(first & second))
    assert set(repeats) <= set(drawn.selection.indices) and len(drawn.selection.indices) == 300
    assert len(repeats) < len(shared) < 300 and harms[drawn.selection.indices].mean() < 0.02
    np.testing.assert_array_equal(np.flatnonzero(drawn.repeating.again), repeats)
    np.testing.assert_array_equal(np.flatnonzero(solved.repeating.again), repeats)
    assert drawn.repeating.others_drawn and not solved.repeating.others_drawn
    assert drawn.stability == solved.stability and drawn.stability.samples > 0.3
    costs = stiff_costs(evidence.rows, evidence.directions)
    assert drawn.selection.stiff_cost == pytest.approx(costs[drawn.selection.indices].sum())
    clusters = cluster_numbers(config, evidence, 5)
    np.testing.assert_array_equal(*(np.bincount(clusters[c.selection.indices], minlength=8)
                                    for c in (drawn, solved)))


def test_quotas_and_budgets_leave_the_selection_as_it_was_solved():
    evidence, _ = made_up(5)
    config = dataclasses.replace(CONFIG, num_select=30)
    quotas = {"groups": np.arange(N) % 2, "quotas": {0: (10, 12)}}
    assert choose(config, evidence, 0, quotas).stability is None
    assert choose(dataclasses.replace(config, stiff_budget=1e9), evidence, 0, {}).stability is None
