"""Shares of ranks."""

from __future__ import annotations

import pytest

from megatron_direct.errors import UserError
from megatron_direct.preprocessing import optional, shares


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_cover_all_once_and_are_even(size):
    sizes = [(7 * n) % 23 + 1 for n in range(60)]
    dealt = [shares.share(sizes, rank, size) for rank in range(size)]
    assert sorted(index for mine in dealt for index in mine) == list(range(60))
    assert all(mine == sorted(mine) for mine in dealt)
    loads = [sum(sizes[index] for index in mine) for mine in dealt]
    # The rank with the most got its last item as the one with the least.
    assert max(loads) - min(loads) <= max(sizes)


def test_a_package_that_is_not_installed_is_named():
    with pytest.raises(UserError, match=r"x.zst needs the package no_such_package.*"
                                        r"pip install -e '.\[data\]'"):
        optional.require("no_such_package.part", "x.zst", "data")
