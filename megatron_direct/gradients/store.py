"""Sketches on disk: a few files for each data-parallel rank, appended to pass by pass.

``rows-R.f32`` (or ``.bf16``) holds rank R's rows of k coordinates, ``samples-R.i64`` the sample
number of each, ``losses-R.f32`` its loss, in the order in which rank R computed them;
``passes-R.i64`` holds the number of rows behind each finished pass, written last: what lies behind
the last of them was cut short, and is cut off when the run carries on. ``plan.json`` says what is
being computed and in which layout; the manifest, with the files' digests, is written at the end.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_direct.errors import UserError
from megatron_direct.runtime import files

DTYPES = ("fp32", "bf16")
_MANIFEST, _PLAN = "manifest.json", "plan.json"
_SAMPLE, _LOSS = np.dtype(np.int64), np.dtype(np.float32)


def finished_passes(folder: Path, data_rank: int, size: int, dtype: str = "fp32") -> np.ndarray:
    """[passes] rows behind each pass that a data-parallel rank has finished."""
    *paths, ends_path = _paths(folder, data_rank, dtype)
    ends = np.fromfile(ends_path, np.int64) if ends_path.is_file() else np.empty(0, np.int64)
    for path, width in zip(paths, _widths(size, dtype), strict=True):
        held = path.stat().st_size // width if path.is_file() else 0
        ends = ends[ends <= held]  # all, unless the disk lost what it was told to keep
    return ends


class SketchWriter:
    """Appends this data-parallel rank's rows, behind the first ``passes`` that are there."""

    def __init__(self, folder: Path, data_rank: int, size: int, dtype: str = "fp32",
                 passes: int = 0):
        self._dtype = dtype
        ends = finished_passes(folder, data_rank, size, dtype)[:passes]
        self._rows = int(ends[-1]) if len(ends) else 0
        lengths = [self._rows * width for width in _widths(size, dtype)] + [ends.nbytes]
        self._files = [_cut_to(path, length) for path, length in
                       zip(_paths(folder, data_rank, dtype), lengths, strict=True)]

    def append(self, sketches: np.ndarray, samples: np.ndarray, losses: np.ndarray) -> None:
        """One pass: [n, k] rows, [n] sample numbers, [n] losses. On disk when this returns."""
        arrays = (_encoded(sketches, self._dtype), samples.astype(_SAMPLE), losses.astype(_LOSS))
        for file, array in zip(self._files[:3], arrays, strict=True):
            file.write(np.ascontiguousarray(array).tobytes())
            os.fsync(file.fileno())
        self._rows += len(samples)
        self._files[3].write(np.int64(self._rows).tobytes())

    def close(self) -> None:
        for file in self._files:
            os.fsync(file.fileno())
            file.close()


@dataclass(frozen=True)
class Sketches:
    """rows: [N, k] float32, row n of sample ``samples[n]`` (ascending); losses: [N]."""

    rows: np.ndarray
    samples: np.ndarray
    losses: np.ndarray

    @property
    def finite(self) -> np.ndarray:
        """[N] False where a sample's gradient or loss is not finite: it can never be selected."""
        return np.isfinite(self.losses) & np.isfinite(self.rows.sum(1))


def begin(folder: Path, plan: dict) -> bool:
    """Makes the folder ready for a plan (rank 0 only); True if rows of it are carried on with.

    plan: all that the bytes of the rows depend on, the layout included. Unfinished rows of another
    plan are removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _PLAN
    if path.is_file() and files.read_json(path) == files.as_json(plan):
        return True
    for old in folder.iterdir():
        old.unlink()
    files.write_json(path, plan)
    return False


def finish(folder: Path, identity: dict, size: int, data_size: int, dtype: str = "fp32") -> None:
    """Writes the manifest, once all ranks have written their rows (rank 0 only)."""
    files.write_json(folder / _MANIFEST, {
        "identity": identity, "sketch_size": size, "sketch_dtype": dtype,
        "data_parallel_size": data_size,
        "digests": {path.name: files.file_digest(path) for rank in range(data_size)
                    for path in _paths(folder, rank, dtype)[:3]},
    })


def is_finished(folder: Path, identity: dict) -> bool:
    """Whether the folder holds finished sketches of these very samples at these parameters."""
    manifest = folder / _MANIFEST
    return manifest.is_file() and files.read_json(manifest)["identity"] == files.as_json(identity)


def num_bytes(folder: Path) -> int:
    """Of all rows in memory, as float32."""
    manifest = files.read_json(folder / _MANIFEST)
    dtype = manifest["sketch_dtype"]
    on_disk = sum(_paths(folder, rank, dtype)[0].stat().st_size
                  for rank in range(manifest["data_parallel_size"]))
    return on_disk * 4 // _row_dtype(dtype).itemsize


def load(folder: Path, share: int = 0, num_shares: int = 1) -> Sketches:
    """The rows, sorted by sample number; share r of n takes every n-th rank's file.

    The files are mapped, and each row is copied once, to its place. Raises UserError where a file
    was changed.
    """
    manifest = files.read_json(folder / _MANIFEST)
    size, dtype = manifest["sketch_size"], manifest["sketch_dtype"]
    parts = []
    for rank in range(share, manifest["data_parallel_size"], num_shares):
        paths = _paths(folder, rank, dtype)[:3]
        for path in paths:
            if not path.is_file() or files.file_digest(path) != manifest["digests"][path.name]:
                raise UserError(f"{path} is not as it was written. Delete {folder} and run select "
                                "again.")
        parts.append([_mapped(path, kind) for path, kind in zip(
            paths, (_row_dtype(dtype), _SAMPLE, _LOSS), strict=True)])
    samples = np.concatenate([np.empty(0, _SAMPLE), *(part[1] for part in parts)])
    losses = np.concatenate([np.empty(0, _LOSS), *(part[2] for part in parts)])
    order = np.argsort(samples)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    rows, start = np.empty((len(samples), size), np.float32), 0
    for part, numbers, _ in parts:
        rows[place[start: start + len(numbers)]] = _decoded(part, dtype).reshape(-1, size)
        start += len(numbers)
    return Sketches(rows, samples[order], losses[order])


def _paths(folder: Path, rank: int, dtype: str) -> tuple[Path, Path, Path, Path]:
    return (folder / f"rows-{rank}.{'f32' if dtype == 'fp32' else dtype}",
            folder / f"samples-{rank}.i64", folder / f"losses-{rank}.f32",
            folder / f"passes-{rank}.i64")


def _widths(size: int, dtype: str) -> tuple[int, int, int]:
    """Bytes of a sample in each of the first three files."""
    return size * _row_dtype(dtype).itemsize, _SAMPLE.itemsize, _LOSS.itemsize


def _row_dtype(dtype: str) -> np.dtype:
    """bf16, which numpy does not know, is held as the upper halves of float32."""
    return np.dtype(np.float32) if dtype == "fp32" else np.dtype(np.uint16)


def _encoded(rows: np.ndarray, dtype: str) -> np.ndarray:
    rows = rows.astype(np.float32)
    if dtype == "fp32":
        return rows
    bits = rows.view(np.uint32)
    # To the nearest, ties to even; adding to a NaN's bits might make it infinite, or a number.
    nearest = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(rows), np.uint32(0x7FC0), nearest).astype(np.uint16)


def _decoded(rows: np.ndarray, dtype: str) -> np.ndarray:
    return rows if dtype == "fp32" else (rows.astype(np.uint32) << 16).view(np.float32)


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)


def _cut_to(path: Path, length: int):
    """The file, open at its end, without what lies behind ``length``."""
    file = open(path, "ab", buffering=0)  # noqa: SIM115
    file.truncate(length)
    return file
