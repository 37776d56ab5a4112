"""What rank 0 does for the others, while they wait outside of collectives."""

from __future__ import annotations

import time

import pytest
from ranks import RankError, run_on_ranks

from megatron_direct.runtime import parallel


def _long_work(patience, longest_hours, seconds):
    parallel._PATIENCE_SECONDS = patience
    before, parallel._LONGEST_HOURS_OF_RANK_ZERO = \
        parallel._LONGEST_HOURS_OF_RANK_ZERO, longest_hours
    try:
        return parallel.on_rank_zero(lambda: time.sleep(seconds) or "done")
    finally:
        parallel._PATIENCE_SECONDS, parallel._LONGEST_HOURS_OF_RANK_ZERO = 2.0, before


def test_rank_zero_may_work_for_longer_than_one_wait():
    assert run_on_ranks(2, _long_work, 0.1, 12.0, 1.0) == ["done", "done"]


def test_there_is_a_limit_to_it():
    """Rank 0 then waits in the message that it wants to send: the watch ends it, which this
    process group has not."""
    with pytest.raises(RankError, match="rank 0 has been at work for 0 hours.*py-spy"):
        run_on_ranks(2, _long_work, 0.1, 0.5 / 3600, 1.5)
