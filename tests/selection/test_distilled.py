"""A selection among a share, extended to the others: in its proportions, by what it followed."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize

from megatron_direct.selection.config import SelectionConfig
from megatron_direct.selection.distilled import Sketched, _drawn, _fit, draw_share, for_share

N, SHARE = 4000, 0.1


def _pool(seed: int = 0):
    """Four kinds, told by noisy features; of the kinds 0.9, 0.5, 0.1 and nothing is selected."""
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, 4, N)
    features = np.concatenate([np.eye(4)[kinds] + 0.1 * rng.standard_normal((N, 4)),
                               rng.standard_normal((N, 30))], axis=1).astype(np.float32)
    chances = np.array([0.9, 0.5, 0.1, 0.0])[kinds]
    known = np.zeros(N, dtype=bool)
    known[draw_share(np.arange(N), SHARE, seed)] = True
    selected = (rng.random(N) < chances)[known]
    worth = chances + 0.1 * rng.standard_normal(N)
    return kinds, chances, Sketched(features, known, selected, worth[known],
                                    np.full(known.sum(), 7)), known


@pytest.mark.parametrize("seed", range(3))
def test_the_others_are_selected_in_the_same_proportions(seed):
    kinds, chances, sketched, known = _pool(seed)
    wanted = round(chances.sum())
    taken, distilled = sketched.extended(wanted, seed)
    assert taken.sum() == wanted == distilled.num_select
    np.testing.assert_array_equal(taken[known], sketched.selected)
    shares = [taken[(kinds == kind) & ~known].mean() for kind in range(4)]
    # About 100 of each kind were seen: a standard error of 0.05 at 0.5.
    np.testing.assert_allclose(shares, [0.9, 0.5, 0.1, 0.0], atol=0.15)
    # The fit is shrunk, so that some of the likeliest are left, and some others are taken.
    assert distilled.rank_correlation > 0.8 and -0.1 < distilled.lost < 0.3
    np.testing.assert_array_equal(taken, sketched.extended(wanted, seed)[0])


def test_features_that_say_nothing_lose_everything():
    _, chances, sketched, known = _pool()
    rng = np.random.default_rng(5)
    blind = Sketched(rng.standard_normal((N, 34)).astype(np.float32), known, sketched.selected,
                     sketched.worth, sketched.labels)
    taken, distilled = blind.extended(round(chances.sum()), 0)
    # A draw of 150 of 400 whose worths deviate by 0.37: the gain of 0.36 has an error of 0.03.
    assert distilled.lost == pytest.approx(1, abs=0.25)
    assert abs(distilled.rank_correlation) < 0.15


def test_all_or_nothing():
    _, _, sketched, known = _pool()
    everything = Sketched(sketched.features, known, np.ones(known.sum(), bool), sketched.worth,
                          sketched.labels)
    taken, distilled = everything.extended(N, 0)
    assert taken.all() and distilled.lost is None


def test_the_fit_is_the_least_of_its_loss():
    rng = np.random.default_rng(0)
    features, selected = rng.standard_normal((80, 3)), rng.random(80) < 0.3

    def loss(parameters):
        margins = np.where(selected, 1, -1) * (features @ parameters[:3] + parameters[3])
        return np.logaddexp(0, -margins).sum() + 2.0 * (parameters[:3] ** 2).sum() / 2

    least = scipy.optimize.minimize(loss, np.zeros(4), method="Nelder-Mead",
                                    options={"xatol": 1e-8, "fatol": 1e-12, "maxiter": 5000}).x
    expected = 1 / (1 + np.exp(-(features @ least[:3] + least[3])))
    np.testing.assert_allclose(_fit(features, selected, 2.0)(features), expected, atol=1e-4)


def test_the_draw_includes_with_its_chances():
    """Means over 4,000 draws, of a standard error below 0.008; Pareto's own bias is O(1 / K)."""
    chances = np.repeat([0.1, 0.4, 0.7], 20)
    rng = np.random.default_rng(0)
    included = np.zeros(60)
    for _ in range(4000):
        drawn = _drawn(chances, 24, rng)  # the sum of the chances
        assert len(np.unique(drawn)) == 24
        included[drawn] += 1 / 4000
    np.testing.assert_allclose(included.reshape(3, 20).mean(1), [0.1, 0.4, 0.7], atol=0.015)


def test_a_larger_share_has_the_smaller_one():
    usable = np.arange(100, 1100)
    shares = [draw_share(usable, share, 3) for share in (0.01, 0.1, 0.5, 1.0)]
    assert [len(share) for share in shares] == [10, 100, 500, 1000]
    for small, large in zip(shares, shares[1:], strict=False):
        assert set(small) <= set(large) and np.all(np.diff(large) > 0)


def test_the_problem_of_a_share():
    assert for_share(SelectionConfig(num_select=500), 0.1, 0.2).num_select == 50
    auto = for_share(SelectionConfig(anneal_tokens=1000), 0.1, 0.2)
    assert (auto.num_select, auto.anneal_tokens) == ("auto", 200)
    assert for_share(SelectionConfig(), 0.1, 0.2).anneal_tokens is None
