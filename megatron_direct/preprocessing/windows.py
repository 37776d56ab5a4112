"""Windows: the documents of a dataset, joined and cut into training sequences.

A window has ``seq_length`` tokens, not one more, since Megatron's GPTDataset draws its training
sequences seq_length tokens apart: every one of them then begins where a window does, in whatever
order and under whatever mask, and takes its last label from the window that follows.

``PREFIX.documents.npy``, [documents] int32, keeps the lengths of the documents that the windows
were cut from, and the card the tokens that were left after the last window. With them a later run
finds these documents again, whatever their texts hold and wherever the last window ends.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_direct.errors import UserError
from megatron_direct.runtime import arrays, files

_BLOCK = 1 << 20


def lengths_path(prefix: str) -> Path:
    return Path(f"{prefix}.documents.npy")


def cut(tokens: np.ndarray, seq_length: int) -> tuple[np.ndarray, np.ndarray]:
    """(the tokens of whole windows, what is left of the last)"""
    whole = len(tokens) // seq_length * seq_length
    return tokens[:whole], tokens[whole:]


def write_lengths(prefix: str, lengths: np.ndarray) -> None:
    """lengths: [documents] int32, which may be a map of a file."""
    header = {"descr": "<i4", "fortran_order": False, "shape": (len(lengths),)}
    with files.written_whole(lengths_path(prefix)) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(lengths), _BLOCK):
            file.write(lengths[start: start + _BLOCK].astype("<i4", copy=False).data)


def read_lengths(prefix: str, card: dict) -> np.ndarray:
    """Raises UserError where there are none, or not those of this dataset."""
    path = lengths_path(prefix)
    remedy = ("Copy the file along with the dataset, or make the dataset again, or with --samples "
              "document.")
    if not path.is_file():
        raise UserError(f"{prefix} of --exclude holds windows, whose documents cannot be found "
                        f"without {path}, which does not exist. {remedy}")
    lengths = arrays.read_npy(path, remedy, mapped=True)
    if lengths.dtype != np.dtype("<i4") or lengths.ndim != 1:
        raise UserError(f"{path} is damaged: it holds no lengths of documents. {remedy}")
    total = int(lengths.sum(dtype=np.int64))
    expected = card.get("tokens", 0) + card.get("tokens_cut", 0)
    if total != expected or (len(lengths) and lengths.min() < 0):
        raise UserError(f"{path} belongs to another dataset: its documents have {total} tokens, "
                        f"but {prefix} was made from {expected}. {remedy}")
    return lengths


def documents(prefix: str, dtype: np.dtype, lengths: np.ndarray, card: dict
              ) -> Iterator[np.ndarray]:
    """int32 tokens of the documents that begin within the windows.

    The last of them may go on after the last window. Of a dataset whose card does not have those
    tokens it is left out, unless it lost no more than its end.
    """
    size = os.path.getsize(f"{prefix}.bin")
    stream = np.memmap(f"{prefix}.bin", dtype, "r") if size else np.empty(0, dtype)
    rest = np.array(card.get("rest", []), np.int32)
    may_lack = 0 if "rest" in card else int(card.get("eod") is not None)
    end = 0
    for start in range(0, len(lengths), _BLOCK):
        for length in lengths[start: start + _BLOCK].tolist():
            begin, end = end, end + length
            beyond = max(0, end - len(stream))
            if begin >= len(stream) or beyond > len(rest) + may_lack:
                return
            yield np.concatenate([np.array(stream[begin:end], np.int32), rest[:beyond]])
