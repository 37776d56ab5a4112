"""Megatron's readers of object stores, for the datasets of :mod:`megatron_direct.data`."""

from __future__ import annotations

import os
import uuid
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_direct.data import object_storage
from megatron_direct.errors import UserError

# Bytes that one request fetches. Megatron's 256 MiB suit a training that reads shuffled sequences
# out of few datasets; here documents are read in the order of their lengths out of any number.
_CHUNK = 1 << 20


_cache_path = ""  # of the command that runs


def read_object_stores(cache_path: str) -> None:
    """Lets prefixes of object stores be read, with copies of their indexes below ``cache_path``."""
    global _cache_path
    _cache_path = cache_path
    if cache_path:
        object_storage.connect(lambda prefix: _Stored(prefix, cache_path))


def dataset_options(prefixes: Sequence[str]) -> dict[str, Any]:
    """What a GPTDatasetConfig over these prefixes needs to know; Megatron maps no stored file."""
    if not any(map(object_storage.is_stored, prefixes)):
        return {}
    return {"object_storage_cache_path": _cache_path, "mmap_bin_files": False}


class _Stored:
    """A prefix, opened: its files as they were then."""

    def __init__(self, prefix: str, cache_path: str):
        from megatron.core.datasets.indexed_dataset import OBJECT_STORAGE_BIN_READERS
        from megatron.core.datasets.object_storage_utils import (
            ObjectStorageConfig,
            get_index_cache_path,
            get_object_storage_access,
        )

        config = ObjectStorageConfig(path_to_idx_cache=cache_path, bin_chunk_nbytes=_CHUNK)
        store = _STORES[get_object_storage_access(prefix)]()
        index, tokens = (store.found(prefix + suffix) for suffix in (".idx", ".bin"))
        self.index = get_index_cache_path(prefix + ".idx", config)
        self.size = tokens[0]
        self.stamps: tuple[tuple[int, int, int], ...] = (index, tokens)
        if not os.path.isfile(self.index) or os.path.getsize(self.index) != index[0] \
                or _noted(self.index) != index:
            _copy(store, prefix + ".idx", self.index, index)
        self._reader = OBJECT_STORAGE_BIN_READERS[store.name](prefix + ".bin", config)

    def read(self, dtype: Any, count: int, offset: int) -> np.ndarray:
        # Megatron's readers take dtypes as classes, and no request fetches nothing.
        kind = np.dtype(dtype).type
        return self._reader.read(kind, count, offset) if count else np.empty(0, kind)


class _S3:
    name = "s3"

    def __init__(self):
        try:
            import boto3
        except ModuleNotFoundError:
            raise UserError("s3:// prefixes are read with the package boto3. Install it: "
                            "pip install 'megatron-direct[s3]'.") from None
        self._client = boto3.client("s3")

    def found(self, path: str) -> tuple[int, int, int]:
        """(size, time, digest) of an object."""
        from botocore.exceptions import BotoCoreError, ClientError
        from megatron.core.datasets.object_storage_utils import parse_s3_path

        bucket, key = parse_s3_path(path)
        try:
            head = self._client.head_object(Bucket=bucket, Key=key)
        except (BotoCoreError, ClientError) as error:
            raise UserError(_unreadable(path, error)) from error
        return (int(head["ContentLength"]), int(head["LastModified"].timestamp()),
                zlib.crc32(head["ETag"].encode()))

    def download(self, path: str, place: str) -> None:
        from megatron.core.datasets.object_storage_utils import parse_s3_path

        self._client.download_file(*parse_s3_path(path), place)


class _MultiStorage:
    name = "msc"

    def __init__(self):
        from megatron.core.msc_utils import MultiStorageClientFeature

        try:
            self._package = MultiStorageClientFeature.import_package()
        except (ImportError, RuntimeError):  # the latter is Megatron's own
            raise UserError("msc:// prefixes are read with the package multi-storage-client. "
                            "Install it.") from None

    def found(self, path: str) -> tuple[int, int, int]:
        client, place = self._package.resolve_storage_client(path)
        try:
            info = client.info(place)
        except Exception as error:  # of whatever store is behind it
            raise UserError(_unreadable(path, error)) from error
        return (int(info.content_length), int(info.last_modified.timestamp()),
                zlib.crc32(str(info.etag).encode()))

    def download(self, path: str, place: str) -> None:
        self._package.download_file(path, place)


_STORES = {store.name: store for store in (_S3, _MultiStorage)}


def _unreadable(path: str, error: Exception) -> str:
    return (f"{path} cannot be read from its object store ({error}). Correct the path, or check "
            "the store's address and credentials.")


def _copy(store, path: str, place: str, found: tuple[int, int, int]) -> None:
    """Whole, or not at all: other ranks may be doing the same."""
    os.makedirs(os.path.dirname(place), exist_ok=True)
    partial = f"{place}.{uuid.uuid4().hex}.partial"
    try:
        store.download(path, partial)
        os.replace(partial, place)
        with open(partial, "w") as note:
            note.write(" ".join(map(str, found)))
        os.replace(partial, place + ".found")
    finally:
        if os.path.exists(partial):
            os.unlink(partial)


def _noted(place: str) -> tuple[int, ...] | None:
    """What the copy at a place is of."""
    if not os.path.isfile(place + ".found"):
        return None
    with open(place + ".found") as note:
        return tuple(int(number) for number in note.read().split())
