"""Messages among all ranks: what rank 0 does for the others, sums, barriers, and who speaks.

Each verb is the identity where there is one rank. Groups within a model's layout, tensor parallel
ranks for instance, are Megatron's (:mod:`megatron_direct.mcore.grid`).
"""

from __future__ import annotations

import contextlib
import datetime
import pickle
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_direct.errors import UserError
from megatron_direct.runtime import attendance, host, ranks, rendezvous, stopping
from megatron_direct.runtime.lock import Lock
from megatron_direct.runtime.patience import answer_within

# After so long, at the latest, a rank that waits for rank 0 looks again.
_LONGEST_PAUSE_SECONDS = 0.25
# No selection problem that was ever solved here took a hundredth of it.
_LONGEST_HOURS = 12.0


def world_size() -> int:
    """Ranks that were started: known before anything is initialised."""
    return dist.get_world_size() if dist.is_initialized() else ranks.discover().world_size


def is_rank_zero() -> bool:
    return (dist.get_rank() if dist.is_initialized() else ranks.discover().rank) == 0


def say(text: str) -> None:
    """Prints on rank 0."""
    if is_rank_zero():
        print(text, flush=True)


_timeout_minutes = 10  # of the process group, and of all that are made of its ranks


def collective_timeout_minutes() -> int:
    """How long a collective waits for another rank."""
    return _timeout_minutes


@contextlib.contextmanager
def process_group(timeout_minutes: int = 10, backend: str | None = None):
    """torch.distributed for the ranks that were launched, or for this process alone.

    backend: of collectives; left out, the one of this host's devices. Raises UserError where it
    needs a GPU that is not there, or the ranks do not find each other.
    """
    if dist.is_initialized():
        yield
        return
    global _timeout_minutes
    _timeout_minutes, timeout = timeout_minutes, datetime.timedelta(minutes=timeout_minutes)
    backend = backend or host.collective_backend()
    here = ranks.discover()
    if backend == "nccl" and not host.has_gpu():
        raise UserError("--distributed-backend nccl needs a GPU for each rank, but torch sees none "
                        f"on {socket.gethostname()}. Leave the flag out: without a GPU it is gloo. "
                        "If there should be one, `megatron-direct doctor` says what is missing.")
    # The device is named where there is one, so that NCCL need not guess it at the first barrier.
    device: dict[str, Any] = {}
    if backend == "nccl":
        device["device_id"] = host.device()
        torch.cuda.set_device(host.device())  # where objects are gathered
    meeting = rendezvous.meet(here, timeout)
    with stopping.signals_noted() as signals, \
            attendance.kept(meeting.store, here.rank, here.world_size, signals):
        dist.init_process_group(backend, store=meeting.store, rank=here.rank,
                                world_size=here.world_size, timeout=timeout, **device)
        try:
            # A rank that left at once would break its connections while others still make them.
            barrier()
            yield
            meeting.leave()
        finally:
            dist.destroy_process_group()


def stop_is_agreed(group=None) -> bool:
    """Whether the ranks of a group, which all ask here, stop at this point, as one of them was
    asked to. group: None for all ranks."""
    asked = stopping.requested() or 0
    if dist.get_world_size(group) > 1:
        number = torch.tensor([asked], dtype=torch.int32, device=host.device())
        dist.all_reduce(number, dist.ReduceOp.MAX, group=group)
        asked = int(number)
    if asked:
        attendance.reach_safe_point()
        stopping.request(asked)
    return asked > 0


def stop() -> None:
    """Leaves at a safe point, once that is agreed."""
    raise stopping.Stopped(stopping.requested() or signal.SIGTERM)


@contextlib.contextmanager
def while_rank_zero_holds(lock: Lock) -> Iterator[None]:
    """All ranks call this. If the folder of the lock goes away, all ranks leave."""
    on_rank_zero(lock.acquire)
    try:
        with attendance.leave_if(lock.what_is_lost):
            yield
        on_rank_zero(lock.require_held)
    finally:
        if is_rank_zero():
            lock.release()


def sum_over_world(array: np.ndarray) -> np.ndarray:
    """Sum of a float64 array over all ranks."""
    tensor = torch.from_numpy(np.array(array)).to(host.device())  # a copy: summed in place
    return all_reduce(tensor, dist.group.WORLD).cpu().numpy()


def rank_and_size() -> tuple[int, int]:
    """This rank's number among all ranks, and how many there are."""
    return dist.get_rank(), dist.get_world_size()


def barrier() -> None:
    if dist.get_world_size() > 1:
        dist.barrier()


def on_rank_zero(work: Callable):
    """What ``work()`` returns on rank 0, on every rank; what it raises there is raised everywhere.

    So a mistake that only rank 0 can see ends all ranks with the same message, and none waits. The
    work may take hours: the others wait for word that it is done, not in a collective, which would
    give up. A request to stop interrupts it.
    """
    if not dist.is_initialized():  # alone, in a program that is no launch
        return work()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            with stopping.interruptible():
                outcome[0] = work()
        except (Exception, stopping.Stopped) as error:
            outcome[1] = portable(error)
    if dist.get_world_size() > 1:
        _wait_for_rank_zero()
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def wait_for_all() -> None:
    """A barrier for ranks that may be hours apart, where a collective would give up."""
    if dist.get_world_size() == 1:
        return
    store, key = _next_turn()
    if store.add(f"{key}/count", 1) == dist.get_world_size():
        store.set(key, "done")
    elif not _comes(store, key, 3600 * _LONGEST_HOURS):
        raise UserError(f"a rank has been at work for {_LONGEST_HOURS:.0f} hours while others "
                        "waited for it. See what it is doing (py-spy dump shows it), and run the "
                        "command again: it resumes where it stopped.")


def _wait_for_rank_zero() -> None:
    store, key = _next_turn()
    if dist.get_rank() == 0:
        store.set(key, "done")
    elif not _comes(store, key, 3600 * _LONGEST_HOURS):
        raise UserError(f"rank 0 has been at work for {_LONGEST_HOURS:.0f} hours while the other "
                        "ranks waited. See what it is doing (py-spy dump shows it), and run the "
                        "command again: it resumes where it stopped.")


_turns: tuple[object, int] = (None, 0)  # the process group's store, and how often ranks waited


def _next_turn() -> tuple[Any, str]:
    """The store, and a key of this turn, the same on all ranks, which take their turns in one
    order."""
    global _turns
    store = dist.distributed_c10d._get_default_store()
    turn = _turns[1] + 1 if _turns[0] is store else 1
    _turns = (store, turn)
    return store, f"turn/{turn}"


def _comes(store, key: str, seconds: float) -> bool:
    """Waits for a key for so long. By looking again and again: a wait of the store's own is deaf to
    signals, and complains on stderr when its time is up."""
    until, pause = time.monotonic() + seconds, 0.001
    while not store.check([key]):
        if time.monotonic() > until:
            return False
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
    return True


def kept_on_rank_zero(work: Callable):
    """What ``work()`` returns on rank 0, None elsewhere; what it raises there is raised everywhere.

    For what is too large to be sent, or of no use on the other ranks.
    """
    kept = []
    on_rank_zero(lambda: kept.append(work()))
    return kept[0] if kept else None


def speak_once(text: str, patience_seconds: float = 3.0) -> None:
    """Prints to stderr on one rank of those that met an error: on rank 0 if it is among them.

    Other ranks give rank 0 some time to speak first; if it does not, the error is theirs alone.
    Where the store does not answer, one of each node speaks.
    """
    def speak():
        print(text, file=sys.stderr, flush=True)

    if not dist.is_initialized():
        speak()
        return
    store = dist.distributed_c10d._get_default_store()
    if dist.get_rank() == 0:
        speak()  # before the others hear of it: they end, and may take this rank with them
        answer_within(patience_seconds, lambda: store.set("error/spoken", "yes"))
        return
    answers = answer_within(2 * patience_seconds, lambda: (
        not _comes(store, "error/spoken", patience_seconds)
        and store.add("error/speakers", 1) == 1))
    if answers[0] if answers else ranks.discover().local_rank == 0:
        speak()


# What gloo, NCCL and the store say when they wait in vain for another rank.
_LOST = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting",
         "Broken pipe", "No route to host", "ncclRemoteError", "remote process exited",
         "Connection was likely closed", "Watchdog caught collective operation timeout")


def lost_rank(error: BaseException) -> str:
    """In words, if the error is another rank's absence; else ""."""
    if not isinstance(error, RuntimeError) or not any(words in str(error) for words in _LOST):
        return ""
    reason = str(error).splitlines()[0].split(". This is typically")[0]
    return (f"rank {dist.get_rank()} on {socket.gethostname()} waited in vain for another rank "
            f"({reason}).")


def portable(error: BaseException) -> BaseException:
    """The error itself if it survives the way to another rank, else its words."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def gather_objects(value) -> list:
    """What each rank holds, in the order of ranks, on every rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def require_same_on_all_ranks(value: str, what: str) -> None:
    """Raises on every rank where one rank holds another value (replicas must agree)."""
    values = gather_objects(value)
    if len(set(values)) > 1:
        raise UserError(
            f"{what} differs between ranks: {values}. All ranks must read the same files; "
            "check that the paths are on a file system that all nodes share.")


def all_reduce(tensor: torch.Tensor, group) -> torch.Tensor:
    """Sum over a process group, in place."""
    if dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, group=group)
    return tensor
