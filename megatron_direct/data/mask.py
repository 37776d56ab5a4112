"""A mask says which documents of one indexed dataset are kept, and how often each is seen.

One bit per document, in memory as on disk (``PREFIX.mask.npz``): bit ``i % 8``, counted from the
most significant, of byte ``i // 8`` stands for document i, as in ``numpy.packbits``. Bits after the
last document are zero. Where a document is to be seen more than once per epoch there is beside the
bits a byte per document, its count; where none is, there are only the bits.
"""

from __future__ import annotations

import os
from functools import cached_property
from typing import Any

import numpy as np

from megatron_direct.data.indexed import dataset_digest
from megatron_direct.errors import UserError
from megatron_direct.runtime import arrays, digests, files

_FORMAT = 1
_FORMAT_OF_COUNTS = 2  # the same, with counts: older versions refuse it
MOST_COUNTS = 255  # of one document
_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.uint8)


class SampleMask:
    """keep: [documents] bool, or integers: how often each is seen per epoch. dataset_digest: of
    the dataset it belongs to, and of no other.

    run: where the mask came from, for its reader; "" if that is not known.
    """

    _counts: np.ndarray | None = None  # [documents] uint8, where one is above 1

    def __init__(self, keep: np.ndarray, dataset_digest: str, run: str = ""):
        keep = np.asarray(keep)
        if not np.issubdtype(keep.dtype, np.integer):
            keep = keep.astype(bool)
        if keep.ndim != 1:
            raise ValueError(f"keep has shape {keep.shape}; expected one entry per document.")
        if keep.size and not 0 <= keep.min() <= keep.max() <= MOST_COUNTS:
            raise ValueError(f"keep has counts from {keep.min()} to {keep.max()}; expected 0 to "
                             f"{MOST_COUNTS}.")
        self._fill(np.packbits(keep != 0), len(keep), dataset_digest, run)
        if keep.size and keep.max() > 1:
            self._counts = keep.astype(np.uint8)

    def _fill(self, bits: np.ndarray, num_documents: int, dataset_digest: str, run: str) -> None:
        self._bits = bits
        self.num_documents = num_documents
        self.dataset_digest = dataset_digest
        self.run = run

    @classmethod
    def _of_bits(cls, bits, num_documents, dataset_digest, run) -> SampleMask:
        mask = cls.__new__(cls)
        mask._fill(bits, num_documents, dataset_digest, run)
        return mask

    def __repr__(self) -> str:
        times = "" if self._counts is None else f", {self.num_seen} times in all"
        return (f"SampleMask({self.num_kept} of {self.num_documents}{times}, "
                f"{self.dataset_digest!r})")

    @property
    def keep(self) -> np.ndarray:
        """[documents] bool, unpacked at each call: one byte per document."""
        return np.unpackbits(self._bits, count=self.num_documents).view(bool)

    @property
    def counts(self) -> np.ndarray:
        """[documents] uint8, how often each is seen per epoch."""
        return self.keep.view(np.uint8) if self._counts is None else self._counts.copy()

    @property
    def max_count(self) -> int:
        """The greatest count: 1 for a mask of yes and no."""
        return 1 if self._counts is None else int(self._counts.max())

    @cached_property
    def num_seen(self) -> int:
        """K, the sum of all counts."""
        return self.num_kept if self._counts is None else int(self._counts.sum(dtype=np.int64))

    @cached_property
    def num_kept(self) -> int:
        """Documents that are kept, each counted once."""
        return int(_ONES[self._bits].sum(dtype=np.int64))

    @cached_property
    def digest(self) -> str:
        """Of what it keeps and whose it is: two masks with one digest are the same mask."""
        counts = [] if self._counts is None else [self._counts.tobytes()]
        return digests.digest(self.dataset_digest, str(self.num_documents), self._bits.tobytes(),
                              *counts)

    def with_run(self, run: str) -> SampleMask:
        """The same mask with the name of the run it came from."""
        mask = self._of_bits(self._bits, self.num_documents, self.dataset_digest, run)
        mask._counts = self._counts
        return mask

    def __and__(self, other: SampleMask) -> SampleMask:
        """Documents that both keep, as often as the one that sees them less often."""
        self._require_same(other)
        if self._is_plain(other):
            return self._combined(other, self._bits & other._bits, "and")
        return self._counted(other, np.minimum(self.counts, other.counts), "and")

    def __or__(self, other: SampleMask) -> SampleMask:
        """Documents that either keeps, as often as the one that sees them more often."""
        self._require_same(other)
        if self._is_plain(other):
            return self._combined(other, self._bits | other._bits, "or")
        return self._counted(other, np.maximum(self.counts, other.counts), "or")

    def __sub__(self, other: SampleMask) -> SampleMask:
        """Documents that this mask keeps and the other does not."""
        self._require_same(other)
        if self._is_plain(other):
            return self._combined(other, self._bits & ~other._bits, "minus")
        return self._counted(other, np.where(other.keep, 0, self.counts), "minus")

    def _is_plain(self, other: SampleMask) -> bool:
        return self._counts is None and other._counts is None

    def _require_same(self, other: SampleMask) -> None:
        if (other.dataset_digest, other.num_documents) != (self.dataset_digest,
                                                           self.num_documents):
            raise UserError(
                f"the masks belong to different datasets (digests {self.dataset_digest} and "
                f"{other.dataset_digest}): and, or and minus are for masks of one dataset.")

    def _combined(self, other: SampleMask, bits: np.ndarray, word: str) -> SampleMask:
        return self._of_bits(bits, self.num_documents, self.dataset_digest,
                             self._run_of_both(other, word))

    def _counted(self, other: SampleMask, counts: np.ndarray, word: str) -> SampleMask:
        return SampleMask(counts, self.dataset_digest, self._run_of_both(other, word))

    def _run_of_both(self, other: SampleMask, word: str) -> str:
        return f"({self.run or '?'} {word} {other.run or '?'})"

    def save(self, path: str | os.PathLike) -> None:
        """Whole, or not at all."""
        # Bits of which half are set at random do not compress: deflate would only make them longer.
        is_even = 0.4 < self.num_kept / max(self.num_documents, 1) < 0.6
        version = _FORMAT
        counts: dict[str, Any] = {}
        if self._counts is not None:
            is_even, version, counts = False, _FORMAT_OF_COUNTS, {"counts": self._counts}
        with files.written_whole(path) as file:
            (np.savez if is_even else np.savez_compressed)(
                file, format=version, num_documents=self.num_documents, num_kept=self.num_kept,
                keep=self._bits, dataset_digest=self.dataset_digest, run=self.run, **counts)

    @classmethod
    def load(cls, path: str | os.PathLike) -> SampleMask:
        """Raises UserError for a file that is missing, damaged, or no mask."""
        if not os.path.exists(path):
            raise UserError(f"{path} does not exist. Run select first, or correct the path.")
        data = arrays.read_npz(path, "Run select again.")
        try:
            version = int(arrays.of_kind(data, "format", "iu", 0))
            if version not in (_FORMAT, _FORMAT_OF_COUNTS):
                raise ValueError(f"format {version}, where {_FORMAT} or {_FORMAT_OF_COUNTS} was "
                                 "expected")
            count = int(arrays.of_kind(data, "num_documents", "iu", 0))
            bits = arrays.of_kind(data, "keep", "u", 1)
            if bits.dtype != np.uint8:
                raise ValueError(f"its bits are of type {bits.dtype}")
            mask = cls._of_bits(bits, count, str(arrays.of_kind(data, "dataset_digest", "U", 0)),
                                str(arrays.of_kind(data, "run", "U", 0)) if "run" in data else "")
            expected = int(arrays.of_kind(data, "num_kept", "iu", 0)) if "num_kept" in data \
                else mask.num_kept
            if version == _FORMAT_OF_COUNTS:
                mask._counts = arrays.of_kind(data, "counts", "u", 1).astype(np.uint8)
        except ValueError as error:
            raise UserError(f"{path} is not a sample mask, or is damaged ({error}). Run select "
                            "again.") from error
        if len(bits) != -(-count // 8) or mask.num_kept != expected or \
                (count % 8 and bits[-1] & (0xff >> count % 8)):
            raise UserError(f"{path} is damaged: it keeps {mask.num_kept} documents in "
                            f"{len(bits)} bytes, where {expected} of {count} were written. "
                            "Run select again.")
        if mask._counts is not None and not np.array_equal(mask._counts > 0, mask.keep):
            raise UserError(f"{path} is damaged: its counts are not of the documents it keeps. "
                            "Run select again.")
        return mask

    def require_belongs_to(self, prefix: str) -> None:
        """Raises UserError on any dataset but its own."""
        found = dataset_digest(prefix)
        if found != self.dataset_digest:
            raise UserError(
                f"the mask was made for a dataset with digest {self.dataset_digest}, but {prefix} "
                f"has {found}: it is a different dataset, or was rebuilt. Run select on it.")
