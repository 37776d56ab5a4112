"""SIGTERM and SIGINT: a request to stop, heeded at the next safe point.

A scheduler sends SIGTERM some time before it kills. The first signal is noted; loops ask at their
*safe points*, where the state to resume from has just been written, and raise :class:`Stopped`. A
second SIGINT, or too long a wait, ends the process at once: a run may be killed anywhere, and all
that this can cost is work since the last safe point. A second SIGTERM means nothing: where a
scheduler signals every process, and a launcher passes it on, it comes twice.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """Raised at a safe point. No error: only the outermost caller catches it."""

    def __init__(self, signal_number: int):
        super().__init__(signal_number)
        self.signal_number = signal_number

    @property
    def exit_code(self) -> int:
        """As shells have it for a process that a signal ended: 143 of SIGTERM, 130 of SIGINT."""
        return 128 + self.signal_number

    def __str__(self) -> str:
        return (f"stopped by {signal.Signals(self.signal_number).name}. Run the command again: it "
                "resumes where it stopped.")


# Of two signals that are one keystroke, on several ways.
_SECONDS_OF_ONE = 1.0
_requested: int | None = None
_requested_at = 0.0
_is_postponed = False
_can_interrupt = False


def requested() -> int | None:
    """The number of the signal that asked this process to stop."""
    return _requested


def request(signal_number: int) -> None:
    """As if this process had been sent the signal; from any thread."""
    if _requested is None:
        os.kill(os.getpid(), signal_number)


@contextlib.contextmanager
def signals_noted() -> Iterator[socket.socket | None]:
    """Signals are requests inside. Yields a socket on which each can be read by another thread, at
    once, even while the main one waits in a collective; None outside of the main thread."""
    global _requested
    if threading.current_thread() is not threading.main_thread():
        yield None
        return
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)
    _requested = None
    before = {number: signal.signal(number, _note) for number in _SIGNALS}
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield reader
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        _requested = None
        reader.close()
        writer.close()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """A request raises Stopped right here: for work of one rank that others wait for, and that may
    take long."""
    global _can_interrupt
    before, _can_interrupt = _can_interrupt, True
    try:
        if _requested is not None and not _is_postponed:
            raise Stopped(_requested)
        yield
    finally:
        _can_interrupt = before


@contextlib.contextmanager
def postponed() -> Iterator[None]:
    """Nothing is interrupted inside: for the saving of what a resumed run begins with."""
    global _is_postponed
    before, _is_postponed = _is_postponed, True
    try:
        yield
    finally:
        _is_postponed = before


def _note(signal_number: int, _frame) -> None:
    global _requested, _requested_at
    now = time.monotonic()
    if _requested is not None:
        if signal_number == signal.SIGINT and now > _requested_at + _SECONDS_OF_ONE:
            os._exit(128 + signal_number)
        return
    _requested, _requested_at = signal_number, now
    if _can_interrupt and not _is_postponed:
        raise Stopped(signal_number)
