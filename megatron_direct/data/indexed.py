"""Megatron indexed datasets: opened with care, and known by a digest.

A dataset is a *prefix*: ``PREFIX.idx`` (a header, sequence lengths, byte offsets, and the sequence
number at which each document begins) and ``PREFIX.bin`` (the tokens).
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np

from megatron_direct import files
from megatron_direct.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document boundaries


def open_indexed(prefix: str):
    """Megatron's IndexedDataset, after both files were checked against each other."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    check_files(prefix)
    return IndexedDataset(prefix)


def check_files(prefix: str) -> None:
    """Raises UserError where a file is missing, truncated, or shorter than the other one says."""
    for suffix in (".idx", ".bin"):
        if not os.path.isfile(prefix + suffix):
            hint = " Give the path without its suffix." if prefix.endswith((".idx", ".bin")) else ""
            raise UserError(
                f"{prefix}{suffix} does not exist.{hint} Make the indexed dataset with "
                "tools/preprocess_selection.py, or correct the path.")
    remedy = "Copy or make the dataset again."
    size = os.path.getsize(prefix + ".idx")
    with open(prefix + ".idx", "rb") as file:
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            raise UserError(f"{prefix}.idx is no Megatron index, or is truncated. {remedy}")
        _, _, dtype_code, num_sequences, num_boundaries = _HEADER.unpack(header)
        expected = _HEADER.size + 12 * num_sequences + 8 * num_boundaries
        if size < expected:
            raise UserError(
                f"{prefix}.idx is truncated: its header promises {expected} bytes, it has {size}. "
                + remedy)
        lengths = np.fromfile(file, dtype=np.int32, count=num_sequences)
    from megatron.core.datasets.indexed_dataset import DType

    expected = int(lengths.sum(dtype=np.int64)) * DType.size(dtype_code)
    size = os.path.getsize(prefix + ".bin")
    if size < expected:
        raise UserError(
            f"{prefix}.bin is truncated: {prefix}.idx promises {expected} bytes, it has {size}. "
            + remedy)


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
