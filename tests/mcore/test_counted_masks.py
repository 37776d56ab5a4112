"""Masks with counts inside Megatron's blend builder: a document with count 2 comes twice an epoch.

Every document consists of one token of its own, five times over, so that tokens can be counted.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
from indexed_files import random_documents, write_dataset
from ranks import LAYOUTS, Layout, on_layout, run_on_ranks

from megatron_direct.config import BatchConfig, Job, ModelConfig, OptimizerConfig
from megatron_direct.data.blend_plan import Blend, BlendRules
from megatron_direct.data.indexed import dataset_digest
from megatron_direct.data.mask import SampleMask
from megatron_direct.data.materialize import materialize
from megatron_direct.errors import UserError

LENGTH, DOCUMENT = 16, 5
# 13 times 5 tokens are one epoch of exactly 4 sequences of 16 and the last one's label.
COUNTS = np.array([2, 0, 1, 4, 1, 0, 3, 2])
VOCAB = 64


def _prefix(folder) -> str:
    return write_dataset(folder / "pool", [[[d] * DOCUMENT] for d in range(len(COUNTS))])


def _build(prefixes, masks, cache, num_sequences, **rules):
    from megatron_direct.mcore import blend

    return blend.build_blend(Blend(prefixes), masks, blend.BlendRequest(
        LENGTH, num_sequences, 3, cache, blend.Vocabulary(VOCAB, "test")), BlendRules(**rules))


def _inputs(model, layout, prefix, counts, folder):
    """number -> the tokens of each sequence that this rank trained on, in one iteration of four."""
    from megatron_direct.mcore import model as models
    from megatron_direct.mcore import training

    taken = {}

    class Watched:
        def __init__(self, dataset):
            self.dataset = dataset

        def __getitem__(self, number):
            taken[number] = self.dataset[number]["tokens"].numpy()
            return self.dataset[number]

    mask = SampleMask(counts, dataset_digest(prefix))
    dataset, _ = _build([prefix], {prefix: mask}, folder / "cache", 4)
    batch = BatchConfig(micro_batch_size=2, global_batch_size=4)
    trainer = training.make_trainer(models.build(Job(model, layout)), OptimizerConfig(), batch)
    training.train(trainer, training.Feed(Watched(dataset), batch), range(1), "", lambda step: None)
    return taken


FEW = (Layout(), Layout(tp=2, pp=2), Layout(dp=2))


@pytest.mark.parametrize("layout", [
    *FEW, *(pytest.param(layout, marks=pytest.mark.slow) for layout in LAYOUTS
            if layout not in FEW)], ids=str)
def test_a_document_is_seen_as_often_as_its_count_in_every_layout(tmp_path_factory, layout):
    folder = tmp_path_factory.mktemp("counts")
    prefix = _prefix(folder)
    model = ModelConfig(num_layers=2, hidden_size=16, num_attention_heads=4, num_query_groups=2,
                        ffn_hidden_size=24, seq_length=LENGTH, vocab_size=VOCAB)
    ranks = on_layout(layout, _inputs, model, prefix, COUNTS, folder)
    taken = {number: tokens for of_rank in ranks for number, tokens in of_rank.items()}
    assert sorted(taken) == [0, 1, 2, 3]
    seen = np.bincount(np.concatenate(list(taken.values())), minlength=len(COUNTS))
    # The epoch's last token is a label only.
    missing = DOCUMENT * COUNTS - seen
    assert missing.min() == 0 and missing.sum() == 1


def _tokens(dataset, count):
    return np.stack([np.append(dataset[i]["tokens"].numpy(), dataset[i]["labels"][-1].numpy())
                     for i in range(count)])


def _check_materialised(folder):
    """Documents of one and of two sequences, masked and written out: the same batches."""
    prefix = write_dataset(folder / "pool", random_documents(40, VOCAB, seed=2))
    counts = np.random.default_rng(0).integers(0, 4, 40)
    mask = SampleMask(counts, dataset_digest(prefix))
    materialize(prefix, mask, str(folder / "alone"))
    masked, parts = _build([prefix], {prefix: mask}, folder / "cache", 64, max_epochs=None)
    plain, whole = _build([str(folder / "alone")], {}, folder / "cache", 64)
    np.testing.assert_array_equal(_tokens(masked, 64), _tokens(plain, 64))
    assert (parts[0].tokens, parts[0].epochs) == (whole[0].tokens, whole[0].epochs)
    assert parts[0].documents == np.count_nonzero(counts) and parts[0].max_count == 3
    assert whole[0].documents == counts.sum()


def test_a_counted_dataset_reads_as_one_with_the_documents_written_so_often(tmp_path):
    run_on_ranks(1, _check_materialised, tmp_path)


def _check_cache_and_limits(folder):
    prefix = _prefix(folder)
    digest = dataset_digest(prefix)
    masks = [SampleMask(counts, digest) for counts in (COUNTS > 0, COUNTS)]
    _build([prefix], {prefix: masks[0]}, folder / "cache", 4)
    record = {"whole.json"}
    files = set(os.listdir(folder / "cache")) - record
    _build([prefix], {prefix: masks[1]}, folder / "cache", 4)
    assert len(set(os.listdir(folder / "cache")) - record) == 2 * len(files), "another index"
    # Two epochs of a mask with a count of 4 show that document 8 times.
    with pytest.raises(UserError, match=r"more often than --max-epochs 7: .*pool 7.88 times"):
        _build([prefix], {prefix: masks[1]}, folder / "cache", 8, max_epochs=7)


def test_counts_have_an_index_of_their_own_and_count_as_epochs(tmp_path):
    run_on_ranks(1, _check_cache_and_limits, tmp_path)


def test_a_part_of_a_dataset_keeps_the_order_of_documents(tmp_path):
    """A dataset that --split divides: Megatron hands in a stretch of its sequences."""
    from megatron_direct.data import indexed
    from megatron_direct.data.blend_plan import kept_sequences

    prefix = write_dataset(tmp_path / "pool", random_documents(30, VOCAB, seed=4))
    dataset = indexed.open_indexed(prefix)
    counts = np.random.default_rng(1).integers(0, 3, 30)
    mask = SampleMask(counts, dataset_digest(prefix))
    begin, end = 7, 31
    document = np.searchsorted(dataset.document_indices, np.arange(begin, end), side="right") - 1
    expected = []
    for d in np.unique(document):  # whole documents, one copy after the other
        expected += [np.arange(begin, end)[document == d]] * counts[d]
    np.testing.assert_array_equal(kept_sequences(dataset, mask, begin, end),
                                  np.concatenate(expected))
