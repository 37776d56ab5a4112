"""The search for the best mixture, where the best one is known; samples drawn by shares."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize

from megatron_direct.comparison.mixtures import best, draw_by_shares, num_annealings, search

NUM_GROUPS = 6
EVEN = np.full(NUM_GROUPS, 1 / NUM_GROUPS)


def _losses(seed: int):
    """(f, its least mixture by scipy): power laws in each group's share, as a loss of a domain
    falls with its tokens, some of which do not matter; and a penalty on a share that harms."""
    rng = np.random.default_rng(seed)
    matters = rng.dirichlet(np.full(NUM_GROUPS, 0.5))
    harm = 0.3 * (np.arange(NUM_GROUPS) == rng.integers(NUM_GROUPS))

    def loss(mixture: np.ndarray) -> float:
        return float(matters @ (mixture + 0.05) ** -0.3 + harm @ mixture)

    found = scipy.optimize.minimize(
        loss, EVEN, bounds=[(0, 1)] * NUM_GROUPS, method="SLSQP",
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1}, options={"ftol": 1e-12})
    assert found.success
    return loss, found.x


@pytest.mark.parametrize("seed", range(8))
def test_most_of_what_there_is_to_gain_is_found(seed):
    """With three rounds; a local search with so few trials does not reach all of it."""
    loss, least = _losses(seed)
    trials = search(loss, [EVEN], 3)
    assert len(trials) == num_annealings(NUM_GROUPS, 1, 3)
    gain, possible = loss(EVEN) - best(trials).loss, loss(EVEN) - loss(least)
    assert 0.7 * possible < gain <= possible + 1e-9
    assert all(abs(trial.mixture.sum() - 1) < 1e-12 and (trial.mixture >= 0).all()
               for trial in trials)


@pytest.mark.parametrize("seed", range(3))
def test_noise_below_the_gain_does_not_lead_astray(seed):
    loss, least = _losses(seed)
    rng = np.random.default_rng(seed)
    possible = loss(EVEN) - loss(least)
    trials = search(lambda w: loss(w) + 0.05 * possible * rng.standard_normal(), [EVEN], 2)
    assert loss(EVEN) - loss(best(trials).mixture) > 0.5 * possible


def test_the_least_of_noise_flatters_itself():
    """Nothing to gain: what is found seems better, and is not, on other data."""
    rng = np.random.default_rng(0)
    trials = search(lambda w: rng.standard_normal(), [EVEN], 2)
    assert best(trials).loss < -1 and len({trial.loss for trial in trials}) == len(trials)


def test_it_begins_with_the_best_of_what_is_known():
    loss, least = _losses(1)
    known = search(loss, [EVEN, least], 1)
    assert best(known).loss <= loss(least) and known[1].loss == pytest.approx(loss(least))


def test_what_diverges_is_left_behind():
    """Nothing is known of a share above 0.4, as every first probe has, but that it diverges."""
    loss, _ = _losses(0)
    trials = search(lambda w: loss(w) if w.max() < 0.4 else np.inf, [EVEN], 2)
    assert len(trials) == num_annealings(NUM_GROUPS, 1, 2)
    assert all(np.isinf(trial.loss) for trial in trials[1: 1 + NUM_GROUPS])
    assert all(np.isfinite(trial.mixture).all() for trial in trials)
    assert best(trials).loss < loss(EVEN)


def test_where_all_that_it_begins_with_diverges_the_search_ends():
    assert len(search(lambda w: np.inf, [EVEN, EVEN], 2)) == 2


@pytest.mark.parametrize("num_tokens", [500, 20_000])
def test_shares_of_tokens_are_kept(num_tokens):
    rng = np.random.default_rng(0)
    groups, labels = rng.integers(0, 4, 300), rng.integers(5, 60, 300)
    mixture = np.array([0.5, 0.3, 0.2, 0.0])
    taken = draw_by_shares(mixture, groups, labels, num_tokens, np.random.default_rng(1))
    shares = np.bincount(groups[taken], labels[taken], 4) / num_tokens
    # To half of a sample for each group.
    assert np.abs(shares - mixture).max() <= 30 / num_tokens and shares[3] == 0
    for group in range(3):  # no sample comes a second time before all came once
        counts = np.bincount(taken, minlength=300)[groups == group]
        assert counts.max() - counts.min() <= 1
    np.testing.assert_array_equal(
        taken, draw_by_shares(mixture, groups, labels, num_tokens, np.random.default_rng(1)))
