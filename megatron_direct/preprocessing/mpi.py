"""MPI ranks: one command on many machines.

Under ``mpirun`` every rank runs the same command and takes its share of a list that all of them
see; with one rank nothing of MPI is imported. Results do not pass between ranks: they are files.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

from megatron_direct.errors import UserError
from megatron_direct.preprocessing import optional

T = TypeVar("T")

# How Open MPI, MPICH and PMIx (also under Slurm's srun) tell a process that it is one of many.
_RANK_COUNTS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_RANK_NUMBERS = ("PMIX_RANK",)


class Ranks:
    """This process among those that mpirun started; alone where it started none."""

    def __init__(self):
        self._world = None
        count = max((int(os.environ.get(name, 1)) for name in _RANK_COUNTS), default=1)
        if count > 1 or any(name in os.environ for name in _RANK_NUMBERS):
            optional.require("mpi4py", "a run of several MPI ranks", "mpi")
            self._world = optional.require("mpi4py.MPI", "a run of several MPI ranks",
                                           "mpi").COMM_WORLD
            if self.count < count:
                raise UserError(f"mpirun started {count} ranks, but mpi4py sees {self.count}: it "
                                "is built for another MPI. Use that one's mpirun, or reinstall "
                                "mpi4py with this one's mpicc.")

    @property
    def count(self) -> int:
        return 1 if self._world is None else self._world.Get_size()

    @property
    def is_first(self) -> bool:
        return self._number == 0

    @property
    def _number(self) -> int:
        return 0 if self._world is None else self._world.Get_rank()

    def on_first(self, function: Callable[[], T]) -> T:
        """What the function returns on rank 0, on all ranks."""
        if self._world is None:
            return function()
        return self._world.bcast(function() if self.is_first else None)

    def wait(self) -> None:
        if self._world is not None:
            self._world.Barrier()

    def share(self, items: Sequence[T], sizes: Sequence[int]) -> list[T]:
        """This rank's items, in their order."""
        return [items[index] for index in share(sizes, self._number, self.count)]

    def stop_all(self) -> None:
        """Ends every rank, so that none waits for one that failed."""
        if self._world is not None and self.count > 1:
            self._world.Abort(1)


def share(sizes: Sequence[int], rank: int, count: int) -> list[int]:
    """Which items are a rank's: from the largest on, each goes to the rank with the least so far.

    Items of one size are dealt out in turn.
    """
    loads = [(0, rank) for rank in range(count)]
    mine = []
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        load, taker = heapq.heappop(loads)
        heapq.heappush(loads, (load + sizes[index], taker))
        if taker == rank:
            mine.append(index)
    return sorted(mine)
