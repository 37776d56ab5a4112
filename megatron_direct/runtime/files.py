"""Every artefact is written through here: whole, or not at all.

A file is written beside its place, flushed to the disk and renamed into it, so that a run that is
killed leaves the old file or the new one, never a piece.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from megatron_direct.errors import UserError
from megatron_direct.runtime import digests

# Bytes of what comes out of data in a file's name. File systems allow 255 for the whole name, of
# which suffixes, and the name that a file has while it is written, take some.
LONGEST_NAME = 180


def shortened(name: str, of: str, room: int = LONGEST_NAME) -> str:
    """The beginning of a name, and a digest of what it is the name of, in so many bytes."""
    tail = f"-{digests.digest(of)[:8]}"
    return name.encode()[: room - len(tail)].decode(errors="ignore") + tail


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
    """Raises UserError for a file that is not JSON."""
    try:
        return json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:  # of UTF-8 or of JSON
        raise UserError(f"{path} cannot be read: {error}. It is damaged, or was changed by hand: "
                        "restore it, or make again what it belongs to.") from error


def as_json(value):
    """The value as it would be read back: tuples as lists, keys as strings."""
    return json.loads(json.dumps(value))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
