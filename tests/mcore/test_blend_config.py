"""Fields of Megatron's GPTDatasetConfig that a masked blend honours, or refuses."""

from __future__ import annotations

import numpy as np
import pytest
from indexed_files import random_documents, write_dataset
from ranks import run_on_ranks

from megatron_direct.data.indexed import dataset_digest
from megatron_direct.data.mask import SampleMask
from megatron_direct.data.materialize import materialize
from megatron_direct.errors import UserError

VOCAB, LENGTH, COUNT = 60, 16, 40


def _config(folder, names, **changed):
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    from megatron_direct.mcore.blend import Vocabulary

    return GPTDatasetConfig(**{
        "random_seed": 3, "sequence_length": LENGTH, "path_to_cache": str(folder / "cache"),
        "blend_per_split": [([str(folder / name) for name in names], [2, 1]), None, None],
        "tokenizer": Vocabulary(VOCAB, "test"), "reset_position_ids": False,
        "reset_attention_mask": False, "eod_mask_loss": False, "create_attention_mask": False,
        **changed})


def _build(folder, masks=None, names=("pool0", "pool1"), **changed):
    from megatron_direct.mcore.blend import masked_builder

    builder, _ = masked_builder([COUNT, 0, 0], lambda: True, _config(folder, names, **changed),
                                masks or {})
    return builder.build()[0]


def _samples(dataset, *names) -> list:
    return [np.stack([np.asarray(dataset[i][name]) for i in range(COUNT)]) for name in names]


def _pools(folder) -> dict[str, SampleMask]:
    masks, rng = {}, np.random.default_rng(2)
    for number in (0, 1):
        prefix = write_dataset(folder / f"pool{number}",
                               random_documents(50, VOCAB, seed=number), np.uint16)
        masks[prefix] = SampleMask(rng.random(50) < 0.5, dataset_digest(prefix))
        materialize(prefix, masks[prefix], str(folder / f"alone{number}"))
    return masks


def _check_cache(folder):
    masks = _pools(folder)
    trusted = {"fast_cache_load": True, "defer_npy_index_mmap": True}
    for first in (trusted, {"fast_cache_load": True}, {"defer_npy_index_mmap": True}):
        with pytest.raises(UserError, match="need a finished cache, but .*cache has no index of "
                                            ".*pool0 for the train split .*build_blend_cache.py"):
            _build(folder, masks, **first)
    built = _samples(_build(folder, masks), "tokens")
    for later in (trusted, {"fast_cache_load": True}, {"defer_npy_index_mmap": True}):
        np.testing.assert_array_equal(_samples(_build(folder, masks, **later), "tokens"), built)
    one = {prefix: mask for prefix, mask in masks.items() if prefix.endswith("pool0")}
    with pytest.raises(UserError, match="no index of .*pool1"):
        _build(folder, one, **trusted)


def test_a_trusted_cache_has_to_be_of_these_masks(tmp_path):
    run_on_ranks(1, _check_cache, tmp_path)


def _check_counts(folder):
    masks = _pools(folder)
    counts = {}
    for prefix in masks:
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        dataset = IndexedDataset(prefix)
        counts[prefix] = [len(dataset), len(dataset.document_indices)]
    expected = _samples(_build(folder, masks), "tokens")
    given = _build(folder, masks, sequences_per_dataset=counts)
    np.testing.assert_array_equal(_samples(given, "tokens"), expected)
    first, second = masks
    for wrong, match in [
            ({first: counts[first]}, f"has no entry for {second}. Write it again"),
            ({**counts, second: [1, 2]}, r"\[1, 2\] sequences and document boundaries, but")]:
        with pytest.raises(UserError, match=match):
            _build(folder, masks, sequences_per_dataset=wrong)
    wide = write_dataset(folder / "wide", random_documents(50, VOCAB), np.int32)
    with pytest.raises(UserError, match="wide stores tokens in 4 bytes each, but .* reads 2"):
        _build(folder, {}, ("pool0", "wide"), sequences_per_dataset={
            first: counts[first], wide: [len(IndexedDataset(wide)), 51]})


def test_given_counts_have_to_be_those_of_the_datasets(tmp_path):
    run_on_ranks(1, _check_counts, tmp_path)


def _check_boundaries(folder):
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    if not hasattr(GPTDatasetConfig, "inter_document_masking"):
        return False
    masks = _pools(folder)
    names = ("tokens", "position_ids", "cu_seqlens")
    masked = _samples(_build(folder, masks, inter_document_masking=True), *names)
    alone = _samples(_build(folder, {}, ("alone0", "alone1"), inter_document_masking=True), *names)
    for found, expected in zip(masked, alone, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert (masked[2][:, 1] < LENGTH).any()  # more than one document in a sequence
    return True


def test_boundaries_of_documents_are_those_of_the_kept_ones(tmp_path):
    done, = run_on_ranks(1, _check_boundaries, tmp_path)
    if not done:
        pytest.skip("this version of megatron-core has no inter_document_masking (0.19 has)")
