"""The elbow against its definition, by enumeration."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_direct.curvature.spectrum import PAPER_ENERGY_SHARE, find_elbow

# Whole numbers, so that sums are exact and ties do occur.
eigenvalue_lists = st.lists(st.integers(-20, 100), min_size=1, max_size=12).map(
    lambda values: np.sort(np.array(values, dtype=np.float64))[::-1]
)
shares = st.sampled_from([0.25, 0.5, 0.75, 1.0])  # exact in binary


@settings(derandomize=True, database=None, deadline=None)
@given(eigenvalue_lists, shares, st.none() | st.integers(0, 2000))
def test_elbow_is_the_smallest_that_holds_the_share(eigenvalues, share, total):
    elbow = find_elbow(eigenvalues, share, total_energy=total)
    positive = [value for value in eigenvalues if value > 0]
    energy = max(sum(positive), total or 0)
    holding = [k for k in range(len(positive) + 1) if sum(positive[:k]) >= share * energy]
    assert elbow.energy == energy
    assert elbow.reached == bool(holding)
    assert elbow.num_stiff == (holding[0] if holding else len(positive))
    assert elbow.whole_operator == (total is not None and total >= sum(positive))
    if energy > 0:
        assert elbow.held_share == pytest.approx(sum(positive[: elbow.num_stiff]) / energy)
        assert elbow.reached == (elbow.held_share >= share)


def test_share_of_the_paper_by_default():
    # 90, 95 and 100 of 100: 0.945 needs the second.
    assert PAPER_ENERGY_SHARE == 0.945
    assert find_elbow(np.array([90.0, 5.0, 5.0])).num_stiff == 2


def test_negative_eigenvalues_are_flat_and_have_no_energy():
    elbow = find_elbow(np.array([3.0, 1.0, -50.0]), 1.0)
    assert elbow.num_stiff == 2 and elbow.energy == 4.0
    assert find_elbow(np.array([-1.0, -2.0])).num_stiff == 0


def test_says_what_the_share_is_relative_to():
    eigenvalues = np.array([6.0, 3.0, 1.0])
    assert "energy of the whole operator is not known" in str(find_elbow(eigenvalues, 0.9))
    reached = find_elbow(eigenvalues, 0.8, total_energy=11.0)
    assert str(reached) == (
        "2 of 3 leading pairs hold 0.8182 of the operator's energy: elbow at 0.8"
    )
    short = find_elbow(eigenvalues, 0.9, total_energy=20.0)
    assert not short.reached and short.num_stiff == 3
    assert "3 of 3 leading pairs hold 0.5000" in str(short)
    assert "elbow at 0.9 is not reached" in str(short)


def test_a_total_below_the_computed_pairs_is_not_called_the_operators_energy():
    eigenvalues = np.array([6.0, 3.0, 1.0])
    elbow = find_elbow(eigenvalues, 0.8, total_energy=9.0)
    assert elbow.energy == 10.0 and elbow.num_stiff == 2 and not elbow.whole_operator
    assert str(elbow).startswith(
        "2 of 3 leading pairs hold 0.9000 of the energy of the pairs computed"
    )
    # All pairs of the operator, whose trace was rounded.
    assert find_elbow(eigenvalues, 0.8, total_energy=10.0 - 1e-5).whole_operator


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "eigenvalues must be \\[k\\], k >= 1, got shape \\(0,\\)"),
        (([[1.0]],), "eigenvalues must be \\[k\\], k >= 1, got shape \\(1, 1\\)"),
        (([1.0, 2.0],), "must be finite and descending"),
        (([np.nan, 1.0],), "must be finite and descending"),
        (([1.0], 0.0), "energy_share must be in \\(0, 1\\], got 0.0"),
        (([1.0], 1.1), "energy_share must be in \\(0, 1\\], got 1.1"),
        (([1.0], np.nan), "energy_share must be in \\(0, 1\\]"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        find_elbow(*arguments)


@pytest.mark.parametrize("total", [-1.0, np.nan, np.inf])
def test_bad_total_energy(total):
    with pytest.raises(ValueError, match="total_energy must be finite and >= 0"):
        find_elbow(np.array([1.0]), total_energy=total)
