"""Digests of values and of files, by which later stages know what they are given."""

from __future__ import annotations

import hashlib
import json
import os


def digest(*parts: bytes | str) -> str:
    total = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "little"))
        total.update(data)
    return total.hexdigest()


def canonical(value) -> str:
    """A plain value as text, the same whatever order its keys are in."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def file_digest(path: str | os.PathLike) -> str:
    total = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 22), b""):
            total.update(block)
    return total.hexdigest()


def both_ends(path: str | os.PathLike, count: int = 1 << 20) -> tuple[bytes, bytes]:
    """The first and the last ``count`` bytes of a file."""
    with open(path, "rb") as file:
        head = file.read(count)
        file.seek(max(0, os.path.getsize(path) - count))
        return head, file.read(count)
