"""The documents that a mask keeps, as an indexed dataset of their own: for tools without masks.

The new dataset holds the same documents in the same order, cut into the same sequences, and those
with a count so many times in a row, so that under one seed Megatron shuffles and packs them as it
does the masked dataset.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_direct.data import indexed
from megatron_direct.data.blend_plan import kept_sequences
from megatron_direct.data.cards import corrupted_documents, read_card
from megatron_direct.data.mask import SampleMask
from megatron_direct.data.sources import SUFFIX, read_sources, write_sources
from megatron_direct.errors import UserError
from megatron_direct.runtime import files

_BLOCK_BYTES = 1 << 24  # copied at once


@dataclass(frozen=True)
class Materialized:
    """What was written."""

    documents: int
    tokens: int


def materialize(prefix: str, mask: SampleMask, output_prefix: str) -> Materialized:
    """Writes ``output_prefix`` .bin, .json (the card) and .sources.npy, where the dataset has them,
    and, last, .idx.

    Raises UserError for a mask of another dataset, for one that keeps nothing, and for an
    ``output_prefix`` that exists already.
    """
    mask.require_belongs_to(prefix)
    for suffix in (".idx", ".bin"):
        if os.path.exists(output_prefix + suffix):
            raise UserError(f"{output_prefix}{suffix} exists. Choose another prefix, or delete it.")
    if mask.num_kept == 0:
        raise UserError(f"the mask of {prefix} keeps no document: there is nothing to write.")
    dataset = indexed.open_indexed(prefix)
    numbers = read_sources(prefix, mask.num_documents)
    kept = kept_sequences(dataset, mask)
    lengths = dataset.sequence_lengths[kept]
    sequences_of_document = np.diff(dataset.document_indices)[documents_in_order(mask)]
    starts = np.concatenate([[0], np.cumsum(sequences_of_document)])
    item_size = dataset.dtype.itemsize
    begins = dataset.sequence_pointers[kept]
    with open(prefix + ".bin", "rb") as source, \
            files.written_whole(output_prefix + ".bin") as target:
        for begin, end in _runs(begins, begins + lengths.astype(np.int64) * item_size):
            _copy(source, target, begin, end)
    written = Materialized(len(starts) - 1, int(lengths.sum(dtype=np.int64)))
    card = _card(prefix, mask, written)
    if card:
        files.write_json(output_prefix + ".json", card)
    Path(output_prefix + SUFFIX).unlink(missing_ok=True)  # of another dataset of that name
    if numbers is not None:
        write_sources(output_prefix, numbers[documents_in_order(mask)])
    indexed.write_index(output_prefix + ".idx", dataset.dtype, lengths, starts)
    return written


def documents_in_order(mask: SampleMask) -> np.ndarray:
    """[K] numbers of the documents kept, each as often as its count says."""
    return np.repeat(np.arange(mask.num_documents), mask.counts)


def _runs(begins: np.ndarray, ends: np.ndarray) -> Iterator[tuple[int, int]]:
    """Stretches of bytes, each as long as neighbours touch."""
    breaks = np.flatnonzero(begins[1:] != ends[:-1])
    firsts = np.concatenate([[0], breaks + 1])
    lasts = np.concatenate([breaks, [len(ends) - 1]])
    yield from zip(begins[firsts].tolist(), ends[lasts].tolist(), strict=True)


def _copy(source, target, begin: int, end: int) -> None:
    source.seek(begin)
    while begin < end:
        block = source.read(min(_BLOCK_BYTES, end - begin))
        target.write(block)
        begin += len(block)


def _card(prefix: str, mask: SampleMask, written: Materialized) -> dict:
    """The card of the dataset, as it holds for the kept documents; {} if there is none."""
    card = read_card(prefix)
    if not card:
        return {}
    corrupted = np.isin(documents_in_order(mask), corrupted_documents(prefix, mask.num_documents))
    return {**card, **vars(written), "corrupted": np.flatnonzero(corrupted).tolist(),
            "materialized_from": {"dataset_digest": mask.dataset_digest,
                                  "mask_digest": mask.digest, "run": mask.run}}
