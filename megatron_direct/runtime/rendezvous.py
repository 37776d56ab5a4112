"""How the ranks of a launch find each other: the store through which torch.distributed begins.

torchrun's agents hold one, and tell where. Else rank 0 holds it, at an address that the launcher's
variables tell (Slurm, or MASTER_ADDR and MASTER_PORT), or that MPI carries to the others.
"""

from __future__ import annotations

import contextlib
import datetime
import socket
from dataclasses import dataclass

import torch.distributed as dist

from megatron_direct.errors import UserError
from megatron_direct.runtime import attempts, mpi
from megatron_direct.runtime.ranks import Rank

# However long a collective may take: some nodes fetch their containers later than others.
_TIME_TO_MEET = datetime.timedelta(minutes=10)
_SECONDS_TO_CONNECT = 5.0  # to one address of several
_SECONDS_TO_LEAVE = 30.0


@dataclass(frozen=True)
class Meeting:
    """Where the ranks of a launch met."""

    here: Rank
    store: dist.Store

    def leave(self) -> None:
        """At the end of a run that went well: rank 0, which holds the store, is the last to go."""
        if self.here.launcher not in ("", "torchrun"):
            if self.store.add("rendezvous/left", 1) == self.here.world_size:
                self.store.set("rendezvous/all-left", "yes")
            if self.here.rank == 0:
                with contextlib.suppress(RuntimeError):
                    self.store.wait(["rendezvous/all-left"],
                                    datetime.timedelta(seconds=_SECONDS_TO_LEAVE))
        mpi.shut_down()


def meet(here: Rank, timeout: datetime.timedelta) -> Meeting:
    """All ranks of a launch call this. Raises UserError where they do not meet."""
    if here.launcher == "torchrun":
        if here.master_addr:
            _require_resolves(here.master_addr)
        return Meeting(here, attempts.torchrun_store(timeout))
    if here.world_size == 1:
        return Meeting(here, dist.HashStore())
    if here.master_addr:
        _require_resolves(here.master_addr)
    timeout = min(timeout, _TIME_TO_MEET)
    return Meeting(here, _at_address(here, timeout) if here.master_addr else _by_mpi(here, timeout))


def _at_address(here: Rank, timeout: datetime.timedelta) -> dist.Store:
    address = f"{here.master_addr}:{here.master_port}"
    try:
        return dist.TCPStore(here.master_addr, here.master_port, here.world_size,
                             is_master=here.rank == 0, timeout=timeout)
    except RuntimeError as error:
        text = str(error).splitlines()[0]
        if "EADDRINUSE" in str(error) or "in use" in str(error):
            raise UserError(f"port {here.master_port} of {here.master_addr} is taken by another "
                            "program. Set MASTER_PORT to one that is free, for all "
                            "ranks.") from error
        raise UserError(
            f"the {here.world_size} ranks of this launch did not meet at {address} within "
            f"{timeout.total_seconds():g} s ({text}). Rank 0 must run there, all must be started, "
            "and no firewall may stand between them; MASTER_ADDR and MASTER_PORT name another "
            "address.") from error


def _by_mpi(here: Rank, timeout: datetime.timedelta) -> dist.Store:
    world = mpi.world(here.launcher)
    if world.size != here.world_size:
        raise UserError(
            f"{here.launcher} started {here.world_size} ranks, but mpi4py sees {world.size}: it is "
            "built for another MPI. Use that one's mpirun, or reinstall mpi4py with this one's "
            "mpicc, or give all ranks MASTER_ADDR and MASTER_PORT.")
    store = None
    if here.rank == 0:  # any port that is free
        store = dist.TCPStore("0.0.0.0", 0, here.world_size, is_master=True, timeout=timeout,
                              wait_for_workers=False)
    port, addresses = world.communicator.bcast(
        None if store is None else (store.port, _addresses(world.num_nodes)))
    if store is None:
        store = dist.TCPStore(_reachable(addresses, port), port, here.world_size, is_master=False,
                              timeout=timeout, wait_for_workers=False)
    return store


def _addresses(num_nodes: int) -> list[str]:
    """Of this node, in the order in which the others are to try them."""
    if num_nodes == 1:
        return ["127.0.0.1"]
    import psutil

    found = [address.address for of_interface in psutil.net_if_addrs().values()
             for address in of_interface if address.family == socket.AF_INET]
    return [socket.gethostname(), *(a for a in found if not a.startswith("127."))]


def _reachable(addresses: list[str], port: int) -> str:
    for address in addresses:
        with contextlib.suppress(OSError), \
                socket.create_connection((address, port), _SECONDS_TO_CONNECT):
            return address
    raise UserError(f"{socket.gethostname()} reaches rank 0 at none of its addresses "
                    f"({', '.join(addresses)}, port {port}). Set MASTER_ADDR and MASTER_PORT to "
                    "one that the network between the nodes lets through.")


def _require_resolves(name: str) -> None:
    try:
        socket.getaddrinfo(name, None)
    except OSError as error:
        raise UserError(
            f"{socket.gethostname()} does not know the host {name!r}, where rank 0 is to be met "
            f"({error.strerror or error}). Set MASTER_ADDR (for torchrun --rdzv-endpoint, and "
            "--local-addr on each node) to a name or an IP address that all nodes "
            "know.") from error
