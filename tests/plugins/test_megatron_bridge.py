"""Masks in Megatron-Bridge. Skipped where it is not installed: it needs Transformer Engine."""

from __future__ import annotations

import numpy as np
import pytest
from indexed_files import random_documents, write_dataset

from megatron_direct import SampleMask
from megatron_direct.data.indexed import dataset_digest

pytest.importorskip("megatron.bridge", exc_type=ImportError,
                    reason="megatron-bridge is not installed: it needs Transformer Engine, a GPU")


def test_the_provider_builds_masked_datasets(tmp_path):
    from megatron.bridge.data.utils import get_dataset_provider
    from megatron.bridge.training.config import GPTDatasetConfig

    from megatron_direct.mcore.blend import Vocabulary
    from megatron_direct.plugins.megatron_bridge import MaskedDatasetProvider
    from megatron_direct.runtime import parallel

    keep = np.arange(40) % 2 == 0
    documents = [document if kept else [[60] * len(sequence) for sequence in document]
                 for document, kept in zip(random_documents(40, 60), keep, strict=True)]
    prefix = write_dataset(tmp_path / "pool", documents)
    SampleMask(2 * keep, dataset_digest(prefix)).save(tmp_path / "masks" / "pool.mask.npz")
    provider = MaskedDatasetProvider(sample_masks=str(tmp_path / "masks"), gpt=GPTDatasetConfig(
        seq_length=16, random_seed=1, blend=([prefix], None), split="100,0,0",
        path_to_cache=str(tmp_path / "cache"), reset_position_ids=False,
        reset_attention_mask=False, eod_mask_loss=False))
    with parallel.process_group():
        provider.finalize()
        build = get_dataset_provider(provider)  # as the training looks it up
        train, _, _ = build([32, 0, 0], provider, tokenizer=Vocabulary(61, "test"))
    assert len(train) >= 32
    assert not any((train[i]["tokens"] == 60).any() for i in range(32))
