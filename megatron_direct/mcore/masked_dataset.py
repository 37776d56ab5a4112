"""A GPTDataset that shows only the documents a mask keeps, each as often as its count says.

Megatron packs shuffled documents into training sequences, so a mask over documents holds for every
seed and sequence length. The mask comes in at the one place where it governs all that follows: the
documents are restricted, and the dataset's identity changed, before any index is built or looked
for in a cache. So a changed mask never meets an index that was built for another one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from megatron_direct.data.blend_plan import kept_sequences, sequence_counts
from megatron_direct.data.mask import SampleMask
from megatron_direct.errors import UserError
from megatron_direct.mcore import index_caches


@dataclass
class MaskedGPTDatasetConfig(GPTDatasetConfig):
    """GPTDatasetConfig, and the masks by prefix; a prefix without one is seen whole."""

    sample_masks: Mapping[str, SampleMask] = field(default_factory=dict)


class MaskedGPTDataset(GPTDataset):
    """For BlendedMegatronDatasetBuilder, with a MaskedGPTDatasetConfig.

    A mask holds in every split of its prefix. Raises UserError for a mask of another dataset, and
    for one that leaves no document.
    """

    indices: Any  # of sequences, as GPTDataset has them

    def _build_document_sample_shuffle_indices(self):
        # Tests and tools may hand in a plain GPTDatasetConfig: no masks.
        mask = getattr(self.config, "sample_masks", {}).get(self.dataset_path)
        if mask is not None:
            if _comes_first():
                mask.require_belongs_to(self.dataset_path)
            if self.indices is None:
                # --dataloader-fast-cache-load, which trusts a cache, leaves them out. Where the
                # cache is not opened yet either, the length is computed from them.
                if self.config.defer_npy_index_mmap:
                    self.indices = kept_sequences(self.dataset, mask)
            else:
                # Megatron hands in a stretch of the dataset: many times as fast to thin out.
                if len(self.indices) and (np.diff(self.indices) == 1).all():
                    first, last = self.indices[[0, -1]]
                    self.indices = kept_sequences(self.dataset, mask, int(first), int(last) + 1,
                                                  ).astype(self.indices.dtype)
                else:
                    counts = sequence_counts(self.dataset, mask)
                    self.indices = np.repeat(self.indices, counts[self.indices])
                if len(self.indices) == 0:
                    raise UserError(
                        f"the mask of {self.dataset_path} keeps no document in the "
                        f"{self.index_split.name} split. Leave the prefix out of the blend.")
            self.unique_identifiers["sample_mask"] = mask.digest
            self.unique_description = json.dumps(
                self.unique_identifiers, indent=4, default=lambda value: value.unique_identifiers)
            self.unique_description_hash = hashlib.md5(
                self.unique_description.encode("utf-8"), usedforsecurity=False).hexdigest()
        if self.config.fast_cache_load or self.config.defer_npy_index_mmap:
            self._require_index()
        if not self.config.path_to_cache and self.dataset_path is not None:  # None: mock data
            # Megatron keeps its indices beside the dataset.
            index_caches.require_plain_caches(os.path.join(
                self.dataset.path_prefix, "cache", f"{type(self).__name__}_indices"))
        return super()._build_document_sample_shuffle_indices()

    def _query_document_sample_shuffle_indices(self, idx: int):
        """Raises UserError for a sequence with a token outside the vocabulary.

        Megatron would look up nothing for it where the embedding is divided over ranks, and leave a
        token that equals its padding out of the loss, both without a word.
        """
        found = super()._query_document_sample_shuffle_indices(idx)
        vocab_size = getattr(self.config.tokenizer, "vocab_size", None)
        if vocab_size is not None:
            text = np.asarray(found[0])
            if self.shuffle_index[idx] == len(self.sample_index) - 2:  # the last may be padded
                is_text = text != self._pad_token_id
                text = text[: len(text) - int(np.argmax(is_text[::-1]))]
            for token in (text.min(initial=0), text.max(initial=0)):
                if not 0 <= token < vocab_size:
                    raise UserError(
                        f"{self.dataset_path}.bin holds token {token}, but the tokenizer has "
                        f"{vocab_size} entries: the dataset was made with another tokenizer, or is "
                        "damaged. Rebuild it with the model's.")
        return found

    def _require_index(self) -> None:
        """Raises UserError where a cache that is trusted lacks an index of this dataset."""
        folder = Path(self.config.path_to_cache)
        start = f"{self.unique_description_hash}-{type(self).__name__}-{self.index_split.name}"
        if not (folder / f"{start}-document_index.npy").is_file():
            raise UserError(
                f"--dataloader-fast-cache-load and --dataloader-defer-npy-index-mmap need a "
                f"finished cache, but {folder} has no index of {self.dataset_path} for the "
                f"{self.index_split.name} split with this mask and these sizes. Leave the flags "
                "out, or build it first: tools/build_blend_cache.py with the training's flags.")


def _comes_first() -> bool:
    """Rank 0 builds before all others, so that its check is theirs: they need not read the whole
    index once more. But nodes may have copies of their own, so the first rank of each looks."""
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        return True
    return "0" in (os.environ.get("LOCAL_RANK"), os.environ.get("SLURM_LOCALID"))
