"""One command on many machines: what each rank of a launch does.

Every rank runs the same command and takes its share of a list that all of them see. Results do not
pass between ranks: they are files. A process that was started alone imports no torch.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import TypeVar

from megatron_direct.runtime.ranks import Rank

T = TypeVar("T")


class Ranks:
    """This process among those of its launch, whose process group is set up if they are several."""

    def __init__(self, here: Rank):
        self._here = here

    @property
    def count(self) -> int:
        return self._here.world_size

    @property
    def is_first(self) -> bool:
        return self._here.rank == 0

    def on_first(self, function: Callable[[], T]) -> T:
        """What the function returns on rank 0, on all ranks."""
        if self.count == 1:
            return function()
        from megatron_direct.runtime import parallel

        return parallel.on_rank_zero(function)

    def wait(self) -> None:
        if self.count > 1:
            from megatron_direct.runtime import parallel

            parallel.barrier()

    def share(self, items: Sequence[T], sizes: Sequence[int]) -> list[T]:
        """This rank's items, in their order."""
        return [items[index] for index in share(sizes, self._here.rank, self.count)]


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
