"""Exact duplicates among all documents of a run, and of the datasets that it must not overlap.

Two documents are equal if their tokens are, without those that end them. Of equal documents one is
*kept*: that of an excluded dataset, else of the test set, else of the validation set, else of a
pool; among those of one kind the first of the input. The others are *copies*, where the kept one is
of the same kind, or *leaked*; a leak would let a model be trained on, or samples be selected by,
what the model is tested with.

A partitioned sort: hashes are spread by their leading bits over files of about a million, and each
file is sorted in memory, so that memory does not grow with the input. The result is one byte for
each document, on disk, in the order of the manifests and their parts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_direct.errors import UserError
from megatron_direct.preprocessing import catalogue, shards
from megatron_direct.preprocessing.catalogue import Catalogue
from megatron_direct.preprocessing.excluded import ExcludedDataset

FLAGS = "duplicates.bin"  # in the folder of shards: [documents] uint8 of
UNIQUE, COPY, LEAK = range(3)
# place: of the shard in its order, and of the line in it; or of the dataset and the document.
_RECORD = np.dtype([("hash", shards.HASH), ("kind", "u1"), ("place", "<u8"), ("number", "<u8")])
_KINDS = ("excluded", "test", "valid", "pool")
_RECORDS_AT_A_TIME = 1 << 20  # 33 MB, and as much again while they are sorted
_EXAMPLES = 5


@dataclass
class Found:
    """How many there are; FLAGS says which."""

    copies: int = 0
    leaks: int = 0
    # Of leaks: (place, place of the kept document, its kind).
    examples: list[tuple[int, int, int]] = field(default_factory=list)


def find(folder: Path, contents: Catalogue, excluded: Sequence[ExcludedDataset]) -> Found:
    """Among the shards of the folder, whose catalogue is ``contents``."""
    found, path = Found(), folder / FLAGS
    with open(path, "wb") as file:
        # Not truncated to its length: a map of a file with holes crashes where the disk is full.
        os.posix_fallocate(file.fileno(), 0, contents.documents)
    flags = np.memmap(path, np.uint8, "r+", shape=(contents.documents,))
    num_records = contents.documents + sum(dataset.num_documents for dataset in excluded)
    for records in _partitions(folder, _records(contents, excluded), num_records):
        _mark(records, flags, found)
    flags.flush()
    return found


def _records(contents: Catalogue, excluded: Sequence[ExcludedDataset]) -> Iterator[np.ndarray]:
    for number, dataset in enumerate(excluded):
        for documents, hashes in dataset.hashes():
            yield _as_records(hashes, "excluded", (number << 32) + documents.astype(np.uint64), 0)
    for target in contents.targets:
        for entry in catalogue.entries(target):
            lines = entry.file.read_lines().astype(np.uint64)
            yield _as_records(entry.file.read_hashes(), target.split,
                              (entry.manifest << 32) + lines, entry.first)


def _as_records(hashes: np.ndarray, kind: str, places: np.ndarray, first: int) -> np.ndarray:
    records = np.empty(len(hashes), _RECORD)
    records["hash"] = hashes
    records["kind"] = _KINDS.index(kind)
    records["place"] = places
    records["number"] = np.arange(first, first + len(hashes))
    return records


def _partitions(folder: Path, blocks: Iterator[np.ndarray], total: int) -> Iterator[np.ndarray]:
    """All records in pieces of about _RECORDS_AT_A_TIME, equal hashes in one piece."""
    count = -(-total // _RECORDS_AT_A_TIME)
    paths = [folder / f"hashes-{number:05d}.bin" for number in range(count)]
    for path in paths:
        path.unlink(missing_ok=True)
    waiting: list[np.ndarray] = []
    num_waiting = 0
    for block in blocks:
        waiting.append(block)
        num_waiting += len(block)
        if num_waiting >= _RECORDS_AT_A_TIME:
            _spread(np.concatenate(waiting), paths)
            waiting, num_waiting = [], 0
    if waiting:
        _spread(np.concatenate(waiting), paths)
    for path in paths:
        if path.is_file():
            yield np.fromfile(path, _RECORD)
            path.unlink()


def _spread(records: np.ndarray, paths: Sequence[Path]) -> None:
    """Appends each record to the file that its hash belongs to."""
    count = len(paths)
    target = ((records["hash"]["high"] >> np.uint64(32)) * np.uint64(count)) >> np.uint64(32)
    order = np.argsort(target, kind="stable")
    ends = np.searchsorted(target[order], np.arange(count), side="right")
    for path, piece in zip(paths, np.split(records[order], ends[:-1]), strict=True):
        if len(piece):
            with open(path, "ab") as file:
                piece.tofile(file)


def _mark(records: np.ndarray, flags: np.ndarray, found: Found) -> None:
    order = np.lexsort((records["place"], records["kind"], records["hash"]["low"],
                        records["hash"]["high"]))
    records = records[order]
    same = np.concatenate([[False], records["hash"][1:] == records["hash"][:-1]])
    kept = np.maximum.accumulate(np.where(same, 0, np.arange(len(records))))
    copies = np.flatnonzero(same & (records["kind"] > 0))
    kept = kept[copies]
    is_leak = records["kind"][copies] != records["kind"][kept]
    flags[records["number"][copies]] = np.where(is_leak, LEAK, COPY)
    found.copies += int(np.sum(~is_leak))
    found.leaks += int(np.sum(is_leak))
    leaks, kept = records[copies[is_leak]], records[kept[is_leak]]
    first = np.argsort(leaks["place"])[:_EXAMPLES]
    found.examples = sorted(found.examples + [
        (int(leaks["place"][i]), int(kept["place"][i]), int(kept["kind"][i])) for i in first]
    )[:_EXAMPLES]


def refuse_leaks(folder: Path, found: Found, excluded: Sequence[ExcludedDataset]) -> None:
    """Raises UserError that names the first leaked documents and what they are equal to."""
    wanted = {place for leaked, kept, kind in found.examples
              for place in ([leaked] if _KINDS[kind] == "excluded" else [leaked, kept])}
    where = dict(_lines_of(folder, wanted))
    lines = []
    for place, kept, kind in found.examples:
        other = (f"document {kept & 0xffffffff} of {excluded[kept >> 32].prefix}"
                 if _KINDS[kind] == "excluded" else f"{where[kept]} ({_KINDS[kind]})")
        lines.append(f"\n  {where[place]} equals {other}")
    raise UserError(
        f"{found.leaks} documents are also in the validation or test set, or in an excluded "
        f"dataset:{''.join(lines)}{'' if found.leaks <= len(lines) else chr(10) + '  ...'}\n"
        "Remove them from the input, or drop them with --drop-duplicates. Texts that are split "
        "apart are equal where --group-key separates them, or where the tokenizer makes them alike "
        "(white space, width of letters). What was tokenized is kept.")


def _lines_of(folder: Path, places: set[int]) -> Iterator[tuple[int, str]]:
    """Places of the input as path:line."""
    by_shard: dict[int, list[int]] = {}
    for place in places:
        by_shard.setdefault(place >> 32, []).append(place)
    for number, (manifest, before) in enumerate(shards.with_lines_before(folder)):
        for place in by_shard.get(number, []):
            yield place, f"{manifest.path}:{before + (place & 0xffffffff) + 1}"
