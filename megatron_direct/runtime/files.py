"""Every artefact is written through here: whole, or not at all.

A file is written beside its place, flushed to the disk and renamed into it, so that a run that is
killed leaves the old file or the new one, never a piece. Digests let a later stage see that what it
reads is what was written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path


@contextlib.contextmanager
def written_whole(path: str | os.PathLike, mode: str = "wb"):
    """A file open for writing that takes its place at ``path`` when the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, value) -> None:
    with written_whole(path, "w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")


def read_json(path: str | os.PathLike):
    return json.loads(Path(path).read_text())


def as_json(value):
    """The value as it would be read back: tuples as lists, keys as strings."""
    return json.loads(json.dumps(value))


def digest(*parts: bytes | str) -> str:
    total = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "little"))
        total.update(data)
    return total.hexdigest()


def file_digest(path: str | os.PathLike) -> str:
    total = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 22), b""):
            total.update(block)
    return total.hexdigest()


def both_ends(path: str | os.PathLike, count: int = 1 << 20) -> tuple[bytes, bytes]:
    """The first and the last ``count`` bytes of a file."""
    with open(path, "rb") as file:
        head = file.read(count)
        file.seek(max(0, os.path.getsize(path) - count))
        return head, file.read(count)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
