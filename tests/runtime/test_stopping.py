"""Signals are noted, and heeded where it is safe."""

from __future__ import annotations

import os
import signal

import pytest
from ranks import run_on_ranks

from megatron_direct.runtime import parallel, stopping


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_a_request(number, code):
    with stopping.signals_noted() as noted:
        assert stopping.requested() is None
        os.kill(os.getpid(), number)
        assert stopping.requested() == number
        assert noted.recv(1) == bytes([number])  # another thread learns of it at once
        with pytest.raises(stopping.Stopped) as stopped, stopping.interruptible():
            pass
    assert stopped.value.exit_code == code
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert stopping.requested() is None


def test_long_work_of_one_rank_is_interrupted():
    with stopping.signals_noted(), pytest.raises(stopping.Stopped, match="SIGTERM.*resumes"), \
            stopping.interruptible():
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("it went on")


def test_what_a_resumed_run_begins_with_is_saved_first():
    with stopping.signals_noted(), pytest.raises(stopping.Stopped):
        with stopping.postponed(), stopping.interruptible():
            os.kill(os.getpid(), signal.SIGTERM)
            saved = True
        assert saved
        with stopping.interruptible():
            pytest.fail("it went on")


def test_a_second_sigterm_changes_nothing():
    """It comes by two ways, where a launcher passes on what its scheduler sends to everyone."""
    with stopping.signals_noted():
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stopping.requested() == signal.SIGTERM


def _ask(rank_asked):
    rank = parallel.rank_and_size()[0]
    with stopping.signals_noted():
        before = parallel.stop_is_agreed()
        if rank == rank_asked:
            os.kill(os.getpid(), signal.SIGTERM)
        parallel.barrier()
        return before, parallel.stop_is_agreed(), stopping.requested()


def test_all_ranks_stop_where_one_is_asked():
    assert run_on_ranks(2, _ask, 1) == [(False, True, signal.SIGTERM)] * 2


def _stop_rank_zero():
    def work():
        os.kill(os.getpid(), signal.SIGTERM)

    with stopping.signals_noted():
        try:
            parallel.on_rank_zero(work)
        except stopping.Stopped as stopped:
            return stopped.exit_code


def test_all_ranks_stop_with_rank_zero():
    assert run_on_ranks(2, _stop_rank_zero) == [143, 143]
