"""Who am I among the processes of this launch? The one place that reads a launcher's variables.

torchrun sets ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK``. Another launcher is one more reader in
``_LAUNCHERS``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Rank:
    """This process among ``world_size``; ``local_rank`` among those of its node.

    launcher: what started it; "" for a process that was started alone.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    launcher: str = ""

    @property
    def is_launched(self) -> bool:
        return bool(self.launcher)


def _torchrun(environment: Mapping[str, str]) -> Rank | None:
    if "RANK" not in environment:
        return None
    return Rank(int(environment["RANK"]), int(environment.get("WORLD_SIZE", 1)),
                int(environment.get("LOCAL_RANK", 0)), "torchrun")


_LAUNCHERS: tuple[Callable[[Mapping[str, str]], Rank | None], ...] = (_torchrun,)


def discover(environment: Mapping[str, str] | None = None) -> Rank:
    """This process's rank, by the first launcher whose variables are set."""
    variables = os.environ if environment is None else environment
    found = (launcher(variables) for launcher in _LAUNCHERS)
    return next((rank for rank in found if rank is not None), Rank())
