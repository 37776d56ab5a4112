"""A lock on a folder: one command works in it at a time.

The lock is the operating system's, on a file in the folder, and belongs to the process: it is gone
the moment that the process is, however it ended. (POSIX record locks: child processes, which may
outlive a process that is killed, do not inherit them, and NFS knows them.) The file says who holds
it, for the message that another command then prints. Where a file system has no locks, a line says
so, and nothing is locked.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import math
import os
import socket
import sys
import time
from pathlib import Path

from megatron_direct.errors import UserError
from megatron_direct.runtime import files

NAME = ".lock"
# A run that was just killed may need so long to die.
_PATIENCE_SECONDS = 5.0
_HELD = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class Lock:
    """path: of the file that is locked; folder: what messages say is in use; command: what works in
    it; waits: for another command to end, however long that takes."""

    def __init__(self, path: Path, folder: Path, command: str, *, waits: bool = False):
        self._path, self._folder, self._command = path, folder, command
        self._waits = waits
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Raises UserError where another process holds it, unless this one waits."""
        patience = time.monotonic() + _PATIENCE_SECONDS
        while not self._try():
            if time.monotonic() > patience:
                in_use = f"{self._folder} is in use: {self._holder()}."
                if not self._waits:
                    raise UserError(f"{in_use} Wait for it to end, or end it, and run the command "
                                    "again.")
                print(f"{in_use} This command waits for it.", flush=True)
                patience = math.inf  # it is said once
            time.sleep(0.1)

    def release(self) -> None:
        if self._descriptor is None:
            return
        if self.is_held():
            with contextlib.suppress(OSError):
                self._path.unlink()
        os.close(self._descriptor)
        self._descriptor = None

    def is_held(self) -> bool:
        """False once the file was removed, or replaced: perhaps with its folder."""
        assert self._descriptor is not None
        try:
            there = os.stat(self._path)
        except FileNotFoundError:
            return False
        except OSError:
            return True  # a file system that does not answer has not lost it
        return os.path.samestat(there, os.fstat(self._descriptor))

    def what_is_lost(self) -> str | None:
        """For a watch: words about a folder that is gone, None as long as it is there."""
        if self._descriptor is None or self.is_held():
            return None
        return (f"{self._folder} was removed, or replaced, while {self._command} worked in it. "
                "Restore it, or delete what is left of it, and run the command again.")

    def require_held(self) -> None:
        """At the end of the work: raises UserError if the folder went away under it."""
        if (words := self.what_is_lost()) is not None:
            raise UserError(words)

    def _try(self) -> bool:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise files.cannot_write(self._path, error) from error
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                os.close(descriptor)
                return False
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise files.cannot_write(self._path, error) from error
            print(f"{self._folder} is on a file system without locks ({error.strerror}): see to it "
                  "that no other command works in it.", file=sys.stderr, flush=True)
        self._descriptor = descriptor
        if not self.is_held():  # it was removed by the one that held it, after it was opened here
            os.close(descriptor)
            self._descriptor = None
            return False
        self._sign(descriptor)
        return True

    def _sign(self, descriptor: int) -> None:
        text = json.dumps({
            "host": socket.gethostname(), "pid": os.getpid(), "command": self._command,
            "since": datetime.datetime.now(datetime.timezone.utc).isoformat(" ", "seconds")})
        # On a full disk the lock holds all the same, and nobody learns whose it is.
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, text.encode(), 0)

    def _holder(self) -> str:
        try:
            holder = json.loads(self._path.read_text())
            return (f"{holder['command']} (process {holder['pid']} on {holder['host']}) has been "
                    f"working in it since {holder['since']}")
        except (OSError, ValueError, KeyError, TypeError):
            return "another command is working in it"
