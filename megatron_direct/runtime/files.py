"""Every artefact is written through here: whole, or not at all.

A file is written beside its place, flushed to the disk and renamed into it, so that a run that is
killed leaves the old file or the new one, never a piece. What cannot be written is a UserError that
names the file and the way out.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import socket
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from megatron_direct.errors import UserError
from megatron_direct.runtime import digests

# Bytes of what comes out of data in a file's name. File systems allow 255 for the whole name, of
# which suffixes, and the name that a file has while it is written, take some.
LONGEST_NAME = 180
# NFS clients see new files of others after a minute at the latest (acdirmax).
SECONDS_UNTIL_FILES_SHOW = 90

Found = TypeVar("Found")


def shortened(name: str, of: str, room: int = LONGEST_NAME) -> str:
    """The beginning of a name, and a digest of what it is the name of, in so many bytes."""
    tail = f"-{digests.digest(of)[:8]}"
    return name.encode()[: room - len(tail)].decode(errors="ignore") + tail


_PARTIAL = re.compile(r"\..+\.(?P<host>[0-9a-f]{8})\.(?P<pid>\d+)\.partial")
# A partial file of another host's process is in nobody's hands any more when it is this old.
_ABANDONED_SECONDS = 3600.0

_SPACE = "Free some space"
_PERMISSION = "Get the permission to write there, or choose another folder"
_REMOVED = "Its folder was removed, or a part of the path is a file: restore it"
_REMEDIES = {
    errno.ENOSPC: _SPACE, errno.EDQUOT: f"{_SPACE}, or have the quota raised",
    errno.EACCES: _PERMISSION, errno.EPERM: _PERMISSION,
    errno.EROFS: "Mount the file system for writing, or choose a folder elsewhere",
    errno.ENOENT: _REMOVED, errno.ENOTDIR: _REMOVED, errno.ESTALE: _REMOVED,
}


def cannot_write(path: str | os.PathLike, error: OSError, verb: str = "written") -> UserError:
    """What a user is told of a file that cannot be written."""
    remedy = _REMEDIES.get(error.errno or errno.ENOSPC, "Check the disk")
    return UserError(f"{path} cannot be {verb} ({error.strerror or error}). {remedy}, and run the "
                     "command again: it resumes where it stopped.")


def cannot_use(path: str | os.PathLike, error: OSError) -> UserError:
    """Of a file of which it is not known what was to be done with it."""
    return cannot_write(path, error, "read or written")


def is_of_disk(error: OSError) -> bool:
    """Whether it says something of a disk, or of the rights to it, rather than of a program."""
    if error.errno is None:  # numpy's, of a file that it could write a part of
        return "written" in str(error)
    return error.errno in _REMEDIES or error.errno == errno.EIO


@contextlib.contextmanager
def written_whole(path: str | os.PathLike, mode: str = "wb"):
    """A file open for writing that takes its place at ``path`` when the block ends well.

    Raises UserError if it cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{_host()}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        if error.filename is not None and not _is_on_the_way(error.filename, partial):
            raise  # of another file, which the block wanted to read
        raise cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def once_seen(look: Callable[[], Found], suffices: Callable[[Found], bool]) -> Found:
    """What ``look`` finds, once that suffices, or when what others wrote ought to be seen."""
    patience = time.monotonic() + SECONDS_UNTIL_FILES_SHOW
    while not suffices(found := look()) and time.monotonic() < patience:
        time.sleep(1)
    return found


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


def append(file, data: bytes) -> None:
    """All of it, to the disk, at the end of a file that is open without a buffer.

    Raises UserError if that fails: a part of it may be there then.
    """
    view = memoryview(data)
    try:
        while view:  # an unbuffered file may take a part only
            view = view[file.write(view):]
        os.fsync(file.fileno())
    except OSError as error:
        raise cannot_write(file.name, error) from error


def sync_folder(folder: str | os.PathLike) -> None:
    """So that the names in it stay."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_files(folder: Path) -> None:
    """The files of a folder, written by others, to the disk."""
    for path in folder.iterdir():
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)
    sync_folder(folder.parent)


def remove_partial(folder: Path, names: str = "*", *, deep: bool = True) -> None:
    """Deletes what processes left that died while they wrote into a folder.

    names: a glob pattern of the files that were meant. deep: also in the folders below it.
    """
    for path in (folder.rglob if deep else folder.glob)(f".{names}.partial"):
        if is_partial(path) and _is_abandoned(path):
            path.unlink(missing_ok=True)


def is_partial(path: Path) -> bool:
    return _PARTIAL.fullmatch(path.name) is not None


def _is_abandoned(path: Path) -> bool:
    made = _PARTIAL.fullmatch(path.name)
    assert made is not None
    if made["host"] == _host() and not _is_alive(int(made["pid"])):
        return True
    with contextlib.suppress(FileNotFoundError):
        return time.time() - path.stat().st_mtime > _ABANDONED_SECONDS
    return False


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _host() -> str:
    """This host, as short as a name of a file wants it."""
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _is_on_the_way(found, path: Path) -> bool:
    """Whether it is the path, or a folder that it lies in."""
    return isinstance(found, str | os.PathLike) and path.absolute().is_relative_to(
        Path(found).absolute())
