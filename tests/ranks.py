"""Real ranks for tests: processes on gloo, kept between tests, and forked from one that has
imported torch and megatron, which takes 3 s.

``run_on_ranks(n, function, *arguments)`` calls the function on n ranks, inside host() and a process
group of n, and returns what each rank returned, in the order of ranks. The function is a top-level
one of a test module. What a rank raises is raised in the test, with the rank's own traceback. Ranks
meet through a file store in a temporary folder, so that nothing guesses a port.

``LAYOUTS`` and ``on_layout`` are the one idiom of parity tests: the same function on one rank and
on every layout, and the test compares.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing.util  # its own exit handler joins the workers: ours must run before it
import os
import sys
import tempfile
import traceback
import uuid
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_direct.config import ModelConfig, ParallelConfig

TIMEOUT_SECONDS = 240
# Each gloo group has a thread that wakes a hundred times a second; those of groups that something
# still refers to would slow down all that follows.
MOST_THREADS = 40
# By the process that workers are forked from, which starts in this process's folder.
IMPORTED = "tests.forked_from"


class RankError(AssertionError):
    """A rank raised; the message holds its traceback."""


@dataclass(frozen=True)
class Layout:
    """Sizes of a layout; vp: layers of a chunk in the interleaved schedule; ep: divides dp."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    vp: int | None = None
    sp: bool = False
    ep: int = 1

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        name = f"tp{self.tp}-pp{self.pp}-dp{self.dp}"
        name += f"-ep{self.ep}" if self.ep > 1 else ""
        return name + (f"-vp{self.vp}" if self.vp else "") + ("-sp" if self.sp else "")

    def config(self) -> ParallelConfig:
        return ParallelConfig(self.tp, self.pp, self.vp, self.sp,
                              expert_model_parallel_size=self.ep)


LAYOUTS = [
    Layout(tp=2),
    Layout(pp=2),
    Layout(tp=2, pp=2),
    Layout(dp=2),
    Layout(pp=2, vp=1),
    Layout(tp=2, sp=True),
]


def on_layout(layout: Layout, function, model: ModelConfig, *arguments):
    """``function(model, parallel_config, *arguments)`` in the layout's process groups."""
    return run_on_ranks(layout.world_size, _in_layout, function, model, layout.config(), arguments)


def _in_layout(function, model, layout, arguments):
    from megatron_direct.mcore import grid

    with grid.model_parallel(layout, layout.num_model_chunks(model)):
        return function(model, layout, *arguments)


def run_on_ranks(world_size: int, function, *arguments) -> list:
    store = os.path.join(tempfile.gettempdir(), f"ranks-{uuid.uuid4().hex}")
    workers = [_worker(rank) for rank in range(world_size)]
    try:
        for rank, (_, pipe) in enumerate(workers):
            pipe.send((sys.path, store, rank, world_size))
            pipe.send((function, arguments))
        outcomes = [_receive(pipe, rank) for rank, (_, pipe) in enumerate(workers)]
    except BaseException:
        stop_workers()
        raise
    finally:
        if os.path.exists(store):
            os.remove(store)
    stop_workers([rank for rank, (process, _) in _workers.items()
                  if len(os.listdir(f"/proc/{process.pid}/task")) > MOST_THREADS])
    failures = [f"rank {rank}:\n{outcome.value}" for rank, outcome in enumerate(outcomes)
                if not outcome.ok]
    if failures:
        if not all(outcome.met for outcome in outcomes):
            stop_workers()  # torch numbers groups: those that did not meet would never meet again
        raise RankError("\n".join(failures))
    return [outcome.value for outcome in outcomes]


@dataclass(frozen=True)
class _Outcome:
    """value: what the function returned, or a traceback; met: whether the ranks had met."""

    ok: bool
    value: object
    met: bool = True


def _receive(pipe, rank: int) -> _Outcome:
    if not pipe.poll(TIMEOUT_SECONDS):
        raise RankError(f"rank {rank} gave no answer in {TIMEOUT_SECONDS} s")
    return pipe.recv()


_workers: dict[int, tuple] = {}


def _context():
    # A process that may have met the driver of a GPU must not be forked.
    if os.path.exists("/dev/nvidiactl"):
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([IMPORTED])
    return context


def _worker(rank: int):
    if rank not in _workers:
        context = _context()
        ours, theirs = context.Pipe()
        # Not daemonic: Megatron's checkpoint writer starts processes of its own.
        process = context.Process(target=_serve, args=(theirs,))
        process.start()
        theirs.close()
        _workers[rank] = (process, ours)
    return _workers[rank]


@atexit.register
def stop_workers(some: Iterable[int] | None = None) -> None:
    """Ends the workers of some ranks, or of all."""
    stopping = [_workers.pop(rank) for rank in list(_workers if some is None else some)]
    for _, pipe in stopping:
        pipe.close()  # a worker that waits for work returns, and ends its own processes
    for process, _ in stopping:
        process.join(timeout=10)
        if process.is_alive():
            process.terminate()
            process.join()


def _serve(pipe) -> None:
    import warnings

    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            sys.path[:], store, rank, world_size = pipe.recv()
        except EOFError:
            return
        try:
            function, arguments = pipe.recv()
            _meet(store, rank, world_size)
        except BaseException:
            pipe.send(_Outcome(False, traceback.format_exc(), met=False))
            continue
        try:
            pipe.send(_Outcome(True, _run(function, arguments)))
        except BaseException:
            pipe.send(_Outcome(False, traceback.format_exc()))


def _meet(store: str, rank: int, world_size: int) -> None:
    import datetime

    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.FileStore(store, world_size), rank=rank,
                            world_size=world_size, timeout=datetime.timedelta(seconds=120))
    dist.barrier()  # a rank that left at once would break the connection while others still make it


def _run(function, arguments):
    import torch.distributed as dist

    from megatron_direct.mcore.without_gpu import megatron_runtime

    try:
        with megatron_runtime():
            return function(*arguments)
    finally:
        dist.destroy_process_group()
        gc.collect()
