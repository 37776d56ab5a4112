"""Arrays from files that may be damaged, or another's.

numpy's own reader believes what a header says: of a damaged one it reserves whatever memory the
shape asks for, and where pickles are allowed it runs what a file holds. Here a file is read only if
its header is one of plain numbers or text, and asks for just the bytes that are there.
"""

from __future__ import annotations

import math
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import IO, Literal

import numpy as np

from megatron_direct.errors import UserError

# By version: what reads a header, and the bytes that its length is written in.
_READERS = {(1, 0): (np.lib.format.read_array_header_1_0, 2),
            (2, 0): (np.lib.format.read_array_header_2_0, 4)}
_LONGEST_HEADER = 1000  # bytes; those written here have 118
# What numpy, zipfile and the tokenizer that numpy uses raise of damaged files.
_DAMAGED = (ValueError, TypeError, KeyError, IndexError, OverflowError, SyntaxError, EOFError,
            OSError, MemoryError, RecursionError, NotImplementedError, RuntimeError,
            zipfile.BadZipFile, zlib.error)


# The remedy for a part of a run directory.
MAKE_AGAIN = "Delete it, and run again the command that made it."


def read_npz(path: str | os.PathLike, remedy: str) -> dict[str, np.ndarray]:
    """The arrays by name, read-only. Raises UserError, ending in the remedy, for a damaged file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {info.filename.removesuffix(".npy"): _member(archive, info)
                    for info in archive.infolist()}
    except _DAMAGED as error:
        raise _as_user_error(path, error, remedy) from error


def read_named(path: str | os.PathLike, names: Sequence[str], remedy: str) -> list[np.ndarray]:
    """Those of these names, writable. Raises UserError as read_npz, and where one is missing."""
    found = read_npz(path, remedy)
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(f"{path} holds no {missing[0]}. {remedy}")
    return [found[name].copy() for name in names]


def read_npy(path: str | os.PathLike, remedy: str, *, mapped: bool = False) -> np.ndarray:
    """The array, read-only; mapped: as a map of the file. Raises UserError as read_npz does."""
    try:
        with open(path, "rb") as file:
            dtype, shape, order, start = _header(file, os.path.getsize(path))
            if not mapped or 0 in shape:
                return np.frombuffer(file.read(), dtype).reshape(shape, order=order)
        return np.memmap(path, dtype, "r", start, shape, order)
    except _DAMAGED as error:
        raise _as_user_error(path, error, remedy) from error


def require_plain(path: str | os.PathLike, remedy: str) -> None:
    """Raises UserError unless numpy opens the file without unpickling anything."""
    try:
        with open(path, "rb") as file:
            _header(file, os.path.getsize(path))
    except _DAMAGED as error:
        raise _as_user_error(path, error, remedy) from error


def of_kind(arrays: Mapping[str, np.ndarray], name: str, kinds: str, ndim: int) -> np.ndarray:
    """One of the arrays. Raises ValueError if it is missing, or not of one of the kinds of dtype
    (letters of ``dtype.kind``) and so many dimensions."""
    if name not in arrays:
        raise ValueError(f"it holds no {name}")
    found = arrays[name]
    if found.dtype.kind not in kinds or found.ndim != ndim:
        raise ValueError(f"its {name} is of type {found.dtype} and shape {found.shape}")
    return found


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as member:
        dtype, shape, order, _ = _header(member, info.file_size)
        return np.frombuffer(member.read(), dtype).reshape(shape, order=order)


def _header(file: IO[bytes], size: int) -> tuple[np.dtype, tuple[int, ...], Literal["C", "F"], int]:
    """(type, shape, order, where the numbers begin) of an array in ``size`` bytes."""
    version = np.lib.format.read_magic(file)
    if version not in _READERS:
        raise ValueError(f"its format has version {version}")
    read, width = _READERS[version]
    begins = file.tell()
    length = int.from_bytes(file.read(width), "little")
    file.seek(begins)
    if length > _LONGEST_HEADER:  # numpy reserves so many bytes before it looks at the limit
        raise ValueError(f"its header promises {length} bytes of itself")
    try:
        shape, is_fortran, dtype = read(file, max_header_size=_LONGEST_HEADER)
    except Exception as error:  # a dozen kinds: numpy evaluates the header as Python
        raise ValueError(f"its header cannot be read: {error}") from error
    start = file.tell()
    if dtype.hasobject:
        raise ValueError("it holds pickled objects, which may run any program")
    if any(length < 0 for length in shape) or dtype.itemsize * math.prod(shape) != size - start:
        raise ValueError(f"its header promises an array of shape {shape} and type {dtype}, and "
                         f"{size - start} bytes follow")
    return dtype, shape, "F" if is_fortran else "C", start


def _as_user_error(path: str | os.PathLike, error: BaseException, remedy: str) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path} does not exist. {remedy}")
    return UserError(f"{path} is damaged, or not what it should be "
                     f"({str(error) or type(error).__name__}). {remedy}")
