"""The watch of this rank (:mod:`megatron_direct.runtime.watch`), for all who have to do with it.

It is kept for as long as there is a process group. Without one, as in a test or in a program that
brings its own, nothing is watched, and each verb does nothing.
"""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Callable, Iterator

from megatron_direct.runtime import ranks
from megatron_direct.runtime.watch import Watch

_SECONDS_OF_A_STORE_THAT_HANGS = 30.0
# A collective fails at once where a rank has died; the watch tells who, a little later.
_SECONDS_UNTIL_A_VERDICT = 4.0
_watch: Watch | None = None
_num_ranks = 1


@contextlib.contextmanager
def kept(store, rank: int, size: int, signals) -> Iterator[None]:
    """store: of the launch. signals: as stopping.signals_noted yields it."""
    global _watch, _num_ranks
    launched = None
    if size > 1 or ranks.discover().is_launched:
        launched = store.clone()  # a connection of its own: the main thread waits on the first
        launched.set_timeout(datetime.timedelta(seconds=_SECONDS_OF_A_STORE_THAT_HANGS))
    _watch, _num_ranks = Watch(launched, rank, size, signals), size
    _watch.start()
    try:
        yield
    finally:
        _watch.end()
        _watch = None


def at(stage: str) -> None:
    """What this rank is at, in words: others name it should the rank be lost."""
    if _watch is not None:
        _watch.at(stage)


def reach_safe_point() -> None:
    """From here on this rank may take its time to leave."""
    if _watch is not None:
        _watch.reach_safe_point()


def leave_early(verdict: str = "") -> None:
    """This rank leaves although others may not have done their work. verdict: why they have to
    leave, too."""
    if _watch is not None:
        _watch.leave(verdict)


@contextlib.contextmanager
def leave_if(is_lost: Callable[[], str | None]) -> Iterator[None]:
    """All ranks leave as soon as ``is_lost`` has words for it, inside."""
    watch = _watch
    if watch is not None:
        watch.add_condition(is_lost)
    try:
        yield
    finally:
        if watch is not None:
            watch.remove_condition(is_lost)


def await_verdict() -> None:
    """After an error that may be the consequence of another rank's death: the watch ends this
    process if it is."""
    if _watch is not None and _num_ranks > 1:
        time.sleep(_SECONDS_UNTIL_A_VERDICT)
