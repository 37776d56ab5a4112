"""Paired statistics against scipy, printed tables and brute force."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import scipy.stats

from megatron_direct.comparison import statistics
from megatron_direct.runtime.typed_json import from_json, to_json

DIFFERENCES = np.array([-0.031, -0.012, -0.044, 0.006, -0.027])


# Quantiles from a printed table (Fisher and Yates 1938, table III): t with P(|T| > t) = 1 - c.
@pytest.mark.parametrize(("count", "confidence", "quantile"), [
    (2, 0.95, 12.706), (3, 0.95, 4.303), (5, 0.95, 2.776), (12, 0.95, 2.201), (31, 0.95, 2.042),
    (5, 0.9, 2.132), (5, 0.99, 4.604)])
def test_student_interval(count, confidence, quantile):
    values = np.random.default_rng(count).normal(size=count)
    # The standard error by its definition.
    error = math.sqrt(sum((v - sum(values) / count) ** 2 for v in values) / (count - 1) / count)
    low, high = statistics.student_interval(values, confidence)
    assert (low + high) / 2 == pytest.approx(sum(values) / count)
    # The table has four digits.
    assert (high - low) / 2 == pytest.approx(quantile * error, rel=3e-4)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_bootstrap_of_all_resamples(count):
    values = DIFFERENCES[:count]
    means = [np.mean(resample) for resample in itertools.product(values, repeat=count)]
    assert statistics.bootstrap_interval(values) == pytest.approx(
        tuple(np.percentile(means, [2.5, 97.5])))


def test_drawn_bootstrap_is_close_to_scipys():
    values = np.random.default_rng(3).normal(size=20)
    theirs = scipy.stats.bootstrap((values,), np.mean, method="percentile",
                                   n_resamples=50_000, rng=1).confidence_interval
    # Both are draws: a quantile of 50 000 has an error of about one part in a hundred of its tail.
    assert statistics.bootstrap_interval(values) == pytest.approx(tuple(theirs), abs=0.01)
    assert statistics.bootstrap_interval(values) == statistics.bootstrap_interval(values)


def test_bootstrap_is_the_narrower_interval():
    low, high = statistics.bootstrap_interval(DIFFERENCES)
    wide_low, wide_high = statistics.student_interval(DIFFERENCES)
    assert wide_low < low < high < wide_high


@pytest.mark.parametrize("count", [2, 4, 5])
def test_sign_flips_against_scipy(count):
    values = DIFFERENCES[:count]
    theirs = scipy.stats.permutation_test((values,), np.mean, permutation_type="samples",
                                          n_resamples=np.inf)
    assert statistics.sign_flip_p_value(values) == pytest.approx(theirs.pvalue)


def test_sign_flips_that_all_agree_reach_the_least_p_value():
    # Equal values: rounding in the mean must not lose one of the two extreme patterns.
    assert statistics.sign_flip_p_value(np.full(5, 0.1)) == 2**-4
    assert statistics.sign_flip_p_value(-np.arange(1.0, 9.0)) == 2**-7


def test_sign_flips_of_many_seeds_are_drawn():
    values = np.random.default_rng(0).normal(0.3, 1, size=40)
    # The test's null distribution is near to a normal one at 40 seeds.
    expected = 2 * scipy.stats.norm.sf(abs(values.sum()) / np.sqrt((values**2).sum()))
    assert statistics.sign_flip_p_value(values) == pytest.approx(expected, abs=0.01)
    assert statistics.sign_flip_p_value(np.full(40, 1.0)) == pytest.approx(1e-5, rel=0.01)


def test_holm_by_hand():
    assert statistics.holm([0.01, None, 0.04, 0.03, 0.005]) == pytest.approx(
        [0.03, None, 0.06, 0.06, 0.02])
    assert statistics.holm([0.7, 0.8]) == [1.0, 1.0]
    assert statistics.holm([]) == []


def test_holm_against_its_definition():
    p_values = np.random.default_rng(5).uniform(size=9) ** 3
    order = np.argsort(p_values)
    expected = np.empty(9)
    for i in range(9):
        expected[order[i]] = max(min(1, (9 - j) * p_values[order[j]]) for j in range(i + 1))
    assert statistics.holm(p_values.tolist()) == pytest.approx(expected.tolist())


def test_a_family_of_differences_is_corrected_together():
    zero = _by_seed([0.0] * 5)
    family = {"clear": statistics.compare_by_seed(_by_seed([-0.1, -0.2, -0.3, -0.4, -0.5]), zero),
              "unclear": statistics.compare_by_seed(_by_seed([0.1, -0.1, 0.1, 0.2, 0.1]), zero),
              "unknown": statistics.compare_by_seed({}, zero)}
    found = statistics.corrected(family)
    assert list(found) == list(family)
    assert found["clear"].p_holm == 2 * family["clear"].p_value == 2 * 2**-4
    assert found["unclear"].p_holm == family["unclear"].p_value
    assert found["unknown"].p_holm is None
    assert (found["clear"].mean, found["clear"].verdict) == (family["clear"].mean, "better")


def test_a_difference_is_written_with_its_verdict_and_read_back_equal():
    found = statistics.compare_by_seed(_by_seed(DIFFERENCES), _by_seed([0.0] * 5))
    value = json.loads(json.dumps(to_json(found)))
    assert value["verdict"] == found.verdict and value["interval"] == list(found.interval)
    assert from_json(statistics.PairedDifference, value) == found


def _by_seed(values):
    return dict(enumerate(values))


def test_verdicts():
    reference = _by_seed(np.linspace(4.0, 4.2, 5))

    def verdict(differences):
        return statistics.compare_by_seed(
            {seed: reference[seed] + d for seed, d in enumerate(differences)}, reference).verdict

    assert verdict(-0.1 + 0.1 * DIFFERENCES) == "better"
    assert verdict(0.1 + 0.1 * DIFFERENCES) == "worse"
    assert verdict([0.1, -0.1, 0.05, -0.02, 0.0]) == "no clear difference"
    assert verdict([0.0] * 5) == "no clear difference"


def test_both_intervals_must_be_clear_of_zero():
    # The bootstrap alone would call it: all differences but the first are well below zero.
    found = statistics.compare_by_seed(_by_seed([-0.001, -0.02, -0.03]), _by_seed([0.0] * 3))
    assert found.bootstrap[1] < 0 < found.student[1]
    assert found.verdict == "no clear difference"
    assert found.interval == found.student


def test_differences_without_spread_are_certain():
    found = statistics.compare_by_seed(_by_seed([3.5] * 3), _by_seed([3.75] * 3))
    assert (found.mean, found.standard_error) == (-0.25, 0.0)
    assert found.bootstrap == found.student == (-0.25, -0.25)
    assert found.verdict == "better"


def test_seeds_without_a_partner_are_left_out_and_counted():
    arm, reference = {1: 3.0, 2: 3.5, 4: 9.0}, {1: 3.25, 2: 3.25, 3: 0.0, 5: 0.0}
    found = statistics.compare_by_seed(arm, reference)
    assert (found.num_pairs, found.num_left_out, found.mean) == (2, 3, 0.0)


@pytest.mark.parametrize("arm, mean", [({}, None), ({1: 2.0}, 0.5)])
def test_too_few_seeds_give_no_interval(arm, mean):
    found = statistics.compare_by_seed(arm, {1: 1.5})
    assert (found.mean, found.interval, found.p_value) == (mean, None, None)
    assert found.verdict == "no clear difference"


def test_losses_must_be_finite():
    with pytest.raises(ValueError, match="losses must be finite"):
        statistics.compare_by_seed({1: float("nan")}, {1: 1.0})
