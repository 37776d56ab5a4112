"""Worker processes of one machine.

A worker is what a factory makes in its process: a callable that takes tasks. What it needs to keep
between tasks, such as a tokenizer, is its own attribute, and no module holds any state.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import TypeVar

from megatron_direct.errors import UserError

T = TypeVar("T")
R = TypeVar("R")


class _RemoteError(Exception):
    """The traceback of an error in a worker, as the cause of that error here."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def work_through(make_worker: Callable[[], Callable[[T], R]], tasks: Iterable[T], count: int
        ) -> Iterator[R]:
    """The results of all tasks by ``count`` workers, in the order in which they come.

    ``make_worker`` is pickled with what it is bound to. No more tasks are drawn than there are
    workers, and one to follow, so tasks may be large. Raises UserError where a worker is killed.
    """
    if count <= 1:
        yield from map(make_worker(), tasks)
        return
    # Processes are spawned: a fork would copy threads, and the state of MPI.
    context = multiprocessing.get_context("spawn")
    processes = []
    idle: list[Connection] = []
    busy: set[Connection] = set()
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            processes.append(context.Process(target=_work, args=(make_worker, theirs)))
            processes[-1].start()
            theirs.close()  # now the worker alone holds it, and its death shows at our end
            idle.append(ours)
        yield from _hand_out(tasks, idle, busy)
    finally:
        for connection in (*idle, *busy):
            connection.close()  # ends the workers, once they have finished their tasks
        for process in processes:
            process.join()


def _hand_out(tasks: Iterable[T], idle: list[Connection], busy: set[Connection]) -> Iterator:
    """Moves connections between ``idle`` and ``busy``."""
    tasks = iter(tasks)
    following = list(itertools.islice(tasks, 1))
    while busy or following:
        while idle and following:
            connection = idle.pop()
            busy.add(connection)
            with contextlib.suppress(ConnectionError):  # of a dead worker: _receive says why
                connection.send(following[0])
            following = list(itertools.islice(tasks, 1))
        for connection in busy.intersection(wait(busy)):
            result = _receive(connection)
            busy.remove(connection)
            idle.append(connection)
            yield result


def _receive(connection: Connection):
    try:
        result, error, trace = connection.recv()
    except (EOFError, ConnectionError) as death:
        raise UserError("a worker process was killed, most likely because memory ran out. Repeat "
                        "the command, which resumes where it stopped, with fewer --workers or a "
                        "smaller --shard-size.") from death
    if error is not None:
        raise error from _RemoteError(trace)
    return result


def _work(make_worker: Callable[[], Callable[[T], R]], connection: Connection) -> None:
    """The life of a worker process."""
    # Else a worker would finish its task after its parent was killed, beside a new run.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(ConnectionError, KeyboardInterrupt):  # the parent wants no more
        try:
            worker = make_worker()
            for task in iter(lambda: _next_task(connection), []):
                connection.send((worker(*task), None, ""))
        except ConnectionError:
            raise
        except Exception as error:
            connection.send((None, error, traceback.format_exc()))


def _next_task(connection: Connection) -> list:
    """The task in a list; an empty one where there is none left."""
    try:
        return [connection.recv()]
    except EOFError:
        return []


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
