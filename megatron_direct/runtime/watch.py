"""A thread beside the work of each rank, which sees to it that no rank waits for one that is gone.

Collectives wait for minutes before they give up, and cannot be called off. So every rank writes a
sign of life into the launcher's store once a second, and looks after the rank before it in a ring:
whether its process has died or is stopped (on the same machine), or has given no sign for too long.
Who finds one lost says so, once, and all ranks leave. They also leave when their launcher has died,
when the store does not answer, when the folder that they work in was removed, and when they were
asked to stop and come to no safe point (:mod:`megatron_direct.runtime.stopping`).

Signs of life and verdicts are keys of the store::

    alive/R        of rank R: its process, and the stage that it is at; or that it has left
    verdict        why all have to leave
    stop           the number of the signal that one of them was sent
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil

from megatron_direct.runtime import stopping
from megatron_direct.runtime.patience import answer_within

_SECONDS_BETWEEN_SIGNS = 1.0
# A thread that waits for Python's lock gives no sign. Megatron holds it for 50 ns an entry of an
# index that it builds, which is longer only for a thousand million documents.
_SECONDS_UNTIL_SILENT = 40.0
_SECONDS_STOPPED = 30.0
# This process was suspended itself if a second took so long: nobody else is to blame.
_SECONDS_SUSPENDED = 5.0
# Of the 30 that torchrun and Slurm leave between SIGTERM and SIGKILL.
_SECONDS_TO_A_SAFE_POINT = 20.0
# Between the last message of all ranks and the end of this one.
_SECONDS_TO_END = 10.0
_RESUMES = "Run the command again: it resumes where it stopped."


@dataclasses.dataclass(frozen=True)
class Sign:
    """Of a rank's life. machine: its kernel and its namespace of processes; started: the process,
    by psutil; count: signs so far."""

    pid: int
    host: str
    machine: str
    started: float
    stage: str
    count: int
    has_left: bool = False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Watch:
    """Of one rank. store: of the launch, a client of this thread's own; None where the rank is
    alone."""

    def __init__(self, store: Any, rank: int, world_size: int, signals: socket.socket | None):
        self._store, self._rank = store, rank
        self._before = (rank - 1) % world_size
        self._launcher = os.getppid() if store is not None else None
        self._signals = signals
        self._conditions: list[Callable[[], str | None]] = []
        process = psutil.Process()
        self._sign = Sign(process.pid, socket.gethostname(), _machine(), process.create_time(), "",
                          0)  # the last one
        self._stage, self._has_left = "", False
        self._neighbour = _Neighbour(self._before)
        self._asking, self._asking_since = threading.Thread(), 0.0  # the store
        self._ended = threading.Event()
        self._reader, self._writer = socket.socketpair()  # to end the thread in its sleep
        self._asked_at: float | None = None
        self._is_at_safe_point = False
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Before the rank meets the others in a collective: whoever is lost there has given a first
        sign, by which it can be named."""
        if self._store is not None:
            self._show(self._store)
        self._thread.start()

    def end(self) -> None:
        """The rank has done its work; the others, too."""
        self._ended.set()
        self._writer.send(b"x")
        self._thread.join()
        if self._store is not None:
            if self._asking.is_alive():
                self._asking.join(_SECONDS_TO_END)
            self._has_left = True
            answer_within(_SECONDS_TO_END, lambda: self._show(self._store))
        self._reader.close()
        self._writer.close()

    def leave(self, verdict: str = "") -> None:
        """This rank leaves before the others. verdict: why they have to leave too, if they have."""
        self._has_left = True
        self._ended.set()
        if self._store is None:
            return

        def tell() -> None:
            store = self._store.clone()
            if verdict:
                store.compare_set("verdict", "", verdict)
            if (asked := stopping.requested()) is not None:
                store.set("stop", str(int(asked)))
            self._show(store)

        answer_within(_SECONDS_TO_END, tell)

    def at(self, stage: str) -> None:
        """What the rank is at, for the message that tells of its loss."""
        self._stage = stage

    def reach_safe_point(self) -> None:
        """From here on the rank may take its time to leave."""
        self._is_at_safe_point = True

    def add_condition(self, is_lost: Callable[[], str | None]) -> None:
        """is_lost: words, once all ranks have to leave."""
        self._conditions.append(is_lost)

    def remove_condition(self, is_lost: Callable[[], str | None]) -> None:
        self._conditions.remove(is_lost)

    def _run(self) -> None:
        last = time.monotonic()
        while not self._ended.is_set():
            self._sleep()
            now = time.monotonic()
            if now - last > _SECONDS_SUSPENDED:
                self._neighbour.excuse(now)
                self._asking_since = now
            last = now
            self._look(now)

    def _sleep(self) -> None:
        sources = [source for source in (self._reader, self._signals) if source is not None]
        ready, _, _ = select.select(sources, [], [], _SECONDS_BETWEEN_SIGNS)
        if self._signals in ready:
            with contextlib.suppress(OSError):
                self._signals.recv(64)
            self._asked_at = self._asked_at or time.monotonic()

    def _look(self, now: float) -> None:
        if self._asked_at is not None and not self._is_at_safe_point and \
                now > self._asked_at + _SECONDS_TO_A_SAFE_POINT:
            number = stopping.requested() or signal.SIGTERM
            if self._rank == 0:
                _say(str(stopping.Stopped(number)))
            _exit(128 + number)
        if self._launcher is not None and os.getppid() != self._launcher:
            _exit(1)  # nobody is left to be told
        for condition in list(self._conditions):
            words = condition()
            if words is not None and not self._ended.is_set():
                self._lose(words)
        if self._store is not None:
            self._ask_store(now)

    def _ask_store(self, now: float) -> None:
        """In another thread: beyond a link that is cut most questions never come back."""
        if not self._asking.is_alive():
            self._asking = threading.Thread(target=self._asked_store, args=(now,), daemon=True)
            self._asking_since = now
            self._asking.start()
        elif now - self._asking_since > _SECONDS_UNTIL_SILENT:
            self._lose_store(f"it has not answered for {_SECONDS_UNTIL_SILENT:.0f} s: its machine "
                             "or the network is down")

    def _asked_store(self, now: float) -> None:
        try:
            self._look_at_store(now)
        except Exception as error:  # the store is gone, and its host with it
            if not self._ended.wait(_SECONDS_TO_END):
                self._lose_store(str(error).splitlines()[0])

    def _lose_store(self, why: str) -> None:
        _say(f"error: rank {self._rank} lost the launcher's store, and with it the other ranks "
             f"({why}). {_RESUMES}")
        _exit(1)

    def _look_at_store(self, now: float) -> None:
        self._show(self._store)
        if self._store.check(["verdict"]):
            _exit(1)
        if self._asked_at is not None:
            self._store.set("stop", str(int(stopping.requested() or signal.SIGTERM)))
        elif self._store.check(["stop"]):
            stopping.request(int(self._store.get("stop")))
        self._look_after_neighbour(now)

    def _look_after_neighbour(self, now: float) -> None:
        key = f"alive/{self._before}"
        if self._before == self._rank or not self._store.check([key]):
            return  # not begun yet
        words = self._neighbour.what_is_wrong(self._sign_at(key), now)
        # It may have left between its last sign and the look at its process.
        if words is not None and not self._sign_at(key).has_left and not self._ended.is_set():
            self._lose(f"{words} {_RESUMES}")

    def _sign_at(self, key: str) -> Sign:
        return Sign(**json.loads(self._store.get(key)))

    def _lose(self, words: str) -> None:
        """All ranks leave; the first to find out says why."""
        if self._store is None or self._store.compare_set("verdict", "", words) == words.encode():
            _say(f"error: {words}")
        _exit(1)

    def _show(self, store) -> None:
        self._sign = dataclasses.replace(self._sign, count=self._sign.count + 1, stage=self._stage,
                                         has_left=self._has_left)
        store.set(f"alive/{self._rank}", json.dumps(dataclasses.asdict(self._sign)))


class _Neighbour:
    """The rank that is looked after, as far as it is known."""

    def __init__(self, rank: int):
        self._rank = rank
        self._count = -1
        self._heard_at = self._stopped_at = 0.0

    def excuse(self, now: float) -> None:
        """All periods begin again."""
        self._heard_at = now
        self._stopped_at = 0.0

    def what_is_wrong(self, sign: Sign, now: float) -> str | None:
        if sign.has_left:
            return None
        if sign.count != self._count:
            self._count, self._heard_at = sign.count, now
        stage = f" at {sign.stage}" if sign.stage else ""
        if sign.machine and sign.machine == _machine():
            state = _state(sign)
            if state in (None, psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                return (f"rank {self._rank} ({sign}) died{stage}: it was killed, perhaps because "
                        "memory ran out, or crashed.")
            if state == psutil.STATUS_RUNNING:
                self._heard_at = now  # it is at work, if with Python's lock in its hands
            self._stopped_at = 0.0 if state != psutil.STATUS_STOPPED else self._stopped_at or now
            if self._stopped_at and now - self._stopped_at > _SECONDS_STOPPED:
                os.kill(sign.pid, signal.SIGKILL)  # it will never leave by itself
                return (f"rank {self._rank} ({sign}) was stopped{stage} (SIGSTOP), and did not go "
                        f"on for {_SECONDS_STOPPED:.0f} s.")
        if now - self._heard_at > _SECONDS_UNTIL_SILENT:
            return (f"rank {self._rank} ({sign}) has given no sign of life for "
                    f"{_SECONDS_UNTIL_SILENT:.0f} s{stage}: its machine or the network is down, or "
                    "it is stopped.")
        return None


def _state(sign: Sign) -> str | None:
    """Of a process on this machine; None if it is there no more."""
    try:
        process = psutil.Process(sign.pid)
        return process.status() if process.create_time() == sign.started else None
    except psutil.NoSuchProcess:
        return None


def _machine() -> str:
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _say(text: str) -> None:
    print(f"megatron-direct: {text}", file=sys.stderr, flush=True)


def _exit(code: int) -> None:
    """At once: the main thread may wait in a collective, which nothing can call off."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(code)


def end_with_parent(parent: int) -> None:
    """Ends this process soon after the one that started it; called in processes of a rank's."""
    def wait() -> None:
        while os.getppid() == parent:
            time.sleep(_SECONDS_BETWEEN_SIGNS)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
