"""Sketches on disk: rows that know their sample, appended to by every data-parallel rank.

``rows-R.f32`` (or ``.bf16``) holds rank R's rows of k coordinates, in the order in which it
computed them; ``entries-R.bin`` holds an entry for each row: which document of which dataset it is
of, the sample's loss, and a checksum over all of them. A row counts once its entry is on the disk.
What follows the last sound entry was cut short, by a kill or a full disk, and is cut off when
the store is written to again. Neither layout nor micro-batches leave a trace: a pass that was begun
on eight ranks is carried on by four.

``datasets.json`` gives each dataset (by its digest) the number that entries know it by.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_direct.errors import UserError
from megatron_direct.runtime import files

DTYPES = ("fp32", "bf16")
_DATASETS = "datasets.json"
_ENTRY = np.dtype([("document", "<i8"), ("dataset", "<i4"), ("loss", "<f4"), ("checksum", "<u4")])


@dataclass(frozen=True)
class Entries:
    """Where each row lies, of n rows: [n] number of the file, [n] position in it, [n] dataset and
    document that it is of, [n] loss of the sample, [n] checksum."""

    file: np.ndarray
    position: np.ndarray
    dataset: np.ndarray
    document: np.ndarray
    loss: np.ndarray
    checksum: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence[Entries]) -> Entries:
        empty = np.empty(0, np.int64)
        return cls(*(np.concatenate(arrays) for arrays in zip(
            (empty,) * 6, *(vars(part).values() for part in parts), strict=True)))

    def __len__(self) -> int:
        return len(self.file)

    def __getitem__(self, rows) -> Entries:
        return Entries(*(array[rows] for array in vars(self).values()))


@dataclass(frozen=True)
class Sketches:
    """rows: [n, k] float32, row i of sample ``samples[i]`` (ascending); losses: [n]."""

    rows: np.ndarray
    samples: np.ndarray
    losses: np.ndarray

    @property
    def finite(self) -> np.ndarray:
        """[n] False where a sample's gradient or loss is not finite: it can never be selected."""
        return np.isfinite(self.losses) & np.isfinite(self.rows.sum(1))


class SketchStore:
    """The sketches of one folder: rows of ``size`` coordinates, stored as ``dtype``."""

    def __init__(self, folder: Path, size: int, dtype: str = "fp32"):
        self.folder, self.size, self.dtype = folder, size, dtype
        self._remedy = f"Delete {folder} and run the command again."
        self._row_bytes = size * _row_dtype(dtype).itemsize

    def number_datasets(self, dataset_digests: Sequence[str]) -> None:
        """Gives those that are new a number (rank 0 only)."""
        known = self.datasets()
        added = [digest for digest in dataset_digests if digest not in known]
        if added or not known:
            files.write_json(self.folder / _DATASETS, [*known, *added])

    def datasets(self) -> list[str]:
        """Digests of the datasets, in the order of their numbers."""
        path = self.folder / _DATASETS
        found = files.read_json(path) if path.is_file() else []
        if not isinstance(found, list) or not all(isinstance(digest, str) for digest in found):
            raise UserError(f"{path} is damaged: expected a list of digests. {self._remedy}")
        return found

    def has_files(self) -> bool:
        """Whether rows were ever written into the folder."""
        return bool(self._file_numbers())

    def entries(self) -> Entries:
        """Of every row that counts."""
        return Entries.joined(list(self.entries_by_file()))

    def entries_by_file(self) -> Iterator[Entries]:
        """The same, of a file at a time."""
        known = len(self.datasets())
        for number in self._file_numbers():
            entries = self._sound_entries(number)
            which = entries["dataset"]
            if len(which) and not 0 <= which.min() <= which.max() < known:
                raise UserError(f"{self.folder / _DATASETS} has {known} datasets, but there are "
                                f"rows of dataset {which.max()}. {self._remedy}")
            yield Entries(
                np.full(len(entries), number), np.arange(len(entries)), entries["dataset"],
                entries["document"], entries["loss"], entries["checksum"])

    def writer(self, number: int) -> SketchWriter:
        """Appends to the file of this number, after its last row that counts."""
        return SketchWriter(self, number, len(self._sound_entries(number)))

    def read(self, entries: Entries, samples: np.ndarray) -> Sketches:
        """The rows of these entries, whose sample numbers are given, sorted by those.

        Each file is mapped, and each row copied once, to its place. Raises UserError for a row
        whose checksum is wrong.
        """
        order = np.argsort(samples, kind="stable")
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        rows = np.empty((len(samples), self.size), np.float32)
        for number in np.unique(entries.file).tolist():
            path = self._rows_path(number)
            with open(path, "rb") as file:  # a last row may be cut short
                stored = np.memmap(file, _row_dtype(self.dtype), "r",
                                   shape=(_size(file) // self._row_bytes, self.size))
            here = np.flatnonzero(entries.file == number)
            for i in here[np.argsort(entries.position[here])].tolist():
                row = stored[entries.position[i]]
                if _checksum(row, entries.dataset[i], entries.document[i], entries.loss[i]) != \
                        entries.checksum[i]:
                    raise UserError(f"row {entries.position[i]} of {path} is damaged (wrong "
                                    f"checksum). {self._remedy}")
                rows[place[i]] = _decoded(row, self.dtype)
        return Sketches(rows, samples[order], entries.loss[order].astype(np.float32))

    def num_bytes(self, count: int) -> int:
        """Of so many rows in memory, as float32."""
        return count * self.size * 4

    def _file_numbers(self) -> list[int]:
        names = (re.fullmatch(r"entries-(\d+)\.bin", path.name)
                 for path in self.folder.glob("entries-*.bin"))
        return sorted(int(name[1]) for name in names if name)

    def _sound_entries(self, number: int) -> np.ndarray:
        """The entries of a file up to the first that is cut short, or that has no row.

        A disk that loses data it was to keep leaves a tail of zeros: the checksum of the last
        entries finds it, and they are looked at backwards until one is sound.
        """
        try:
            with open(self._entries_path(number), "rb") as file, \
                    open(self._rows_path(number), "rb") as rows:
                count = min(_size(file) // _ENTRY.itemsize, _size(rows) // self._row_bytes)
                entries = np.fromfile(file, _ENTRY, count)
                if not count:
                    return entries
                stored = np.memmap(rows, _row_dtype(self.dtype), "r", shape=(count, self.size))
        except FileNotFoundError:
            return np.empty(0, _ENTRY)
        while count:
            last = entries[count - 1]
            if _checksum(stored[count - 1], last["dataset"], last["document"], last["loss"]) == \
                    last["checksum"]:
                break
            count -= 1
        return entries[:count]

    def _rows_path(self, number: int) -> Path:
        return self.folder / f"rows-{number}.{'f32' if self.dtype == 'fp32' else self.dtype}"

    def _entries_path(self, number: int) -> Path:
        return self.folder / f"entries-{number}.bin"


class SketchWriter:
    """Appends rows and, once these are on the disk, their entries."""

    def __init__(self, store: SketchStore, number: int, count: int):
        self._store = store
        try:
            store.folder.mkdir(parents=True, exist_ok=True)
            self._rows = _cut_to(store._rows_path(number), count * store._row_bytes)
            self._entries = _cut_to(store._entries_path(number), count * _ENTRY.itemsize)
            files.sync_folder(store.folder)
        except OSError as error:
            raise files.cannot_write(store.folder, error) from error

    def append(self, rows: np.ndarray, datasets: np.ndarray, documents: np.ndarray,
               losses: np.ndarray) -> None:
        """[n, k] rows of [n] documents of [n] datasets, [n] losses. On disk when this returns."""
        encoded = np.ascontiguousarray(_encoded(rows, self._store.dtype))
        entries = np.empty(len(encoded), _ENTRY)
        entries["dataset"], entries["document"], entries["loss"] = datasets, documents, losses
        entries["checksum"] = [
            _checksum(row, entry["dataset"], entry["document"], entry["loss"])
            for row, entry in zip(encoded, entries, strict=True)]
        for file, data in ((self._rows, encoded.tobytes()), (self._entries, entries.tobytes())):
            files.append(file, data)

    def close(self) -> None:
        for file in (self._rows, self._entries):
            file.close()


def _size(file: BinaryIO) -> int:
    """Of an open file: of a name, NFS clients know the size from before others appended to it."""
    return os.fstat(file.fileno()).st_size


def _checksum(row: np.ndarray, dataset, document, loss) -> int:
    entry = np.array((document, dataset, loss, 0), _ENTRY)
    return zlib.crc32(entry.tobytes(), zlib.crc32(row.tobytes()))


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


def _cut_to(path: Path, length: int):
    """The file, open at its end, cut off at ``length``."""
    file = open(path, "ab", buffering=0)  # noqa: SIM115
    file.truncate(length)
    return file
