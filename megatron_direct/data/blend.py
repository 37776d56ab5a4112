"""Megatron's blend over masked prefixes: the training data of the annealing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_direct.data import indexed
from megatron_direct.data.mask import SampleMask
from megatron_direct.errors import UserError


@dataclass(frozen=True)
class Vocabulary:
    """What Megatron's datasets ask of a tokenizer: its size, its ends, and who it is."""

    vocab_size: int
    name: str

    @property
    def unique_identifiers(self) -> dict:
        return {"class": type(self).__name__, "name": self.name, "vocab_size": self.vocab_size}

    @property
    def eod(self) -> int:
        """Behind the last token: nothing is reset or masked at a document's end."""
        return self.vocab_size

    @property
    def pad(self) -> int:
        """No token: training sequences are full."""
        return -1


@dataclass(frozen=True)
class BlendPart:
    """One prefix of a blend: what its mask leaves, and how often the training sees it."""

    prefix: str
    documents: int
    tokens: int
    weight: float
    epochs: float


def parse_data_path(data_path: Sequence[str]) -> tuple[list[str], list[float] | None]:
    """``--data-path`` as Megatron takes it: prefixes, or weights and prefixes by turns."""
    values = list(data_path)
    if len(values) % 2 == 0 and all(_is_number(value) for value in values[::2]):
        return values[1::2], [float(value) for value in values[::2]]
    return values, None


def build_blend(prefixes: Sequence[str], weights: Sequence[float] | None,
                masks: Mapping[str, SampleMask], *, seq_length: int, num_sequences: int, seed: int,
                vocabulary: Vocabulary, cache: Path):
    """(dataset of at least ``num_sequences`` training sequences, its BlendParts).

    Without weights a prefix counts by the tokens that its mask leaves, so that every kept document
    is seen equally often. A prefix with nothing left is dropped. All ranks call this; rank 0
    builds the indices into ``cache`` and the others read them there.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )

    from megatron_direct.data.masked_dataset import MaskedGPTDataset, MaskedGPTDatasetConfig

    left = {prefix: _documents_and_tokens(prefix, masks.get(prefix)) for prefix in prefixes}
    shares = dict(zip(prefixes, weights or [left[p][1] for p in prefixes], strict=True))
    used = [prefix for prefix in prefixes if left[prefix][1] > 0 and shares[prefix] > 0]
    if not used:
        raise UserError("the masks leave no document in any dataset of --data-path. "
                        "Select more samples, or check that the masks belong to this run.")
    total = sum(shares[prefix] for prefix in used)
    parts = [BlendPart(prefix, *left[prefix], shares[prefix] / total,
                       shares[prefix] / total * num_sequences * seq_length / left[prefix][1])
             for prefix in used]
    config = MaskedGPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend_per_split=[(used, [part.weight for part in parts]), None, None],
        path_to_cache=str(cache),
        tokenizer=vocabulary,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        sample_masks=dict(masks),
    )
    dataset, _, _ = BlendedMegatronDatasetBuilder(
        MaskedGPTDataset, [num_sequences, 0, 0], lambda: True, config).build()
    return dataset, parts


def _documents_and_tokens(prefix: str, mask: SampleMask | None) -> tuple[int, int]:
    lengths = indexed.document_lengths(indexed.open_indexed(prefix))
    if mask is not None:
        mask.require_belongs_to(prefix)
        lengths = lengths[mask.keep]
    return len(lengths), int(np.sum(lengths))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
