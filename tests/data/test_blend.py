"""MaskedGPTDataset inside Megatron's own blend builder.

The proof that a mask holds: every token of a document outside it is overwritten with a token that
occurs nowhere else, and no batch may hold that token, in any layout.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
from indexed_files import random_documents, write_dataset
from ranks import LAYOUTS, Layout, RankError, on_layout, run_on_ranks

from megatron_direct.config import BatchConfig, ModelConfig, OptimizerConfig
from megatron_direct.data.mask import SampleMask

VOCAB, POISON, LENGTH = 60, 60, 16


def poisoned(documents, keep):
    """Documents outside the mask, overwritten with the otherwise unused token."""
    return [document if kept else [[POISON] * len(sequence) for sequence in document]
            for document, kept in zip(documents, keep, strict=True)]


def make_pools(folder, counts=(50, 30), keep_share=0.5):
    """Prefixes, and masks over them; what is outside a mask is poison."""
    from megatron_direct.data.indexed import dataset_digest

    rng, prefixes, masks = np.random.default_rng(7), [], {}
    for number, count in enumerate(counts):
        keep = rng.random(count) < keep_share
        keep[0] = True
        documents = poisoned(random_documents(count, VOCAB, seed=number), keep)
        prefix = write_dataset(folder / f"pool{number}", documents)
        prefixes.append(prefix)
        masks[prefix] = SampleMask(keep, dataset_digest(prefix))
    return prefixes, masks


def _build(prefixes, masks, cache, num_sequences=64, weights=None, seed=3):
    from megatron_direct.data import blend

    return blend.build_blend(
        prefixes, weights, masks, seq_length=LENGTH, num_sequences=num_sequences, seed=seed,
        vocabulary=blend.Vocabulary(VOCAB + 1, "test"), cache=cache)


def _tokens(dataset, count):
    return np.stack([np.append(dataset[i]["tokens"].numpy(), dataset[i]["labels"][-1].numpy())
                     for i in range(count)])


def _check_poison(folder):
    prefixes, masks = make_pools(folder)
    dataset, parts = _build(prefixes, masks, folder / "cache")
    assert not (_tokens(dataset, 64) == POISON).any()
    whole, _ = _build(prefixes, {}, folder / "cache")
    assert (_tokens(whole, 64) == POISON).any()  # so the test can fail
    for part, prefix in zip(parts, prefixes, strict=True):
        assert part.documents == masks[prefix].num_kept
        share = part.tokens / sum(p.tokens for p in parts)
        assert part.weight == pytest.approx(share)
        assert part.epochs == pytest.approx(64 * LENGTH / sum(p.tokens for p in parts))


def test_no_token_of_a_masked_document_reaches_a_batch(tmp_path):
    run_on_ranks(1, _check_poison, tmp_path)


class _Watched:
    """A dataset that notes what the training takes from it."""

    def __init__(self, dataset):
        self.dataset, self.taken = dataset, {}

    def __getitem__(self, number):
        sequence = self.dataset[number]
        self.taken[number] = np.append(sequence["tokens"].numpy(), sequence["labels"][-1].numpy())
        return sequence


def _train(model, layout, prefixes, masks, folder):
    """What this rank's batches held in three iterations of training: number -> tokens."""
    from megatron_direct import model as models
    from megatron_direct import training

    chunks = models.build(model, layout)
    batch = BatchConfig(micro_batch_size=2, global_batch_size=8)
    trainer = training.make_trainer(chunks, OptimizerConfig(), batch)
    dataset = _Watched(_build(prefixes, masks, folder / "cache")[0])
    training.train(trainer, dataset, batch, range(3), first_sequence=0, description="",
                   after_step=lambda step: None)
    return dataset.taken


@pytest.mark.parametrize("layout", [Layout(), *LAYOUTS], ids=str)
def test_no_masked_token_reaches_a_batch_in_any_layout(tmp_path_factory, layout):
    folder = tmp_path_factory.mktemp("poison")
    prefixes, masks = make_pools(folder)
    model = ModelConfig(num_layers=2, hidden_size=16, num_attention_heads=4, num_query_groups=2,
                        ffn_hidden_size=24, seq_length=LENGTH, vocab_size=VOCAB + 1)
    ranks = on_layout(layout, _train, model, prefixes, masks, folder)
    batches = {number: text for taken in ranks for number, text in taken.items()}
    assert sorted(batches) == list(range(24))  # every sequence of the three global batches
    assert not any((text == POISON).any() for text in batches.values())
    for taken in ranks:
        assert len(taken) == 24 // layout.dp


def _check_cache(folder):
    prefixes, masks = make_pools(folder, counts=(50,))
    prefix, = prefixes
    first, _ = _build(prefixes, masks, folder / "cache")
    before = _tokens(first, 64)
    files = set(os.listdir(folder / "cache"))
    again, _ = _build(prefixes, masks, folder / "cache")
    assert set(os.listdir(folder / "cache")) == files, "the same mask finds its own index"
    np.testing.assert_array_equal(_tokens(again, 64), before)
    keep = masks[prefix].keep.copy()
    keep[np.flatnonzero(keep)[-1]] = False
    changed = {prefix: SampleMask(keep, masks[prefix].dataset_digest)}
    other, _ = _build(prefixes, changed, folder / "cache")
    assert len(set(os.listdir(folder / "cache"))) == 2 * len(files), "another mask, another index"
    assert not np.array_equal(_tokens(other, 64), before)


def test_a_changed_mask_never_meets_the_index_of_another(tmp_path):
    run_on_ranks(1, _check_cache, tmp_path)


def _check_all_ones(folder):
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    from megatron_direct.data import blend

    prefixes, masks = make_pools(folder, keep_share=2.0)
    ours, parts = _build(prefixes, masks, folder / "ours")
    config = GPTDatasetConfig(
        random_seed=3, sequence_length=LENGTH, path_to_cache=str(folder / "stock"),
        blend_per_split=[(prefixes, [part.weight for part in parts]), None, None],
        tokenizer=blend.Vocabulary(VOCAB + 1, "test"), reset_position_ids=False,
        reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False)
    stock, _, _ = BlendedMegatronDatasetBuilder(
        GPTDataset, [64, 0, 0], lambda: True, config).build()
    np.testing.assert_array_equal(_tokens(ours, 64), _tokens(stock, 64))


def test_a_mask_that_keeps_all_changes_nothing(tmp_path):
    run_on_ranks(1, _check_all_ones, tmp_path)


def _check_materialised(folder):
    """Masked documents against a dataset of the kept documents alone: the same batches."""
    prefixes, masks = make_pools(folder, counts=(50,))
    keep = masks[prefixes[0]].keep
    kept = [d for d, k in zip(random_documents(50, VOCAB, seed=0), keep, strict=True) if k]
    alone = write_dataset(folder / "alone", kept)
    masked, _ = _build(prefixes, masks, folder / "cache")
    plain, _ = _build([alone], {}, folder / "cache")

    np.testing.assert_array_equal(_tokens(masked, 64), _tokens(plain, 64))


def test_a_masked_dataset_reads_as_one_of_the_kept_documents_alone(tmp_path):
    run_on_ranks(1, _check_materialised, tmp_path)


def _check_dropped_and_empty(folder):
    prefixes, masks = make_pools(folder)
    nothing = SampleMask(np.zeros(30, dtype=bool), masks[prefixes[1]].dataset_digest)
    _, parts = _build(prefixes, {**masks, prefixes[1]: nothing}, folder / "cache")
    assert [part.prefix for part in parts] == prefixes[:1]
    _, parts = _build(prefixes, masks, folder / "cache", weights=[1.0, 3.0])
    assert [part.weight for part in parts] == [0.25, 0.75]
    both = {p: SampleMask(np.zeros_like(m.keep), m.dataset_digest) for p, m in masks.items()}
    _build(prefixes, both, folder / "cache")


def test_a_prefix_with_nothing_left_is_dropped_and_an_empty_blend_refused(tmp_path):
    with pytest.raises(RankError, match="the masks leave no document in any dataset"):
        run_on_ranks(1, _check_dropped_and_empty, tmp_path)


def _check_foreign(folder):
    prefixes, masks = make_pools(folder)
    _build(prefixes[:1], {prefixes[0]: masks[prefixes[1]]}, folder / "cache")


def test_a_mask_of_another_dataset_is_refused(tmp_path):
    with pytest.raises(RankError, match="the mask was made for a dataset with digest"):
        run_on_ranks(1, _check_foreign, tmp_path)


@pytest.mark.parametrize(("given", "prefixes", "weights"), [
    (["a", "b"], ["a", "b"], None),
    (["0.3", "a", "0.7", "b"], ["a", "b"], [0.3, 0.7]),
    (["a", "b", "c"], ["a", "b", "c"], None),
])
def test_data_path_as_megatron_takes_it(given, prefixes, weights):
    from megatron_direct.data.blend import parse_data_path

    assert parse_data_path(given) == (prefixes, weights)
