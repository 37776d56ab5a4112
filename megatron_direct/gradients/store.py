"""Sketches on disk: one pair of files for each data-parallel rank, written row by row.

``rows-R.f32`` holds float32 rows of k coordinates, ``samples-R.i64`` the sample number of each, and
``losses-R.f32`` its loss, in the order in which rank R computed them. The manifest is written last:
sketches without one are unfinished, and are computed again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_direct import files
from megatron_direct.errors import UserError

_MANIFEST = "manifest.json"


class SketchWriter:
    """Appends this data-parallel rank's rows."""

    def __init__(self, folder: Path, data_rank: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._files = [open(path, "wb") for path in _paths(folder, data_rank)]  # noqa: SIM115

    def append(self, sketches: np.ndarray, samples: np.ndarray, losses: np.ndarray) -> None:
        """[n, k] rows, [n] sample numbers, [n] losses."""
        for file, array, dtype in zip(self._files, (sketches, samples, losses),
                                      (np.float32, np.int64, np.float32), strict=True):
            np.ascontiguousarray(array, dtype).tofile(file)

    def close(self) -> None:
        for file in self._files:
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


def finish(folder: Path, identity: dict, size: int, data_size: int) -> None:
    """Writes the manifest, once all ranks have written their rows (rank 0 only)."""
    files.write_json(folder / _MANIFEST, {
        "identity": identity, "sketch_size": size, "data_parallel_size": data_size,
        "digests": {path.name: files.file_digest(path)
                    for rank in range(data_size) for path in _paths(folder, rank)},
    })


def is_finished(folder: Path, identity: dict) -> bool:
    """Whether the folder holds finished sketches of these very samples at these parameters."""
    manifest = folder / _MANIFEST
    return manifest.is_file() and files.read_json(manifest)["identity"] == files.as_json(identity)


def num_bytes(folder: Path) -> int:
    """Of all rows."""
    size = files.read_json(folder / _MANIFEST)["data_parallel_size"]
    return sum(_paths(folder, rank)[0].stat().st_size for rank in range(size))


def load(folder: Path, share: int = 0, num_shares: int = 1) -> Sketches:
    """The rows, sorted by sample number; share r of n takes every n-th rank's file.

    Raises UserError where a file was changed.
    """
    manifest = files.read_json(folder / _MANIFEST)
    size = manifest["sketch_size"]
    parts = [(np.empty((0, size), np.float32), np.empty(0, np.int64), np.empty(0, np.float32))]
    for rank in range(share, manifest["data_parallel_size"], num_shares):
        for path in _paths(folder, rank):
            if not path.is_file() or files.file_digest(path) != manifest["digests"][path.name]:
                raise UserError(f"{path} is not as it was written. Delete {folder} and run select "
                                "again.")
        rows, samples, losses = _paths(folder, rank)
        parts.append((np.fromfile(rows, np.float32).reshape(-1, size),
                      np.fromfile(samples, np.int64), np.fromfile(losses, np.float32)))
    rows, samples, losses = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    order = np.argsort(samples)
    return Sketches(rows[order], samples[order], losses[order])


def _paths(folder: Path, rank: int) -> tuple[Path, Path, Path]:
    return (folder / f"rows-{rank}.f32", folder / f"samples-{rank}.i64",
            folder / f"losses-{rank}.f32")
