"""Quotas as they are stated: what is refused, and by which error."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_direct.selection import InfeasibleQuotas
from megatron_direct.selection.quotas import state_quotas
from megatron_direct.selection.share import Share

GROUPS = np.array(["a", "b", "a", "c", "b", "a"])


def test_codes_follow_the_quotas_and_bounds_the_sizes():
    stated = state_quotas(GROUPS, {"b": (1, 9), "a": (0, 2)},
                          Share.of_rank(6)).of_selections(3)
    assert stated.codes.tolist() == [1, 0, 1, 2, 0, 1] and stated.codes.itemsize == 1
    assert stated.bounds.tolist() == [[1, 2], [0, 2], [0, 1]]
    assert [members.tolist() for members in stated.members] == [[1, 4], [0, 2, 5], [3]]
    mask = np.array([True, True, True, False, False, False])
    assert stated.counts(mask).tolist() == [1, 2, 0] and stated.admit(mask)
    assert not stated.admit(np.array([True, False, True, True, False, False]))  # no b
    assert not stated.admit(np.array([True, True, True, False, False, True]))  # three of a


def test_no_quotas():
    assert state_quotas(None, None, Share.of_rank(6)) is None


@pytest.mark.parametrize(("quotas", "num_select", "message"), [
    ({"a": (4, 5)}, 5, "group 'a' has 3 samples, but its quota asks for at least 4; lower it"),
    ({"a": (2, 1)}, 3, r"0 <= least <= greatest, found \(2, 1\)"),
    ({"a": (-1, 1)}, 3, r"0 <= least <= greatest, found \(-1, 1\)"),
    ({"a": (3, 3), "b": (1, 2)}, 3, "admit from 4 to 6 samples, but num_select is 3 .'a': 3 to 3"),
    ({"a": (0, 1), "b": (0, 0)}, 3, "admit from 0 to 2 samples, but num_select is 3"),
])
def test_quotas_that_nothing_meets(quotas, num_select, message):
    with pytest.raises(InfeasibleQuotas, match=message):
        state_quotas(GROUPS, quotas, Share.of_rank(6)).of_selections(num_select)


@pytest.mark.parametrize(("groups", "quotas", "message"), [
    (None, {"a": (0, 1)}, "quotas need both.*give both, or neither"),
    (GROUPS, None, "quotas need both"),
    (GROUPS[:5], {"a": (0, 1)}, r"groups must have shape \(6,\), found \(5,\); give a label"),
    (GROUPS, {"a": 2}, r"group 'a' must be two integers \(least, greatest\), found 2"),
    (GROUPS, {"a": (0.5, 1)}, r"must be two integers \(least, greatest\), found \(0.5, 1\)"),
])
def test_malformed_quotas_are_another_error(groups, quotas, message):
    with pytest.raises(ValueError, match=message) as error:
        state_quotas(groups, quotas, Share.of_rank(6))
    assert not isinstance(error.value, InfeasibleQuotas)
