"""Weights of validation samples against the bargain that they solve, and in a selection."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
from scipy.optimize import minimize
from written_texts import written

from megatron_direct.curvature.spectrum import Directions
from megatron_direct.selection.config import SelectionConfig
from megatron_direct.selection.evidence import Evidence, excess_gradient
from megatron_direct.selection.feasible import FeasibleSet
from megatron_direct.selection.quotas import state_quotas
from megatron_direct.selection.share import Share
from megatron_direct.selection.treated_rows import summed_rows
from megatron_direct.selection.treatment import select_by_sketches
from megatron_direct.selection.valid_weights import (
    bargain,
    best_mean,
    excess_scores,
    group_weights,
    valid_groups,
)

SIZE = 64


def _scores(seed: int, groups: int, count: int) -> np.ndarray:
    """[V, N]: most samples are good for the first group, at the cost of the others."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(groups, count, p=[0.5, *np.full(groups - 1, 0.5 / (groups - 1))])
    scores = rng.standard_normal((groups, count))
    scores[kind, np.arange(count)] += np.where(kind == 0, 6.0, 2.0)
    scores[1:, kind == 0] -= 1.0
    return scores


def _weights(scores, shares, num_select, max_count=1):
    best = functools.partial(best_mean, num_select=num_select, max_count=max_count)
    return group_weights(scores, shares, best, best)


def _gains(weights: np.ndarray, scores: np.ndarray, num_select: int) -> np.ndarray:
    best = np.argsort(-(weights @ scores))[:num_select]
    return scores[:, best].mean(1) - scores.mean(1)


@pytest.mark.parametrize("max_count", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_the_weights_are_those_of_the_dual_problem(seed, max_count):
    """min over omega of log(max over w of omega.a(w)) - p.log(omega) + p.log(p), which is the
    bargain's maximum; by a search that knows nothing of w."""
    scores, shares, num_select = _scores(seed, 3, 3000), np.array([0.5, 0.3, 0.2]), 1000
    advantages = scores - scores.mean(1, keepdims=True)
    whole, rest = divmod(num_select, max_count)

    def dual(log_weights):
        weights = np.exp(np.append(log_weights, 0.0))
        best = np.sort(weights @ advantages)[::-1]
        total = max_count * best[:whole].sum() + rest * best[whole]
        return np.log(total / num_select) - shares @ np.log(weights / shares)

    found = _weights(scores, shares, num_select, max_count)
    least = minimize(dual, np.zeros(2), method="Nelder-Mead",
                     options={"xatol": 1e-6, "fatol": 1e-10}).fun
    # 100 steps of Frank and Wolfe are within 1e-4 of the maximum here; the shares are not.
    assert least - 1e-8 < dual(np.log(found[:-1] / found[-1])) < least + 1e-3
    assert dual(np.log(shares[:-1] / shares[-1])) > least + 0.05


def test_no_group_loses_and_one_would_have():
    scores, shares = _scores(5, 4, 3000), np.array([0.7, 0.1, 0.1, 0.1])
    assert _gains(shares, scores, 1000).min() < -0.1
    weights = _weights(scores, shares, 1000)
    gains = _gains(weights, scores, 1000)
    assert gains.min() > 0.1
    # What each gains, times its weight, is its share.
    np.testing.assert_allclose(weights * gains / (weights @ gains), shares, atol=0.03)


def test_where_all_gain_alike_the_weights_are_the_shares():
    rng = np.random.default_rng(0)
    common = rng.standard_normal(500)
    shares = np.array([0.5, 0.3, 0.2])
    np.testing.assert_allclose(_weights(np.tile(common, (3, 1)), shares, 100), shares)
    # However steep a group's slope: gains are measured in its own units.
    scores = common + 0.1 * rng.standard_normal((3, 500))
    steep = _weights(scores * np.array([[10.0], [1.0], [1.0]]), shares, 100)
    even = _weights(scores, shares, 100)
    np.testing.assert_allclose(steep * [10, 1, 1] / (steep @ [10, 1, 1]), even, rtol=1e-6)


def test_where_nothing_can_be_gained_the_weights_are_the_shares():
    shares = np.array([0.5, 0.3, 0.2])
    np.testing.assert_array_equal(_weights(_scores(0, 3, 500), shares, 500), shares)
    np.testing.assert_array_equal(_weights(np.ones((3, 500)), shares, 100), shares)


def made_up(seed: int) -> Evidence:
    """Two domains of a pool and of a validation set: gradients of the first are five times as much
    along their common direction, and 1 in 10 of the validation samples is of the second."""
    rng = np.random.default_rng(seed)
    first, second = np.linalg.qr(rng.standard_normal((SIZE, 2)))[0].T
    kind = np.repeat([0, 1], [600, 200])

    def rows(kind):
        means = np.where(kind[:, None] == 0, 2.0 * first, 0.4 * second)
        return (means * rng.uniform(0.5, 1.5, (len(kind), 1))
                + rng.standard_normal((len(kind), SIZE)) / np.sqrt(SIZE)).astype(np.float32)

    valid = rows(np.repeat([0, 1], [180, 20]))
    values, vectors = np.linalg.eigh(valid.T.astype(float) @ valid / 200)
    return Evidence(rows(kind), np.full(800, 50), kind, 2, np.arange(800), valid,
                    Directions(values[::-1][:8].copy(), vectors.T[::-1][:8].copy(), 4),
                    valid_datasets=np.repeat([0, 1], [180, 20]))


CONFIG = SelectionConfig(num_select=400, draw_unstable=False)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_domain_that_the_mean_leaves_out_stays(seed):
    evidence = made_up(seed)

    def of_second(**flags) -> int:
        config = dataclasses.replace(CONFIG, **flags)
        return int((evidence.datasets[select_by_sketches(
            config, evidence, 400, seed)[0].indices] == 1).sum())

    assert of_second(valid_clusters=0) < 40
    assert of_second() > 60
    # Also where nothing says which validation samples are of one domain.
    unnamed = dataclasses.replace(evidence, valid_datasets=None)
    found = select_by_sketches(CONFIG, unnamed, 400, seed)[0].indices
    assert (evidence.datasets[found] == 1).sum() > 60


@pytest.mark.parametrize("max_count", [1, 2])
def test_the_bargain_is_within_the_quotas(max_count):
    """A group whose best samples are limited weighs more, and so gains more of what is left."""
    scores = _scores(5, 2, 1000)
    kind = (scores[0] > 2).astype(int)  # 1: good for the first group
    scores -= scores.mean(1, keepdims=True)
    evidence = Evidence(
        scores.T.astype(np.float32), np.full(1000, 9), kind, 2, np.arange(1000),
        np.repeat(np.eye(2, dtype=np.float32), 4, axis=0),
        Directions(np.full(1, 1e-9), np.eye(1, 2), 1), valid_datasets=np.repeat([0, 1], 4))
    config = SelectionConfig(num_select=400, normalize_gradients=False, shrinkage_clusters=0,
                             valid_clusters=2, max_count=max_count, step_size=1e-9)
    limits = {"groups": kind, "quotas": {0: (0, 120)}}

    def gains(**given) -> np.ndarray:
        found = select_by_sketches(config, evidence, 400, 0, **given)[0].indices
        assert not given or (kind[found] == 0).sum() <= 120
        return scores[:, found].mean(1) - scores.mean(1)

    def weight(quotas) -> float:
        return bargain(config, evidence, 400, 0, quotas).weights[4:].sum()

    stated = state_quotas(kind, limits["quotas"], Share.of_rank(1000))
    assert (gains() > 0).all() and (gains(**limits) > 0).all()
    assert weight(stated) > weight(None) + 0.04
    # Where it cannot gain at all, its weight is the greatest there is, and its loss the least.
    tight = {"groups": kind, "quotas": {0: (0, 60 // max_count)}}
    least = FeasibleSet(np.zeros(1000 * max_count), 400, np.inf, state_quotas(
        **tight, share=Share.of_rank(1000)).of_selections(400, max_count)).best(
            np.tile(scores[1], max_count)).reshape(max_count, -1).sum(0) @ scores[1] / 400
    assert gains(**tight)[1] > least - 0.2


def test_weights_are_of_groups_and_sum_to_one():
    evidence = made_up(3)
    groups, weights = valid_groups(evidence, 8, 0), bargain(CONFIG, evidence, 400, 0).weights
    assert weights.sum() == pytest.approx(1) and len(weights) == 200
    for group in range(groups.max() + 1):
        here = groups == group
        assert np.ptp(weights[here]) == 0
        assert len(np.unique(evidence.valid_datasets[here])) == 1
    assert weights[180:].sum() > 0.1  # its share of the validation set
    plain = dataclasses.replace(CONFIG, contrast=False)
    np.testing.assert_array_equal(bargain(plain, evidence, 400, 0).weights, 1 / 200)


def _with_texts(evidence: Evidence, useful: np.ndarray) -> Evidence:
    """Those that are useful, of the pool's samples, have the words of the validation set."""
    rng = np.random.default_rng(0)
    pool = [rng.integers(0, 40, 30) + 50 * (not like) for like in useful]
    return dataclasses.replace(evidence, texts=written(
        pool, [rng.integers(0, 40, 30) for _ in evidence.valid_rows]))


@pytest.mark.parametrize("clusters", [0, 8])
def test_texts_count_in_proportion_to_the_spread_of_gradients(clusters):
    """Scores with texts, less those without, are the likeness that numpy finds, at the weights of
    the groups that both are found with."""
    evidence = _with_texts(made_up(4), np.arange(800) % 3 == 0)
    config = dataclasses.replace(CONFIG, text_weight=0.7, valid_clusters=clusters, step_size=1e-9)
    rows = summed_rows(config, evidence, 0)
    found = bargain(config, evidence, 400, 0)
    groups = valid_groups(evidence, 8, 0) if clusters else np.zeros(200, np.int64)
    expected = np.zeros(800)
    for group in np.unique(groups):
        here = groups == group
        excess = excess_gradient(evidence, here / here.sum(), unit=True)
        text = evidence.texts.likeness(groups)[group]
        weight = found.weights[here].sum()
        expected += weight * 0.7 * (rows @ excess).std() * (text - text.mean()) / text.std()
    np.testing.assert_allclose(found.likeness, expected, rtol=1e-6, atol=1e-9)
    target = excess_gradient(evidence, found.weights, unit=True)
    np.testing.assert_allclose(excess_scores(config, evidence, 400, 0), rows @ target,
                               rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    # At a small step nothing is curved, and the largest scores are selected.
    chosen = select_by_sketches(config, evidence, 400, 0)[0].indices
    largest = np.argsort(-(rows @ target + expected))[:400]
    assert len(np.intersect1d(chosen, largest)) >= 399  # float32 rows: one may be a near-tie


def test_texts_decide_where_gradients_are_noise():
    rng = np.random.default_rng(5)
    useful, noise = np.arange(800) % 2 == 0, made_up(5)
    evidence = _with_texts(dataclasses.replace(
        noise, rows=rng.standard_normal(noise.rows.shape).astype(np.float32)), useful)
    half = np.flatnonzero(useful)

    def chosen(**flags) -> int:
        config = dataclasses.replace(CONFIG, shrinkage_clusters=0, **flags)
        return len(np.intersect1d(select_by_sketches(config, evidence, 400, 0)[0].indices, half))

    assert chosen(text_weight=20.0) > 390
    assert 160 < chosen(text_weight=0.0) < 240  # half, with a standard deviation of 10
    assert 160 < chosen(contrast=False, text_weight=20.0) < 240
