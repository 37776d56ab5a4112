"""Megatron's dataset indices in a run directory: none that a killed run left in pieces is read.

Megatron writes them without a flush, takes a file that exists for a whole one, and reads it on
every rank. ``whole.json`` lists those that were flushed after they were built, with a digest of the
size and both ends of each; what it does not list, or lists otherwise, is deleted and built again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from megatron_direct.runtime import digests, files, parallel

_RECORD = "whole.json"


@contextlib.contextmanager
def sound_cache(folder: Path) -> Iterator[None]:
    """Around whatever lets Megatron build or read indices in the folder; all ranks call this.

    Raises UserError if they cannot be written.
    """
    parallel.on_rank_zero(lambda: _remove_unsound(folder))
    try:
        yield
    except Exception as error:
        cause = error if isinstance(error, OSError) else error.__cause__  # Megatron wraps it
        if not isinstance(cause, OSError) or not files.is_of_disk(cause):
            raise
        raise files.cannot_write(folder, cause) from error
    parallel.on_rank_zero(lambda: _record(folder))


def _remove_unsound(folder: Path) -> None:
    record = folder / _RECORD
    known = files.read_json(record) if record.is_file() else {}
    for path in _indices(folder):
        if known.get(path.name) != _digest(path):
            path.unlink()


def _record(folder: Path) -> None:
    indices = list(_indices(folder))
    if indices:
        files.sync_files(folder)
        files.write_json(folder / _RECORD, {path.name: _digest(path) for path in indices})


def _indices(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from (path for path in sorted(folder.iterdir())
                    if path.is_file() and path.name != _RECORD)


def _digest(path: Path) -> str:
    return digests.digest(str(path.stat().st_size), *digests.both_ends(path))
