"""Checksums of a checkpoint, so that a damaged file is found before its weights are used.

``integrity.json`` beside a checkpoint's files has the SHA-256 of each. The format is that of
Megatron-Core 0.17 and later (``save(..., verify_integrity=True)``): what either has written, the
other can verify. A checkpoint without one is taken as it is.

Ranks share the files of a checkpoint among them, so that hashing takes about as long as reading.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from megatron_direct.errors import UserError
from megatron_direct.mcore.checkpoint_formats import TRACKER, iteration_of
from megatron_direct.runtime import files, parallel

MANIFEST = "integrity.json"
_ALGORITHM = "sha256"

# Of checkpoints that were verified: their names, and size, time and place of their files.
_verified: set[tuple] = set()


def write(checkpoint: Path) -> None:
    """The checksums of a checkpoint that all ranks have written; all ranks call this."""
    names = parallel.on_rank_zero(lambda: _files_in(checkpoint))
    found: dict[str, str] = {}
    for part in parallel.gather_objects({name: _hash(checkpoint / name) for name in _mine(names)}):
        found |= part
    parallel.on_rank_zero(lambda: files.write_json(
        checkpoint / MANIFEST, {"algorithm": _ALGORITHM, "files": dict(sorted(found.items()))}))


def verify(checkpoint: Path) -> None:
    """Raises UserError, on all ranks, for a file that is not as it was written; all ranks call
    this."""
    expected = parallel.on_rank_zero(lambda: _not_yet_verified(checkpoint))
    if not expected:
        return
    wrong = sorted(name for part in parallel.gather_objects(
        [name for name in _mine(sorted(expected)) if _is_wrong(checkpoint / name, expected[name])])
        for name in part)
    if wrong:
        raise _damaged(checkpoint, wrong)
    parallel.on_rank_zero(lambda: _verified.add(_stamps(checkpoint)))


def verify_files(checkpoint: Path, names: Iterable[str]) -> None:
    """Raises UserError for the first of these files that is not as it was written; on one rank.

    A name is asked for once the file before it has been verified.
    """
    expected = _expected(checkpoint)
    for name in names if expected else ():
        if name in expected and _is_wrong(checkpoint / name, expected[name]):
            raise _damaged(checkpoint, [name])


def _not_yet_verified(checkpoint: Path) -> dict[str, str]:
    """The checksums by name; {} where there are none, or where they were compared already."""
    expected = _expected(checkpoint)
    return {} if expected and _stamps(checkpoint) in _verified else expected


def _expected(checkpoint: Path) -> dict[str, str]:
    path = checkpoint / MANIFEST
    if not path.is_file():
        return {}
    found = files.read_json(path)
    try:
        algorithm, expected = found["algorithm"], found["files"]
        sound = all(isinstance(value, str) and Path(name).name == name
                    for name, value in expected.items())
    except (TypeError, KeyError, AttributeError, ValueError):
        sound = False
    if not sound:
        raise _damaged(checkpoint, [MANIFEST])
    if algorithm != _ALGORITHM:
        raise UserError(f"{path} has checksums of the kind {algorithm}, where {_ALGORITHM} was "
                        "expected. Delete the file to load the checkpoint unverified.")
    return expected


def _mine(names: list[str]) -> list[str]:
    rank, size = parallel.rank_and_size()
    return names[rank::size]


def _files_in(checkpoint: Path) -> list[str]:
    return sorted(path.name for path in checkpoint.iterdir()
                  if path.is_file() and path.name != MANIFEST)


def _hash(path: Path) -> str:
    total = hashlib.new(_ALGORITHM)
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 22), b""):
            total.update(block)
    return total.hexdigest()


def _is_wrong(path: Path, expected: str) -> bool:
    try:
        return _hash(path) != expected
    except OSError:  # it is missing, or the disk cannot read it
        return True


def _stamps(checkpoint: Path) -> tuple:
    statuses = [(path.name, path.stat()) for path in sorted(checkpoint.iterdir())]
    return (str(checkpoint), *((name, status.st_size, status.st_mtime_ns, status.st_ino)
                               for name, status in statuses))


def _damaged(checkpoint: Path, wrong: list[str]) -> UserError:
    more = f" (and {len(wrong) - 1} more of its files)" if len(wrong) > 1 else ""
    older = sorted(path.name for path in checkpoint.parent.glob("iter_*")
                   if path.name < checkpoint.name and iteration_of(path) is not None
                   and (path / "metadata.json").is_file())
    remedy = "Copy the checkpoint again, or, if this run wrote it, delete its folder and run the " \
             "command again"
    if older and checkpoint.name.startswith("iter_"):
        number = iteration_of(checkpoint.parent / older[-1])
        remedy += (f". {checkpoint.parent} also has {older[-1]}: write {number} into its {TRACKER} "
                   "to use that one")
    return UserError(f"{checkpoint / wrong[0]}{more} is damaged: its SHA-256 is not the one that "
                     f"{MANIFEST} has. {remedy}.")
