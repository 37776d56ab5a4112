"""Tokenized shards as files.

A shard is two files in the run's folder of shards:

    NAME.bin   for each of its parts: tokens, then lengths [documents] int32 (tokens of each),
               lines [documents] uint32 (of the shard), hashes [documents] 16 bytes, and with
               --group-key sources [documents] int64
    NAME.json  the manifest: lines, bad lines, and each part's domain, split, documents, tokens and
               byte offset in NAME.bin

A *part* is what goes from one shard to one dataset, that is, to one domain and split. The manifest
is written last: a shard that has one is whole, and is not made again.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_direct.preprocessing import reading
from megatron_direct.preprocessing.reading import Shard
from megatron_direct.runtime import files

HASH = np.dtype([("high", "<u8"), ("low", "<u8")])
FORMAT = 2  # of NAME.bin: since 2 it has sources


@dataclass(frozen=True)
class Part:
    """Where the documents lie that one shard has for one dataset."""

    domain: str
    split: str
    documents: int
    tokens: int
    offset: int


@dataclass(frozen=True)
class PartFile:
    """A part in its file."""

    path: Path
    dtype: np.dtype  # of the tokens
    part: Part

    def read_tokens(self) -> np.ndarray:
        return np.fromfile(self.path, self.dtype, self.part.tokens, offset=self.part.offset)

    def read_lengths(self) -> np.ndarray:
        return self._column(0, np.dtype(np.int32))

    def read_lines(self) -> np.ndarray:
        return self._column(4, np.dtype(np.uint32))

    def read_hashes(self) -> np.ndarray:
        return self._column(8, HASH)

    def read_sources(self) -> np.ndarray:
        """Of a run with --group-key."""
        return self._column(8 + HASH.itemsize, np.dtype(np.int64))

    def _column(self, bytes_before: int, dtype: np.dtype) -> np.ndarray:
        """bytes_before: those that the columns before this one hold of each document."""
        start = self.part.offset + self.part.tokens * self.dtype.itemsize
        return np.fromfile(self.path, dtype, self.part.documents,
                           offset=start + bytes_before * self.part.documents)


@dataclass(frozen=True)
class Manifest:
    path: str  # of the input file
    file: int  # its number among the inputs
    shard: int  # number of the shard within its file
    lines: int
    is_last: bool
    too_short: int
    bad: list[tuple[int, str]]  # line of the shard, reason
    dtype: str  # of the tokens
    parts: list[Part]


@dataclass
class Columns:
    """The documents of a part, before they are written."""

    tokens: list[np.ndarray] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)  # none without --group-key


def data_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.bin"


def write_parts(folder: Path, shard: Shard, parts: dict[tuple[str, str], Columns]) -> list[Part]:
    """Writes NAME.bin. parts: by domain and split."""
    written = []
    with files.written_whole(data_path(folder, shard.name)) as file:
        for (domain, split), columns in sorted(parts.items()):
            lengths = np.array([len(tokens) for tokens in columns.tokens], np.int32)
            written.append(Part(domain, split, len(lengths), int(lengths.sum(dtype=np.int64)),
                                file.tell()))
            for tokens in columns.tokens:
                file.write(tokens)
            file.write(lengths)
            file.write(np.array(columns.lines, np.uint32))
            file.write(b"".join(columns.hashes))
            file.write(np.array(columns.sources, np.int64))
    return written


def write_manifest(folder: Path, manifest: Manifest) -> None:
    name = reading.shard_name(manifest.file, manifest.shard)
    files.write_json(folder / f"{name}.json", dataclasses.asdict(manifest))


def read_manifest(folder: Path, name: str) -> Manifest:
    value = files.read_json(folder / f"{name}.json")
    return Manifest(**{**value, "bad": [(line, reason) for line, reason in value["bad"]],
                       "parts": [Part(**part) for part in value["parts"]]})


def names(folder: Path) -> list[str]:
    """The shards that are whole, in the order of the input."""
    return sorted(path.stem for path in folder.glob("*-*.json"))


def manifests(folder: Path) -> Iterator[Manifest]:
    """In the order of the input, one at a time in memory."""
    for name in names(folder):
        yield read_manifest(folder, name)


def with_lines_before(folder: Path) -> Iterator[tuple[Manifest, int]]:
    """Each manifest, and the lines of its file before it."""
    file, before = None, 0
    for manifest in manifests(folder):
        before = before if manifest.file == file else 0
        yield manifest, before
        file, before = manifest.file, before + manifest.lines


def document_hash(tokens: np.ndarray, end_tokens: frozenset[int]) -> bytes:
    """Of int32 tokens without the end tokens that they end in, be there one, several or none.

    So equal texts have equal hashes, whichever end was added to either.
    """
    length = len(tokens)
    while length and int(tokens[length - 1]) in end_tokens:
        length -= 1
    return hashlib.blake2b(tokens[:length].tobytes(), digest_size=HASH.itemsize).digest()
