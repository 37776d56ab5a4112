"""Shares of ranks, and workers that end before their time."""

from __future__ import annotations

import os
import signal

import pytest

from megatron_direct.errors import UserError
from megatron_direct.preprocessing import processes


def _nothing() -> None:
    pass


def _square(number: int) -> int:
    return number**2


def _kill_at_three(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_cover_all_once_and_are_even(size):
    sizes = [(7 * n) % 23 + 1 for n in range(60)]
    shares = [processes.share(sizes, rank, size) for rank in range(size)]
    assert sorted(index for mine in shares for index in mine) == list(range(60))
    assert all(mine == sorted(mine) for mine in shares)
    loads = [sum(sizes[index] for index in mine) for mine in shares]
    # The rank with the most got its last item as the one with the least.
    assert max(loads) - min(loads) <= max(sizes)


@pytest.mark.parametrize("workers", [1, 2])
def test_all_tasks_are_done_and_drawn_as_they_are_needed(workers):
    drawn = []

    def tasks():
        for number in range(20):
            drawn.append(number)
            yield number

    results = []
    for result in processes.run(_square, tasks(), workers, _nothing):
        results.append(result)
        assert len(drawn) <= len(results) + workers + 1
    assert sorted(results) == [n**2 for n in range(20)]


def test_a_killed_worker_is_told():
    with pytest.raises(UserError, match="a worker process was killed.*carries on"):
        list(processes.run(_kill_at_three, range(20), 2, _nothing))


def test_a_package_that_is_not_installed_is_told():
    from megatron_direct.preprocessing import optional

    with pytest.raises(UserError, match=r"x.zst needs the package no_such_package.*"
                                        r"pip install 'megatron-direct\[data\]'"):
        optional.require("no_such_package.part", "x.zst", "data")
