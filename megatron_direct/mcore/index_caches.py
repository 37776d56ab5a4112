"""Megatron's index caches, looked at before Megatron opens them.

Megatron keeps the order of the data as numpy files and reads them with ``allow_pickle=True``, so
that a file with a pickle in its place would be run. Whoever can write into the cache folder could
then act as the one who trains. What Megatron writes holds plain numbers, and nothing else is let
through.
"""

from __future__ import annotations

from pathlib import Path

from megatron_direct.runtime import arrays


def require_plain_caches(folder: str | Path) -> None:
    """Raises UserError for a cache that Megatron could not open without unpickling."""
    for path in sorted(Path(folder).glob("*.npy")):
        arrays.require_plain(path, "Delete it, and find out who wrote it: Megatron builds its "
                                   "indices again.")
