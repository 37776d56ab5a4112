"""All parts of all shards, sorted by the dataset that they go to.

The manifests are read once, after the last shard was tokenized. For each dataset a file lists its
parts in the order of the input, so that what follows reads only what it needs, however many
datasets there are, and memory does not grow with the number of shards.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_direct.errors import UserError
from megatron_direct.preprocessing import reading, shards
from megatron_direct.preprocessing.shards import Part, PartFile
from megatron_direct.runtime import files

# A --domain-key that names something else, such as an address, would make a dataset of a document.
MAX_DOMAINS = 1000
_ENTRIES_AT_A_TIME = 1 << 14
# file, shard: the numbers that name the shard. manifest: its place among all manifests. first: the
# number of the part's first document among all documents of the run.
_ENTRY = np.dtype([("file", "<u4"), ("shard", "<u4"), ("manifest", "<u4"), ("documents", "<u8"),
                   ("tokens", "<u8"), ("offset", "<u8"), ("first", "<u8")])


@dataclass(frozen=True)
class PlannedDataset:
    """A dataset that is to be written."""

    prefix: str
    domain: str
    split: str
    dtype: str
    tokens: int
    entries: Path  # the file that lists its parts


@dataclass(frozen=True)
class Entry:
    """A part, and its place in the run."""

    file: PartFile
    manifest: int
    first: int


@dataclass(frozen=True)
class Catalogue:
    targets: tuple[PlannedDataset, ...]
    documents: int
    too_short: int
    bad_lines: int


def build_catalogue(folder: Path, output_prefix: str) -> Catalogue:
    """Raises UserError where the shards hold no document, or too many domains."""
    lists = _Lists(folder)
    documents = too_short = bad_lines = 0
    dtype = ""
    for number, manifest in enumerate(shards.manifests(folder)):
        too_short += manifest.too_short
        bad_lines += len(manifest.bad)
        dtype = manifest.dtype
        for part in manifest.parts:
            lists.add(part, (manifest.file, manifest.shard, number, part.documents, part.tokens,
                             part.offset, documents))
            documents += part.documents
    lists.flush()
    if not documents:
        raise UserError("--input holds no document of two tokens or more. Correct --input or "
                        "--json-keys.")
    names = _file_names({domain for domain, _ in lists.tokens}, output_prefix)
    targets = tuple(PlannedDataset(f"{output_prefix}_{names[domain]}_{split}", domain, split, dtype,
                           lists.tokens[domain, split], lists.path(domain, split))
                    for domain, split in sorted(lists.tokens))
    return Catalogue(targets, documents, too_short, bad_lines)


def entries(target: PlannedDataset) -> Iterator[Entry]:
    """The parts of a dataset in the order of the input."""
    folder, dtype = target.entries.parent, np.dtype(target.dtype)
    with open(target.entries, "rb") as file:
        while block := file.read(_ENTRIES_AT_A_TIME * _ENTRY.itemsize):
            for line in np.frombuffer(block, _ENTRY):
                file_number, shard, manifest, documents, tokens, offset, first = line.tolist()
                path = shards.data_path(folder, reading.shard_name(file_number, shard))
                part = Part(target.domain, target.split, documents, tokens, offset)
                yield Entry(PartFile(path, dtype, part), manifest, first)


class _Lists:
    """The files of entries while they are written, one for each domain and split."""

    def __init__(self, folder: Path):
        self.tokens: dict[tuple[str, str], int] = {}
        self._folder = folder
        self._numbers: dict[tuple[str, str], int] = {}  # of the files
        self._waiting: dict[tuple[str, str], list[tuple]] = {}
        self._num_waiting = 0
        self._domains: set[str] = set()
        for path in folder.glob("parts-*.bin"):  # of a run that did not come to its end
            path.unlink()

    def path(self, domain: str, split: str) -> Path:
        return self._folder / f"parts-{self._numbers[domain, split]:05d}.bin"

    def add(self, part: Part, entry: tuple) -> None:
        key = part.domain, part.split
        if key not in self._numbers:
            self._numbers[key] = len(self._numbers)
            self._require_domain(part.domain)
        self.tokens[key] = self.tokens.get(key, 0) + part.tokens
        self._waiting.setdefault(key, []).append(entry)
        self._num_waiting += 1
        if self._num_waiting == _ENTRIES_AT_A_TIME:
            self.flush()

    def flush(self) -> None:
        for key, waiting in self._waiting.items():
            with open(self.path(*key), "ab") as file:
                np.array(waiting, _ENTRY).tofile(file)
        self._waiting.clear()
        self._num_waiting = 0

    def _require_domain(self, domain: str) -> None:
        self._domains.add(domain)
        if len(self._domains) > MAX_DOMAINS:
            raise UserError(f"--domain-key gives more than {MAX_DOMAINS} domains, and each becomes "
                            "a dataset. Name a key with fewer values.")


def _file_names(domains: set[str], output_prefix: str) -> dict[str, str]:
    """A part of a file name for each domain, without characters that need quoting.

    Of names that would be the same, and of those that are too long, the end is replaced by a
    digest; the card has the whole name.
    """
    names = {domain: re.sub(r"[^\w.+-]", "_", domain) for domain in domains}
    counts = Counter(names.values())
    room = files.LONGEST_NAME - len(os.path.basename(output_prefix).encode())
    return {domain: name if counts[name] == 1 and len(name.encode()) <= room
            else files.shortened(name, domain, room) for domain, name in names.items()}
