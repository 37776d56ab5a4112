"""Datasets in object stores: prefixes that begin with ``s3://`` or ``msc://``.

Megatron reads them: an index is copied into a local folder, tokens are fetched as they are needed.
What reads them is Megatron's own, so :mod:`megatron_direct.mcore.object_storage` brings it in here
once a command knows the folder.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from megatron_direct.errors import UserError

_SCHEMES = ("s3://", "msc://")


class StoredFiles(Protocol):
    """The two files of a prefix. index: path of a local copy of the .idx; size: bytes of the .bin;
    stamps: what changes when a file is written anew, for each of the two."""

    index: str
    size: int
    stamps: tuple[tuple[int, int, int], ...]

    def read(self, dtype: Any, count: int, offset: int) -> np.ndarray:
        """``count`` numbers of the .bin, from byte ``offset`` on."""


_open: Callable[[str], StoredFiles] | None = None
_opened: dict[str, StoredFiles] = {}


def is_stored(prefix: str) -> bool:
    return prefix.startswith(_SCHEMES)


def connect(open_files: Callable[[str], StoredFiles]) -> None:
    """How prefixes are opened from now on; what was opened before is looked at again."""
    global _open
    _open = open_files
    _opened.clear()


def stored_files(prefix: str) -> StoredFiles:
    """Raises UserError where no folder for indexes was given, and where a file is missing."""
    if _open is None:
        raise UserError(f"{prefix} is in an object store, but there is no folder for a copy of its "
                        "index. Give --object-storage-cache-path.")
    if prefix not in _opened:
        _opened[prefix] = _open(prefix)
    return _opened[prefix]
