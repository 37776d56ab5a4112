"""What ranks share: items of work that each does a part of, and arrays held once on each node."""

from __future__ import annotations

import os
import socket
import tempfile
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch.distributed as dist

from megatron_direct.runtime import parallel

# Memory that processes of one node can map; where it is too small, each rank keeps its own copy.
_FOLDER = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
_BOOT = Path("/proc/sys/kernel/random/boot_id")

Fill = Callable[[np.ndarray], None]


class ArrayMaker(Protocol):
    """(number of entries, dtype, what fills it) -> the array, filled."""

    def __call__(self, count: int, dtype: Any, fill: Fill) -> np.ndarray: ...


def map_shared_out(work: Callable[[Any], Any], items: Sequence) -> list:
    """``[work(item) for item in items]`` on every rank, of which each did its part; all ranks call
    this.

    What ``work`` raises is raised on all ranks: the error of the first item that has one.
    """
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    outcomes: dict[int, tuple[Any, BaseException | None]] = {}
    for number in range(rank, len(items), size):
        try:
            outcomes[number] = work(items[number]), None
        except Exception as error:
            outcomes[number] = None, parallel.portable(error)
    if size > 1:
        outcomes = {number: outcome for part in parallel.gather_objects(outcomes)
                    for number, outcome in part.items()}
    _raise_first(outcomes[number][1] for number in range(len(items)))
    return [outcomes[number][0] for number in range(len(items))]


def private_array(count: int, dtype: Any, fill: Fill) -> np.ndarray:
    """An array of this rank alone, read-only once it is filled."""
    array = np.empty(count, dtype)
    fill(array)
    array.flags.writeable = False
    return array


def node_array(count: int, dtype: Any, fill: Fill) -> np.ndarray:
    """An array that the ranks of a node hold once between them, read-only; all ranks call this.

    The first rank of each node fills it. It lives as long as any of them refers to it. Where the
    node's shared memory has no room for it, each rank fills an array of its own.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1 or count == 0:
        return private_array(count, dtype, fill)
    nodes = parallel.gather_objects(_memory_of_node())
    leader = nodes.index(nodes[dist.get_rank()])
    path = None
    error = None
    if leader == dist.get_rank():
        try:
            path = _filled_file(count, np.dtype(dtype), fill)
        except Exception as failure:
            error = parallel.portable(failure)
    try:
        outcomes = parallel.gather_objects((path, error))
        _raise_first(failure for _, failure in outcomes)
        there = outcomes[leader][0]
        array = None if there is None else np.memmap(there, dtype, "r", shape=(count,))
        parallel.barrier()
    finally:
        if path is not None:
            os.unlink(path)
    return private_array(count, dtype, fill) if array is None else array


def _raise_first(errors: Iterable[BaseException | None]) -> None:
    for error in errors:
        if error is not None:
            raise error


def _memory_of_node() -> tuple:
    """The same on two ranks just where one can map the files of the other: containers of one host
    each have a folder of their own."""
    boot = _BOOT.read_text() if _BOOT.is_file() else ""
    return socket.gethostname(), boot, os.stat(_FOLDER).st_dev, os.stat(_FOLDER).st_ino


def _filled_file(count: int, dtype: np.dtype, fill: Fill) -> str | None:
    """A file of the filled array, or None where there is no room."""
    path = str(_FOLDER / f"megatron-direct-{uuid.uuid4().hex}")
    with open(path, "xb") as file:
        try:
            # Reserved at once: a map of a file that cannot grow ends the process when written to.
            os.posix_fallocate(file.fileno(), 0, count * dtype.itemsize)
        except OSError:
            os.unlink(path)
            return None
    try:
        array = np.memmap(path, dtype, "r+", shape=(count,))
        fill(array)
    except BaseException:
        os.unlink(path)
        raise
    return path
