"""What rank 0 does for the others, while they wait outside of collectives."""

from __future__ import annotations

import time

from ranks import run_on_ranks

from megatron_direct.errors import UserError
from megatron_direct.runtime import parallel


def _long_work():
    return parallel.on_rank_zero(lambda: time.sleep(1.0) or "done")


def test_rank_zero_may_work_for_longer_than_one_look():
    assert run_on_ranks(2, _long_work) == ["done", "done"]


def _give_up():
    before, parallel._LONGEST_HOURS_OF_RANK_ZERO = \
        parallel._LONGEST_HOURS_OF_RANK_ZERO, 0.2 / 3600
    try:
        return None if parallel.is_rank_zero() else parallel._wait_for_rank_zero()
    except UserError as error:
        return str(error)
    finally:
        parallel._LONGEST_HOURS_OF_RANK_ZERO = before


def test_there_is_a_limit_to_it():
    _, words = run_on_ranks(2, _give_up)
    assert words.startswith("rank 0 has been at work for 0 hours while the other ranks waited")
