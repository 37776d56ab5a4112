"""Exact duplicates among all documents of a run, and of the datasets that it must not overlap.

Two documents are equal if their tokens are. Of equal documents one is *kept*: that of an excluded
dataset, else of the test set, else of the validation set, else of a pool; among those of one kind
the first of the input. The others are *copies*, within the kind of the kept one or *leaked* out of
it; a leak is what would let a model be trained on, or selected by, what it is tested with.

A partitioned sort: hashes are spread by their leading bits over files of about a million, and each
file is sorted in memory, so that memory does not grow with the input. What is found is one byte a
document, on disk, in the order of the manifests and their parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_direct.errors import UserError
from megatron_direct.preprocessing import shards
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
    """How many; which, is in FLAGS."""

    copies: int = 0
    leaks: int = 0
    examples: list[tuple] = field(default_factory=list)  # leaks: (place, its kept one's, kind)


def find(folder: Path, excluded: Sequence[ExcludedDataset]) -> Found:
    """Among the shards of the folder."""
    found, path = Found(), folder / FLAGS
    total = sum(part.documents for manifest in shards.manifests(folder) for part in manifest.parts)
    with open(path, "wb") as file:
        file.truncate(total)
    if total == 0:
        return found
    flags = np.memmap(path, np.uint8, "r+", shape=(total,))
    num_records = total + sum(dataset.num_documents for dataset in excluded)
    for records in _partitions(folder, _records(folder, excluded), num_records):
        _mark(records, flags, found)
    flags.flush()
    return found


def _records(folder: Path, excluded: Sequence[ExcludedDataset]) -> Iterator[np.ndarray]:
    for place, dataset in enumerate(excluded):
        number = 0
        for hashes in dataset.hashes():
            documents = np.arange(number, number + len(hashes))
            yield _as_records(hashes, "excluded", place, documents, 0)
            number += len(hashes)
    number = 0
    for place, manifest in enumerate(shards.manifests(folder)):
        for part in manifest.parts:
            yield _as_records(part.read_hashes(), part.split, place, part.read_lines(), number)
            number += part.documents


def _as_records(hashes, kind: str, place: int, lines: np.ndarray, number: int) -> np.ndarray:
    records = np.empty(len(hashes), _RECORD)
    records["hash"] = hashes
    records["kind"] = _KINDS.index(kind)
    records["place"] = (place << 32) + lines.astype(np.uint64)
    records["number"] = np.arange(number, number + len(hashes))
    return records


def _partitions(folder: Path, blocks: Iterator[np.ndarray], total: int) -> Iterator[np.ndarray]:
    """All records in pieces of about _RECORDS_AT_A_TIME, equal hashes in one piece."""
    count = -(-total // _RECORDS_AT_A_TIME)
    paths = [folder / f"hashes-{number:05d}.bin" for number in range(count)]
    for path in paths:
        path.unlink(missing_ok=True)
    waiting: list[np.ndarray] = []

    def spread():
        records = np.concatenate(waiting)
        waiting.clear()
        target = ((records["hash"]["high"] >> np.uint64(32)) * np.uint64(count)) >> np.uint64(32)
        order = np.argsort(target, kind="stable")
        ends = np.searchsorted(target[order], np.arange(count), side="right")
        for path, piece in zip(paths, np.split(records[order], ends[:-1]), strict=True):
            if len(piece):
                with open(path, "ab") as file:
                    piece.tofile(file)

    for block in blocks:
        waiting.append(block)
        if sum(map(len, waiting)) >= _RECORDS_AT_A_TIME:
            spread()
    if waiting:
        spread()
    for path in paths:
        if path.is_file():
            yield np.fromfile(path, _RECORD)
            path.unlink()


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
    wanted = {place for example in found.examples for place in example[:2]}
    where = dict(_places(folder, wanted))
    lines = []
    for place, kept, kind in found.examples:
        other = (f"document {kept & 0xffffffff} of "
                 f"{excluded[kept >> 32].prefix}"
                 if _KINDS[kind] == "excluded" else f"{where[kept]} ({_KINDS[kind]})")
        lines.append(f"\n  {where[place]} equals {other}")
    raise UserError(
        f"{found.leaks} documents also stand in the validation or test set, or in an excluded "
        f"dataset:{''.join(lines)}{'' if found.leaks <= len(lines) else chr(10) + '  ...'}\n"
        "Take them out of the input, leave them out with --drop-duplicates, or, where --group-key "
        "divides equal documents, go without it. What was tokenized is kept.")


def _places(folder: Path, wanted: set[int]) -> Iterator[tuple[int, str]]:
    """Places of the input as path:line."""
    by_shard: dict[int, list[int]] = {}
    for place in wanted:
        by_shard.setdefault(place >> 32, []).append(place)
    for number, (manifest, before) in enumerate(with_lines_before(folder)):
        for place in by_shard.get(number, []):
            yield place, f"{manifest.path}:{before + (place & 0xffffffff) + 1}"


def with_lines_before(folder: Path) -> Iterator[tuple[shards.Manifest, int]]:
    """Each manifest, and the lines of its file before it."""
    file, before = None, 0
    for manifest in shards.manifests(folder):
        before = before if manifest.file == file else 0
        yield manifest, before
        file, before = manifest.file, before + manifest.lines
