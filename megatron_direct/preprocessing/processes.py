"""Who does the work: worker processes of one machine, and MPI ranks over many.

Under ``mpirun`` every rank runs the same command and takes its share of a list that all of them
see; with one rank nothing of MPI is imported. Results do not pass between ranks: they are files.
"""

from __future__ import annotations

import heapq
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, ProcessPoolExecutor, wait
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
                                "is built for another MPI. Use that one's mpirun, or install "
                                "mpi4py anew with this one's mpicc.")

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
        result = function() if self.is_first else None
        return result if self._world is None else self._world.bcast(result)

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


def run(function: Callable[[T], object], tasks: Iterable[T], workers: int,
        start: Callable, *arguments) -> Iterator:
    """``function`` of each task, in the order in which they end.

    ``start(*arguments)`` prepares each process. No more tasks are drawn than there are workers, and
    one to follow, so tasks may be large. Raises UserError where a worker is killed.
    """
    if workers <= 1:
        start(*arguments)
        yield from map(function, tasks)
        return
    # Processes are spawned: a fork would copy threads, and the state of MPI.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker,
                             (start, *arguments)) as pool:
        pending = set()
        try:
            for task in tasks:
                pending.add(pool.submit(function, task))
                if len(pending) > workers:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        except BrokenExecutor as error:
            raise UserError("a worker process was killed; most often the memory ran out. The same "
                            "command carries on where it was: run it with fewer --workers, or a "
                            "smaller --shard-size.") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker(start: Callable, *arguments) -> None:
    # A worker whose parent is killed would wait for tasks forever.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    start(*arguments)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
