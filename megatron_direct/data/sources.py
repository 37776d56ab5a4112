"""Which documents are of one source: ``PREFIX.sources.npy`` beside a dataset.

An integer for each document, none below 0, in the order of the dataset. Documents with the same
number, in whichever datasets, are of one source: a book, a repository, a web site. Preprocessing
writes it with ``--group-key``; for a dataset made elsewhere ``numpy.save`` does.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from megatron_direct.errors import UserError
from megatron_direct.runtime import arrays, files

SUFFIX = ".sources.npy"
UNKNOWN = -1


def source_number(name: str) -> int:
    """63 bits of its hash: what one run calls by a name is what another does."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1


def write_sources(prefix: str, numbers: np.ndarray) -> None:
    """numbers: [documents] int64."""
    with files.written_whole(prefix + SUFFIX) as file:
        np.save(file, numbers)


def read_sources(prefix: str, num_documents: int) -> np.ndarray | None:
    """[documents] int64, or None where the file is not there.

    Raises UserError for one that is damaged, or belongs to a dataset of other documents.
    """
    path = Path(prefix + SUFFIX)
    if not path.is_file():
        return None
    remedy = f"Write it again, or delete it: without {path} sources are not known."
    numbers = arrays.read_npy(path, f"It cannot be read as a NumPy array. {remedy}")
    if numbers.dtype.kind not in "iu" or numbers.ndim != 1:
        raise UserError(f"{path} is not a vector of integers. {remedy}")
    if len(numbers) != num_documents:
        raise UserError(f"{path} has the sources of {len(numbers)} documents, and {prefix} has "
                        f"{num_documents}. {remedy}")
    if len(numbers) and not 0 <= numbers.min() <= numbers.max() < 1 << 63:
        raise UserError(f"{path} has a number below 0, or of more than 63 bits. {remedy}")
    return numbers.astype(np.int64)
