"""A mask says which documents of one indexed dataset are kept."""

from __future__ import annotations

import io
import os
import zipfile
from dataclasses import dataclass

import numpy as np

from megatron_direct import files
from megatron_direct.data.indexed import dataset_digest
from megatron_direct.errors import UserError

_FORMAT = 1


@dataclass(frozen=True, eq=False)
class SampleMask:
    """keep: [documents] bool; dataset_digest: of the dataset it belongs to, and of no other."""

    keep: np.ndarray
    dataset_digest: str

    def __post_init__(self):
        object.__setattr__(self, "keep", np.asarray(self.keep, dtype=bool))
        if self.keep.ndim != 1:
            raise ValueError(f"keep has shape {self.keep.shape}; expected one entry a document.")

    @property
    def digest(self) -> str:
        """Of what it keeps and whose it is: two masks with one digest are the same mask."""
        bits = np.packbits(self.keep).tobytes()
        return files.digest(self.dataset_digest, str(len(self.keep)), bits)

    @property
    def num_kept(self) -> int:
        return int(self.keep.sum())

    def save(self, path: str | os.PathLike) -> None:
        """One bit a document; whole, or not at all."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, format=_FORMAT, num_documents=len(self.keep),
                            keep=np.packbits(self.keep), dataset_digest=self.dataset_digest)
        with files.written_whole(path) as file:
            file.write(buffer.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike) -> SampleMask:
        try:
            with np.load(path, allow_pickle=False) as data:
                count = int(data["num_documents"])
                keep = np.unpackbits(data["keep"], count=count).astype(bool)
                return cls(keep, str(data["dataset_digest"]))
        except FileNotFoundError:
            raise UserError(f"{path} does not exist. Run select first, or correct the path."
                            ) from None
        except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is no sample mask, or is damaged ({error}). Run select again."
                            ) from error

    def require_belongs_to(self, prefix: str) -> None:
        """Raises UserError on any dataset but its own."""
        found = dataset_digest(prefix)
        if found != self.dataset_digest:
            raise UserError(
                f"the mask was made for a dataset with digest {self.dataset_digest}, but {prefix} "
                f"has {found}: the dataset is another one, or was made again. Run select on it.")
