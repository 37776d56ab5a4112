"""The others wait for rank 0 outside of collectives (tests/mcore/test_grid.py), not for ever."""

from __future__ import annotations

from ranks import run_on_ranks

from megatron_direct.errors import UserError
from megatron_direct.runtime import parallel


def _give_up():
    before, parallel._LONGEST_HOURS_OF_RANK_ZERO = \
        parallel._LONGEST_HOURS_OF_RANK_ZERO, 0.2 / 3600
    try:
        return None if parallel.is_rank_zero() else parallel._wait_for_rank_zero()
    except UserError as error:
        return str(error)
    finally:
        parallel._LONGEST_HOURS_OF_RANK_ZERO = before


def test_there_is_a_limit_to_waiting_for_rank_zero():
    _, words = run_on_ranks(2, _give_up)
    assert words.startswith("rank 0 has been at work for 0 hours while the other ranks waited")
