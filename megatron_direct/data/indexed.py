"""Megatron indexed datasets: opened with care, and known by a digest.

A dataset is a *prefix*: ``PREFIX.idx`` (a header, sequence lengths, byte offsets, and the sequence
number at which each document begins) and ``PREFIX.bin`` (the tokens).
"""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_direct.data import object_storage
from megatron_direct.errors import UserError
from megatron_direct.runtime import digests, files

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_REMEDY = "Copy or make the dataset again."
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document boundaries
# Megatron's codes. Those of floating-point numbers, 6 and 7, hold no tokens.
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_BLOCK = 1 << 20  # entries of an index that are checked or written at once

# (size, time, place on the disk) of .idx and of .bin
Stamps = tuple[tuple[int, int, int], ...]


class IndexedTokens:
    """A dataset opened for reading; its files are mapped, not read.

    sequence_lengths: [sequences] int32; sequence_pointers: [sequences] int64 byte offsets in the
    .bin; document_indices: [documents + 1] int64, the sequence at which each document begins.
    """

    def __init__(self, prefix: str):
        code, num_sequences, num_boundaries = _read_header(prefix)
        self.prefix = prefix
        self.dtype = np.dtype(_DTYPES[code])
        index = np.memmap(_index_path(prefix), np.uint8, "r", offset=_HEADER.size)
        ends = np.cumsum([4 * num_sequences, 8 * num_sequences, 8 * num_boundaries])
        self.sequence_lengths, self.sequence_pointers, self.document_indices = (
            index[begin:end].view(dtype) for begin, end, dtype in zip(
                (0, *ends[:-1]), ends, (np.int32, np.int64, np.int64), strict=True))
        self._tokens: np.ndarray | None = None  # of an object store they are fetched when needed
        if not object_storage.is_stored(prefix):
            self._tokens = np.memmap(prefix + ".bin", self.dtype, "r") \
                if os.path.getsize(prefix + ".bin") else np.empty(0, self.dtype)

    def __len__(self) -> int:
        """Sequences."""
        return len(self.sequence_lengths)

    def get(self, sequence: int) -> np.ndarray:
        """The tokens of a sequence, as a view of the file; of an object store, as Megatron reads
        them."""
        offset, count = int(self.sequence_pointers[sequence]), int(self.sequence_lengths[sequence])
        if self._tokens is None:
            return object_storage.stored_files(self.prefix).read(self.dtype, count, offset)
        first = offset // self.dtype.itemsize
        return self._tokens[first: first + count]


def open_indexed(prefix: str) -> IndexedTokens:
    """The dataset, after both files were checked against each other."""
    check_files(prefix)
    return IndexedTokens(prefix)


@dataclass(frozen=True)
class Examined:
    """A dataset whose files agree: what its files were then, and its digest."""

    prefix: str
    stamps: Stamps
    digest: str


# What this process knows of files by their size, time and place on the disk: that they agree, and
# their digest. Both cost a pass over the whole index.
_SOUND: set[tuple[str, Stamps]] = set()
_DIGESTS: dict[tuple[str, Stamps], str] = {}


def examine(prefix: str) -> Examined:
    """Raises UserError where a file is missing, or the two do not agree to the byte."""
    digest = dataset_digest(prefix)
    return Examined(prefix, _stamps(prefix), digest)


def trust(examined: Examined) -> None:
    """Spares this process what another one found out, as long as it sees the same files."""
    _SOUND.add((examined.prefix, examined.stamps))
    _DIGESTS[examined.prefix, examined.stamps] = examined.digest


def check_files(prefix: str) -> None:
    """Raises UserError where a file is missing, or the two do not agree to the byte."""
    _require_files(prefix)
    stamps = _stamps(prefix)
    if (prefix, stamps) not in _SOUND:
        _check_agreement(prefix)
        _SOUND.add((prefix, stamps))


def _check_agreement(prefix: str) -> None:
    """Reads the whole index."""
    code, num_sequences, num_boundaries = _read_header(prefix)
    size = os.path.getsize(_index_path(prefix))
    expected = _HEADER.size + 12 * num_sequences + 8 * num_boundaries
    if size != expected:
        raise UserError(f"{prefix}.idx {'is truncated' if size < expected else 'is damaged'}: its "
                        f"header promises {expected} bytes, it has {size}. {_REMEDY}")
    size, item = _token_bytes(prefix), np.dtype(_DTYPES[code]).itemsize
    if size % item:
        raise UserError(f"{prefix}.bin is damaged: its {size} bytes are not a whole number of "
                        f"{item}-byte tokens. {_REMEDY}")
    dataset = IndexedTokens(prefix)
    total = _check_sequences(dataset)
    _check_documents(dataset)
    if size != total:
        raise UserError(f"{prefix}.bin {'is truncated' if size < total else 'is damaged'}: "
                        f"{prefix}.idx promises {total} bytes, it has {size}. {_REMEDY}")


def _check_sequences(dataset: IndexedTokens) -> int:
    """Bytes of all sequences, which have to lie one after the other."""
    total = 0
    for start in range(0, len(dataset), _BLOCK):
        block = slice(start, start + _BLOCK)
        lengths = dataset.sequence_lengths[block].astype(np.int64)
        ends = total + np.cumsum(lengths * dataset.dtype.itemsize)
        wrong = (lengths < 0) | (dataset.sequence_pointers[block] !=
                                 ends - lengths * dataset.dtype.itemsize)
        if wrong.any():
            sequence = start + int(np.argmax(wrong))
            raise UserError(
                f"{dataset.prefix}.idx is damaged: sequence {sequence} has length "
                f"{dataset.sequence_lengths[sequence]} and begins at byte "
                f"{dataset.sequence_pointers[sequence]}, which is not where the sequence before it "
                f"ends. {_REMEDY}")
        total = int(ends[-1])
    return total


def _check_documents(dataset: IndexedTokens) -> None:
    boundaries = dataset.document_indices
    if len(boundaries) == 0 or boundaries[0] != 0 or boundaries[-1] != len(dataset) or any(
            (np.diff(boundaries[start: start + _BLOCK + 1]) < 0).any()
            for start in range(0, len(boundaries), _BLOCK)):
        raise UserError(f"{dataset.prefix}.idx is damaged: the boundaries of its documents do not "
                        f"rise from 0 to its {len(dataset)} sequences. {_REMEDY}")


def _read_header(prefix: str) -> tuple[int, int, int]:
    """(dtype code, number of sequences, number of document boundaries)"""
    with open(_index_path(prefix), "rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise UserError(f"{prefix}.idx is not a Megatron index, or is truncated. {_REMEDY}")
    _, version, code, num_sequences, num_boundaries = _HEADER.unpack(header)
    if version != _VERSION or code not in _DTYPES:
        raise UserError(f"{prefix}.idx is damaged, or does not hold tokens: it has version "
                        f"{version} and number type {code}. {_REMEDY}")
    return code, num_sequences, num_boundaries


def _stamps(prefix: str) -> Stamps:
    """What changes when a file is rewritten: size, time and place of .idx and .bin."""
    if object_storage.is_stored(prefix):
        return object_storage.stored_files(prefix).stamps
    return tuple((status.st_size, status.st_mtime_ns, status.st_ino)
                 for status in (os.stat(prefix + ".idx"), os.stat(prefix + ".bin")))


def _index_path(prefix: str) -> str:
    return object_storage.stored_files(prefix).index if object_storage.is_stored(prefix) \
        else prefix + ".idx"


def _token_bytes(prefix: str) -> int:
    return object_storage.stored_files(prefix).size if object_storage.is_stored(prefix) \
        else os.path.getsize(prefix + ".bin")


def _both_ends(prefix: str) -> tuple[bytes, bytes]:
    """Of the tokens, a MiB each."""
    if not object_storage.is_stored(prefix):
        return digests.both_ends(prefix + ".bin")
    stored = object_storage.stored_files(prefix)
    count = min(stored.size, 1 << 20)
    head, tail = (stored.read(np.uint8, count, offset).tobytes()
                  for offset in (0, stored.size - count))
    return head, tail


def _require_files(prefix: str) -> None:
    if object_storage.is_stored(prefix):
        object_storage.stored_files(prefix)
        return
    for suffix in (".idx", ".bin"):
        if not os.path.isfile(prefix + suffix):
            hint = " Give the path without its suffix." if prefix.endswith((".idx", ".bin")) else ""
            raise UserError(
                f"{prefix}{suffix} does not exist.{hint} Make the indexed dataset with "
                "tools/preprocess_selection.py, or correct the path.")


def require_tokens_below(prefix: str, vocab_size: int) -> None:
    """Raises UserError if the first or the last MiB of tokens holds one outside the vocabulary.

    A cheap check for datasets without a card; what it lets pass may still hold one.
    """
    dtype = np.dtype(_DTYPES[_read_header(prefix)[0]])
    for part in _both_ends(prefix):
        tokens = np.frombuffer(part, dtype, len(part) // dtype.itemsize)
        for token in (tokens.max(initial=0), tokens.min(initial=0)):
            if not 0 <= token < vocab_size:
                raise UserError(
                    f"{prefix}.bin holds token {token}, but the tokenizer has {vocab_size} "
                    "entries: the dataset was made with another tokenizer. Train with that one, or "
                    "rebuild the dataset.")


def write_index(path: str, dtype, sequence_lengths: np.ndarray,
                document_indices: np.ndarray | None = None) -> None:
    """``PREFIX.idx`` of tokens that lie one after the other in ``PREFIX.bin``.

    sequence_lengths: [sequences], which may be a map of a file; document_indices: [documents + 1]
    the sequence at which each document begins, and at the end the number of sequences; None where
    each sequence is a document. Written in blocks: Megatron's own writer keeps a Python list of all
    offsets, which takes minutes and gigabytes at the size of a pre-training set.
    """
    code = next(code for code, kind in _DTYPES.items() if np.dtype(kind) == np.dtype(dtype))
    num_sequences = len(sequence_lengths)
    num_boundaries = num_sequences + 1 if document_indices is None else len(document_indices)
    with files.written_whole(path) as file:
        file.write(_HEADER.pack(_MAGIC, _VERSION, code, num_sequences, num_boundaries))
        for block in _blocks(num_sequences):
            file.write(np.asarray(sequence_lengths[block], np.int32).data)
        offset = 0
        for block in _blocks(num_sequences):
            ends = offset + np.cumsum(sequence_lengths[block], dtype=np.int64) \
                * np.dtype(dtype).itemsize
            file.write(np.concatenate([[offset], ends[:-1]]).data)
            offset = int(ends[-1])
        for block in _blocks(num_boundaries):
            file.write((np.arange(block.start, block.stop, dtype=np.int64)
                        if document_indices is None
                        else np.asarray(document_indices[block], np.int64)).data)


def _blocks(count: int) -> Iterator[slice]:
    for start in range(0, count, _BLOCK):
        yield slice(start, min(start + _BLOCK, count))


def num_documents(dataset) -> int:
    return len(dataset.document_indices) - 1


def document_lengths(dataset) -> np.ndarray:
    """[documents] tokens of each document. The index counts sequences; a document may have more."""
    if _has_one_sequence_each(dataset):
        return dataset.sequence_lengths.astype(np.int64)
    ends = np.concatenate([[0], np.cumsum(dataset.sequence_lengths, dtype=np.int64)])
    return np.diff(ends[dataset.document_indices])


def _has_one_sequence_each(dataset) -> bool:
    boundaries = dataset.document_indices
    return len(boundaries) == len(dataset.sequence_lengths) + 1 and all(
        (np.diff(boundaries[start: start + _BLOCK + 1]) == 1).all()
        for start in range(0, len(boundaries), _BLOCK))


def document_tokens(dataset, document: int, limit: int | None = None) -> np.ndarray:
    """The first ``limit`` tokens of a document (all, if None)."""
    first, last = dataset.document_indices[document: document + 2]
    parts, count = [], 0
    for sequence in range(first, last):
        if limit is not None and count >= limit:
            break
        parts.append(dataset.get(sequence))
        count += len(parts[-1])
    tokens = np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)
    return tokens[:limit]


def dataset_digest(prefix: str) -> str:
    """A digest of the index, and of the length and both ends of the tokens.

    It does not read all tokens, which would take hours on a pre-training set; two datasets with
    equal document lengths and equal first and last MiB of tokens are taken for the same.
    """
    check_files(prefix)
    stamps = _stamps(prefix)
    if (prefix, stamps) not in _DIGESTS:
        _DIGESTS[prefix, stamps] = _digest_of_files(prefix)
    return _DIGESTS[prefix, stamps]


def _digest_of_files(prefix: str) -> str:
    index = digests.file_digest(_index_path(prefix))
    return digests.digest(index, str(_token_bytes(prefix)), *_both_ends(prefix))


def prefix_names(prefixes: list[str]) -> dict[str, str]:
    """A short name for each prefix, unique among them: its last path component, or its path.

    Of paths that would read alike, and of those too long for the name of a file, the end is
    replaced by a digest.
    """
    names = {prefix: os.path.basename(prefix) for prefix in prefixes}
    if len(set(names.values())) < len(names):
        names = {prefix: prefix.strip("/").replace("/", "__") for prefix in prefixes}
    counts = Counter(names.values())
    return {prefix: name if counts[name] == 1 and len(name.encode()) <= files.LONGEST_NAME
            else files.shortened(name, prefix) for prefix, name in names.items()}
