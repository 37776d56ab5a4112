"""Tokenized shards on disk.

A shard is two files in the run's folder of shards:

    NAME.bin   for each of its parts: tokens, then lengths [documents] int32 (tokens of each),
               lines [documents] uint32 (of the shard), hashes [documents] 16 bytes
    NAME.json  the manifest: lines, bad lines, and each part's domain, split, documents, tokens and
               byte offset in NAME.bin

A *part* is what goes from one shard to one prefix, that is, to one domain and split. The manifest
is written last: a shard that has one is whole, and is not made again. ``plan.json`` tells what the
shards were made of, so that they are never taken for those of another input or other flags.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_direct.errors import UserError
from megatron_direct.preprocessing import documents, reading, splits, tokenizer
from megatron_direct.preprocessing.documents import BadLine, Document, Fields
from megatron_direct.preprocessing.reading import Shard, Stream
from megatron_direct.runtime import files

HASH = np.dtype([("high", "<u8"), ("low", "<u8")])
_TEXTS_AT_A_TIME = 64
# NFS clients see new files of others after a minute at the latest (acdirmax).
SECONDS_UNTIL_FILES_SHOW = 90


@dataclass(frozen=True)
class Settings:
    folder: Path
    fields: Fields
    shares: tuple[float, ...]  # of splits.SPLITS
    seed: int
    tokenizer_model: Path
    eod_token: str | None
    append_eod: bool
    skip_bad_lines: bool


class Counts(NamedTuple):
    """text: its size in the input, for the progress bar."""

    text: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class Part:
    """Where one prefix's documents of one shard lie."""

    path: Path
    dtype: str
    domain: str
    split: str
    documents: int
    tokens: int
    offset: int

    def read_tokens(self) -> np.ndarray:
        return np.fromfile(self.path, self.dtype, self.tokens, offset=self.offset)

    def read_lengths(self) -> np.ndarray:
        return self._column(0, np.dtype(np.int32))

    def read_lines(self) -> np.ndarray:
        return self._column(4, np.dtype(np.uint32))

    def read_hashes(self) -> np.ndarray:
        return self._column(8, HASH)

    def _column(self, bytes_before: int, dtype: np.dtype) -> np.ndarray:
        """bytes_before: those that the columns in front hold of each document."""
        start = self.offset + self.tokens * np.dtype(self.dtype).itemsize
        return np.fromfile(self.path, dtype, self.documents,
                           offset=start + bytes_before * self.documents)


@dataclass(frozen=True)
class Manifest:
    path: Path  # of the input file
    file: int
    lines: int
    is_last: bool
    too_short: int
    bad: list[tuple[int, str]]  # line of the shard, reason
    parts: list[Part]


def open_folder(folder: Path, plan: dict) -> None:
    """Makes the folder, or takes it up. Raises UserError where it belongs to another plan."""
    old, plan = read_plan(folder), files.as_json(plan)
    if old is None:
        files.write_json(folder / "plan.json", plan)
    elif old != plan:
        changed = sorted(key for key in {*old, *plan} if old.get(key) != plan.get(key))
        raise UserError(f"{folder} holds the shards of an unfinished run with another "
                        f"{', '.join(changed)}. Run that one again to its end, or delete the "
                        "folder.")


def read_plan(folder: Path) -> dict | None:
    path = folder / "plan.json"
    return files.read_json(path) if path.is_file() else None


def manifests(folder: Path) -> Iterator[Manifest]:
    """In the order of the input, one at a time in memory."""
    for name in sorted(path.stem for path in folder.glob("*-*.json")):
        yield read_manifest(folder, name)


def read_manifest(folder: Path, name: str) -> Manifest:
    value = files.read_json(folder / f"{name}.json")
    parts = [Part(folder / f"{name}.bin", value["dtype"], **part) for part in value["parts"]]
    return Manifest(Path(value["path"]), value["file"], value["lines"], value["is_last"],
                    value["too_short"], [tuple(bad) for bad in value["bad"]], parts)


def unfinished(work: Sequence[Shard | Stream], folder: Path) -> list[Shard | Stream]:
    """The shards that are not there yet, and the streams whose last one is not."""
    there = {path.stem for path in folder.glob("*-*.json")}
    shards_of_file = Counter(name.partition("-")[0] for name in there)

    def is_whole(unit: Shard | Stream) -> bool:
        if isinstance(unit, Shard):
            return unit.name in there
        last = reading.shard_name(unit.file, shards_of_file[f"{unit.file:06d}"] - 1)
        return last in there and read_manifest(folder, last).is_last

    return [unit for unit in work if not is_whole(unit)]


def require_whole(work: Sequence[Shard | Stream], folder: Path) -> None:
    """Waits until what other ranks wrote shows. Raises UserError where it does not."""
    patience = time.monotonic() + SECONDS_UNTIL_FILES_SHOW
    while lacking := unfinished(work, folder):
        if time.monotonic() > patience:
            raise UserError(f"{folder} lacks {len(lacking)} of {len(work)} shards that other ranks "
                            "wrote. Give an --output-prefix on a file system that all share.")
        time.sleep(1)


def expand(work: Sequence[Shard | Stream], folder: Path, shard_bytes: int) -> Iterator[Shard]:
    """Streams become shards, without those that are there."""
    for unit in work:
        for shard in reading.shards_of(unit, shard_bytes):
            if not (folder / f"{shard.name}.json").is_file():
                yield shard


_settings: Settings
_tokenizer: tokenizer.SentencePiece | tokenizer.HuggingFace


def start(settings: Settings) -> None:
    """Prepares a process for ``tokenize``."""
    global _settings, _tokenizer
    _settings = settings
    _tokenizer = tokenizer.load(settings.tokenizer_model, settings.eod_token, settings.append_eod)


@dataclass
class _Columns:
    """Of one domain and split."""

    tokens: list[np.ndarray] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)


def tokenize(shard: Shard) -> Counts:
    """Makes the two files of a shard."""
    parts: dict[tuple[str, str], _Columns] = {}
    bad: list[tuple[int, str]] = []
    too_short = 0
    batch: list[Document] = []

    def flush():
        nonlocal too_short
        encoded = _tokenizer.encode([document.text for document in batch])
        for document, tokens in zip(batch, encoded, strict=True):
            if len(tokens):
                tokens = np.concatenate([tokens, end])
            if len(tokens) < 2:
                too_short += 1
                continue
            split = splits.split_of(document.group, _settings.shares, _settings.seed)
            columns = parts.setdefault((document.domain, split), _Columns())
            columns.tokens.append(tokens.astype(dtype))
            columns.lines.append(document.line)
            columns.hashes.append(document_hash(tokens, _tokenizer.eod))
        batch.clear()

    dtype = tokenizer.token_dtype(_tokenizer.vocab_size)
    end = np.array([_tokenizer.eod] if _settings.append_eod else [], np.int32)
    for item in documents.checked(shard, _settings.fields, _settings.skip_bad_lines):
        if isinstance(item, BadLine):
            bad.append((item.line, item.reason))
            continue
        batch.append(item)
        if len(batch) == _TEXTS_AT_A_TIME:
            flush()
    if batch:
        flush()
    return _write(shard, parts, dtype, bad, too_short)


def document_hash(tokens: np.ndarray, eod: int | None) -> bytes:
    """Of a document's int32 tokens without those that end it, so that equal texts are found also
    where only one of them was given an end."""
    length = len(tokens)
    while length and tokens[length - 1] == eod:
        length -= 1
    return hashlib.blake2b(tokens[:length].tobytes(), digest_size=HASH.itemsize).digest()


def _write(shard: Shard, parts: dict[tuple[str, str], _Columns], dtype: type[np.integer],
           bad: list[tuple[int, str]], too_short: int) -> Counts:
    described = []
    with files.written_whole(_settings.folder / f"{shard.name}.bin") as file:
        for (domain, split), columns in sorted(parts.items()):
            lengths = np.array([len(tokens) for tokens in columns.tokens], np.int32)
            described.append({"domain": domain, "split": split, "documents": len(lengths),
                              "tokens": int(lengths.sum(dtype=np.int64)), "offset": file.tell()})
            for tokens in columns.tokens:
                file.write(tokens)
            file.write(lengths)
            file.write(np.array(columns.lines, np.uint32))
            file.write(b"".join(columns.hashes))
    files.write_json(_settings.folder / f"{shard.name}.json", {
        "path": str(shard.path), "file": shard.file, "lines": reading.num_lines(shard),
        "is_last": shard.is_last, "too_short": too_short, "bad": bad,
        "dtype": np.dtype(dtype).name, "parts": described})
    return Counts(shard.size, sum(part["documents"] for part in described),
                  sum(part["tokens"] for part in described))
