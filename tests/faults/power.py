"""What a disk holds after the power fails: nothing that was not flushed to it.

Read off the log of the interposer: of each file, how many bytes the last fsync found in it.
"""

from __future__ import annotations

import os
from pathlib import Path


def unsynced(log: Path) -> dict[Path, int]:
    """{file: how many bytes of it are on the disk}, of the files that hold more, or may."""
    synced: dict[str, int] = {}
    is_dirty: dict[str, bool] = {}
    for line in log.read_text().splitlines():
        _, name, size, path, to = line.split("\t")
        if name in ("open", "empty"):
            before = 0 if name == "empty" else max(0, int(size))
            if name == "empty" or path not in synced:
                synced[path] = before
            is_dirty[path] = is_dirty.get(path, False) or name == "empty"
        elif name == "write":
            synced.setdefault(path, max(0, int(size)))
            is_dirty[path] = True
        elif name == "cut":
            synced[path] = min(synced.get(path, int(size)), int(size))
        elif name == "sync":
            synced[path], is_dirty[path] = int(size), False
        elif name == "rename":
            if path in synced:
                synced[to], is_dirty[to] = synced.pop(path), is_dirty.pop(path, False)
        elif name == "remove":
            synced.pop(path, None)
            is_dirty.pop(path, None)
    return {Path(path): synced[path] for path, dirty in is_dirty.items()
            if dirty and os.path.isfile(path)}


def fail(log: Path, how: str) -> int:
    """Takes from the files what was not flushed. how: ``dropped``, or ``zeroed``, which some file
    systems leave. Returns how many files lost something."""
    lost = 0
    for path, length in unsynced(log).items():
        size = path.stat().st_size
        if size <= length:
            continue
        lost += 1
        os.truncate(path, length)
        if how == "zeroed":
            os.truncate(path, size)
    return lost
