"""Ranks that do not find each other: each is told why, within the time that it has."""

from __future__ import annotations

import datetime
import socket
import sys

import pytest

from megatron_direct.errors import UserError
from megatron_direct.runtime import mpi, rendezvous
from megatron_direct.runtime.ranks import Rank

SOON = datetime.timedelta(seconds=1)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_a_rank_that_does_not_come_is_reported():
    port = _free_port()
    here = Rank(0, 2, launcher="srun", master_addr="127.0.0.1", master_port=port)
    with pytest.raises(UserError, match=f"the 2 ranks of this launch did not meet at 127.0.0.1:"
                                        f"{port} within 1 s"):
        rendezvous.meet(here, SOON)


def test_rank_zero_that_is_not_there_is_reported():
    here = Rank(1, 2, launcher="srun", master_addr="127.0.0.1", master_port=_free_port())
    with pytest.raises(UserError, match="did not meet at .* Rank 0 must run there"):
        rendezvous.meet(here, SOON)


def test_a_port_that_is_taken_is_named():
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        here = Rank(0, 2, launcher="srun", master_addr="127.0.0.1", master_port=port)
        with pytest.raises(UserError, match=f"port {port} of 127.0.0.1 is taken"):
            rendezvous.meet(here, SOON)


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_a_name_that_nobody_knows_is_reported_at_once(launcher):
    here = Rank(1, 2, launcher=launcher, master_addr="no-such-host.invalid", master_port=1)
    with pytest.raises(UserError, match="does not know the host 'no-such-host.invalid', where"):
        rendezvous.meet(here, datetime.timedelta(minutes=10))


def test_without_mpi4py_the_message_says_what_else_there_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    mpi._world.cache_clear()
    with pytest.raises(UserError, match=r"MPICH started this process, and mpi4py, .* cannot be "
                                        r"imported .*or give all ranks MASTER_ADDR and "
                                        r"MASTER_PORT"):
        rendezvous.meet(Rank(0, 2, launcher="MPICH"), SOON)


def test_no_address_of_rank_zero_that_answers_is_named(monkeypatch):
    monkeypatch.setattr(rendezvous, "_SECONDS_TO_CONNECT", 0.2)
    port = _free_port()
    with pytest.raises(UserError, match=rf"reaches rank 0 at none of its addresses \(127.0.0.1, "
                                        rf"127.0.0.2, port {port}\). Set MASTER_ADDR"):
        rendezvous._reachable(["127.0.0.1", "127.0.0.2"], port)
    with socket.socket() as other:
        other.bind(("127.0.0.2", port))
        other.listen()
        assert rendezvous._reachable(["127.0.0.1", "127.0.0.2"], port) == "127.0.0.2"


def test_nodes_of_an_mpi_launch_are_given_addresses_that_others_can_reach():
    assert rendezvous._addresses(1) == ["127.0.0.1"]
    name, *numbers = rendezvous._addresses(2)
    assert name == socket.gethostname()
    assert not any(number.startswith("127.") for number in numbers)
