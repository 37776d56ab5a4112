"""Megatron indexed datasets: opened with care, and known by a digest.

A dataset is a *prefix*: ``PREFIX.idx`` (a header, sequence lengths, byte offsets, and the sequence
number at which each document begins) and ``PREFIX.bin`` (the tokens).
"""

from __future__ import annotations

import functools
import json
import os
import struct
from pathlib import Path

import numpy as np

from megatron_direct import files
from megatron_direct.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_REMEDY = "Copy or make the dataset again."
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document boundaries


def open_indexed(prefix: str):
    """Megatron's IndexedDataset, after both files were checked against each other."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    check_files(prefix)
    return IndexedDataset(prefix)


def check_files(prefix: str) -> None:
    """Raises UserError where a file is missing, truncated, or shorter than the other one says."""
    _require_files(prefix)
    _check_sizes(prefix, *_stamps(prefix))


@functools.cache
def _check_sizes(prefix: str, *_stamps: tuple[int, int, int]) -> None:
    """Reads all lengths, but once for files of the same size, time and place on the disk."""
    from megatron.core.datasets.indexed_dataset import DType

    dtype_code, num_sequences, num_boundaries = _read_header(prefix)
    size = os.path.getsize(prefix + ".idx")
    expected = _HEADER.size + 12 * num_sequences + 8 * num_boundaries
    if size < expected:
        raise UserError(f"{prefix}.idx is truncated: its header promises {expected} bytes, it has "
                        f"{size}. {_REMEDY}")
    lengths = np.fromfile(prefix + ".idx", dtype=np.int32, count=num_sequences,
                          offset=_HEADER.size)
    expected = int(lengths.sum(dtype=np.int64)) * DType.size(dtype_code)
    size = os.path.getsize(prefix + ".bin")
    if size < expected:
        raise UserError(f"{prefix}.bin is truncated: {prefix}.idx promises {expected} bytes, it "
                        f"has {size}. {_REMEDY}")


def _read_header(prefix: str) -> tuple[int, int, int]:
    """(dtype code, number of sequences, number of document boundaries)"""
    with open(prefix + ".idx", "rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise UserError(f"{prefix}.idx is no Megatron index, or is truncated. {_REMEDY}")
    _, _, *counts = _HEADER.unpack(header)
    return tuple(counts)


def _stamps(prefix: str) -> list[tuple[int, int, int]]:
    """What tells a file that was written anew: size, time and place of .idx and .bin."""
    return [(status.st_size, status.st_mtime_ns, status.st_ino)
            for status in (os.stat(prefix + ".idx"), os.stat(prefix + ".bin"))]


def _require_files(prefix: str) -> None:
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
    from megatron.core.datasets.indexed_dataset import DType

    dtype = DType.dtype_from_code(_read_header(prefix)[0])
    largest = max(int(np.frombuffer(part, dtype, len(part) // DType.size(dtype)).max(initial=0))
                  for part in files.both_ends(prefix + ".bin"))
    if largest >= vocab_size:
        raise UserError(
            f"{prefix}.bin holds token {largest}, but the tokenizer has {vocab_size} entries: the "
            "dataset was made with another one. Train with its tokenizer, or make it again.")


def write_index(path: str, dtype, sequence_lengths: np.ndarray,
                document_indices: np.ndarray) -> None:
    """``PREFIX.idx`` of tokens that lie one after the other in ``PREFIX.bin``.

    sequence_lengths: [sequences]; document_indices: [documents + 1] the sequence at which each
    document begins, and at the end the number of sequences. Megatron's own writer keeps a Python
    list of all offsets, which takes minutes and gigabytes at the size of a pre-training set.
    """
    from megatron.core.datasets.indexed_dataset import DType

    sizes = np.asarray(sequence_lengths, dtype=np.int64) * DType.size(dtype)
    with files.written_whole(path) as file:
        file.write(_HEADER.pack(_MAGIC, _VERSION, DType.code_from_dtype(dtype), len(sizes),
                                len(document_indices)))
        file.write(np.asarray(sequence_lengths, dtype=np.int32).data)
        file.write((np.cumsum(sizes) - sizes).data)
        file.write(np.asarray(document_indices, dtype=np.int64).data)


def num_documents(dataset) -> int:
    return len(dataset.document_indices) - 1


def document_lengths(dataset) -> np.ndarray:
    """[documents] tokens of each document. The index counts sequences; a document may have more."""
    ends = np.concatenate([[0], np.cumsum(dataset.sequence_lengths, dtype=np.int64)])
    return np.diff(ends[dataset.document_indices])


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
    return _digest_of_files(prefix, *_stamps(prefix))


@functools.cache
def _digest_of_files(prefix: str, *_stamps: tuple[int, int, int]) -> str:
    index = files.file_digest(prefix + ".idx")
    size = os.path.getsize(prefix + ".bin")
    return files.digest(index, str(size), *files.both_ends(prefix + ".bin"))


def read_card(prefix: str) -> dict:
    """What tools/preprocess_selection.py wrote beside a dataset; {} for a dataset made elsewhere.

    Keys: domain, split, tokenizer_digest, vocab_size, documents, tokens, corrupted (document
    numbers whose tokens were shuffled on purpose).
    """
    path = Path(prefix + ".json")
    return json.loads(path.read_text()) if path.is_file() else {}


def prefix_names(prefixes: list[str]) -> dict[str, str]:
    """A short name for each prefix, unique among them: its last path component, or its path."""
    names = {prefix: os.path.basename(prefix) for prefix in prefixes}
    if len(set(names.values())) < len(names):
        names = {prefix: prefix.strip("/").replace("/", "__") for prefix in prefixes}
    return names
