"""Parts of shards, one after the other, as one indexed dataset.

The bytes are those that Megatron's IndexedDatasetBuilder writes when it is given one shard after
the other through ``add_index``. They are written here all the same: the builder holds the lengths
of all documents as Python objects, more than a hundred bytes for each, which grows with the input.

    PREFIX.bin  the tokens
    PREFIX.idx  header; lengths [sequences] int32; byte offsets [sequences] int64; the number of the
                sequence at which each document begins, and their count [documents + 1] int64

Here a document is one sequence. With ``seq_length`` the documents are joined and cut into *windows*
of so many tokens, each a document of its own, and what is left at the end is left out. A window has
seq_length tokens, not one more, since Megatron's GPTDataset draws its training sequences seq_length
tokens apart: every one of them then begins where a window does, in whatever order and under
whatever mask, and takes its last label from the window that follows.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_direct.preprocessing import duplicates, shards
from megatron_direct.preprocessing.shards import Part
from megatron_direct.preprocessing.splits import uniform
from megatron_direct.runtime import files

_DTYPE_CODES = {"uint16": 8, "int32": 4}  # of Megatron's DType
_ENTRIES_AT_A_TIME = 1 << 20


@dataclass(frozen=True)
class Target:
    """A prefix that is to be written."""

    prefix: str
    domain: str
    split: str


@dataclass(frozen=True)
class Settings:
    folder: Path  # of the shards
    drop_duplicates: bool
    seq_length: int | None  # of windows; None: documents as they are
    corrupt_fraction: float  # of the candidates of a pool
    seed: int
    eod: int | None  # the token that ends each document, if one does
    card: dict  # entries that all cards share


_settings: Settings


def start(settings: Settings) -> None:
    """Prepares a process for ``merge``."""
    global _settings
    _settings = settings


def merge(target: Target) -> tuple[Target, dict]:
    """Writes a prefix and its card, and returns the card. Without any document nothing is written.

    The card comes first and the index last: a dataset with an index is whole.
    """
    card = {"domain": target.domain, "split": target.split, **_settings.card, "documents": 0,
            "tokens": 0, "corrupted": [], "samples": "document", "eod": _settings.eod,
            "duplicates": 0, "leaked": 0, "dropped": 0}
    if _settings.seq_length:
        card |= {"samples": "window", "seq_length": _settings.seq_length, "tokens_cut": 0}
    dtype = None
    with tempfile.TemporaryFile(dir=_settings.folder) as lengths_file:
        with files.written_whole(target.prefix + ".bin") as file:
            for tokens, lengths in _candidates(target, card):
                if target.split == "pool" and _settings.corrupt_fraction:
                    tokens = _corrupt(tokens, lengths, card)
                file.write(tokens)
                lengths_file.write(lengths)
                card["documents"] += len(lengths)
                card["tokens"] += len(tokens)
                dtype = tokens.dtype
            Path(target.prefix + ".idx").unlink(missing_ok=True)  # belongs to an older .bin
            if card["documents"]:
                files.write_json(target.prefix + ".json", card)
        if card["documents"]:
            _write_index(target.prefix + ".idx", lengths_file, card["documents"], dtype)
        else:
            for suffix in (".bin", ".json"):
                Path(target.prefix + suffix).unlink(missing_ok=True)
    return target, card


def _candidates(target: Target, card: dict) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(tokens, lengths) of what the prefix holds, a shard at a time."""
    rest = None
    for tokens, lengths in _documents(target, card):
        if _settings.seq_length:
            tokens = tokens if rest is None else np.concatenate([rest, tokens])
            count = len(tokens) // _settings.seq_length
            rest = tokens[count * _settings.seq_length:]
            tokens = tokens[: count * _settings.seq_length]
            lengths = np.full(count, _settings.seq_length, np.int32)
        if len(lengths):
            yield tokens, lengths
    if _settings.seq_length:
        card["tokens_cut"] = 0 if rest is None else len(rest)


def _documents(target: Target, card: dict) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(tokens, lengths) of the documents that are not dropped."""
    with open(_settings.folder / duplicates.FLAGS, "rb") as flags_file:
        for part, first in _parts(target):
            flags_file.seek(first)
            flags = np.frombuffer(flags_file.read(part.documents), np.uint8)
            card["duplicates"] += int(np.sum(flags == duplicates.COPY))
            card["leaked"] += int(np.sum(flags == duplicates.LEAK))
            tokens, lengths = part.read_tokens(), part.read_lengths()
            if _settings.drop_duplicates and flags.any():
                keep = flags == duplicates.UNIQUE
                card["dropped"] += int(np.sum(~keep))
                tokens, lengths = tokens[np.repeat(keep, lengths)], lengths[keep]
            yield tokens, lengths


def _parts(target: Target) -> Iterator[tuple[Part, int]]:
    """The target's parts in the order of the input, with the number of their first document."""
    number = 0
    for manifest in shards.manifests(_settings.folder):
        for part in manifest.parts:
            if (part.domain, part.split) == (target.domain, target.split):
                yield part, number
            number += part.documents


def _corrupt(tokens: np.ndarray, lengths: np.ndarray, card: dict) -> np.ndarray:
    """Some candidates with their tokens in a random order; their numbers go onto the card.

    A document keeps the token that ends it at its end.
    """
    tokens, ends = tokens.copy(), np.cumsum(lengths, dtype=np.int64)
    for number, (end, length) in enumerate(zip(ends, lengths, strict=True), card["documents"]):
        draw = f"{_settings.seed}\x1fcorrupt\x1f{card['domain']}\x1f{number}"
        if uniform(draw) >= _settings.corrupt_fraction:
            continue
        card["corrupted"].append(number)
        if card["samples"] == "document" and _settings.eod is not None:
            end, length = end - 1, length - 1
        order = np.random.default_rng([_settings.seed, number]).permutation(length)
        tokens[end - length: end] = tokens[end - length: end][order]
    return tokens


def _write_index(path: str, lengths_file: BinaryIO, documents: int, dtype: np.dtype) -> None:
    with files.written_whole(path) as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, _DTYPE_CODES[dtype.name],
                                                    documents, documents + 1))
        for lengths in _lengths(lengths_file):
            file.write(lengths)
        offset = 0
        for lengths in _lengths(lengths_file):
            ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize + offset
            file.write(np.concatenate([[offset], ends[:-1]]))
            offset = ends[-1]
        for start in range(0, documents + 1, _ENTRIES_AT_A_TIME):
            file.write(np.arange(start, min(start + _ENTRIES_AT_A_TIME, documents + 1),
                                 dtype=np.int64))


def _lengths(file: BinaryIO) -> Iterator[np.ndarray]:
    file.seek(0)
    while block := file.read(4 * _ENTRIES_AT_A_TIME):
        yield np.frombuffer(block, np.int32)
