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

from megatron_direct.config import BatchConfig, Job, ModelConfig, OptimizerConfig
from megatron_direct.data import blend_files
from megatron_direct.data.blend_plan import Blend, BlendRules
from megatron_direct.data.mask import SampleMask
from megatron_direct.errors import UserError
from megatron_direct.runtime import parallel

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
    from megatron_direct.mcore import blend

    return blend.build_blend(Blend(prefixes, weights), masks, blend.BlendRequest(
        LENGTH, num_sequences, seed, cache, blend.Vocabulary(VOCAB + 1, "test")))


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
    from megatron_direct.mcore import model as models
    from megatron_direct.mcore import training

    chunks = models.build(Job(model, layout))
    batch = BatchConfig(micro_batch_size=2, global_batch_size=8)
    trainer = training.make_trainer(chunks, OptimizerConfig(), batch)
    dataset = _Watched(_build(prefixes, masks, folder / "cache")[0])
    training.train(trainer, training.Feed(dataset, batch), range(3), "", lambda step: None)
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


def _train_on_wrong_tokens(model, layout, prefix, folder):
    """The ends of a large dataset are checked before any work; here its middle is meant."""
    from megatron_direct.data import indexed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexed, "require_tokens_below", lambda *_: None)
        return _train(model, layout, [prefix], {}, folder)


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2)], ids=str)
@pytest.mark.parametrize("token", [-1, VOCAB + 1])
def test_a_token_outside_the_vocabulary_is_refused_wherever_it_stands(tmp_path_factory, layout,
                                                                      token):
    """-1 is what Megatron pads with here; at TP 2 each rank looks up nothing for what is not its
    own."""
    folder = tmp_path_factory.mktemp("wrong")
    documents = random_documents(60, VOCAB, seed=1)
    for document in documents:
        document[0][0] = token
    model = ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=4,
                        ffn_hidden_size=24, seq_length=LENGTH, vocab_size=VOCAB + 1)
    prefix = write_dataset(folder / "pool", documents)
    with pytest.raises(RankError, match=f"pool.bin holds token {token}, but the tokenizer has 61"):
        on_layout(layout, _train_on_wrong_tokens, model, prefix, folder)


def _indices(cache) -> set[str]:
    """Without the record of those that are whole."""
    return set(os.listdir(cache)) - {"whole.json"}


def _check_cache(folder):
    prefixes, masks = make_pools(folder, counts=(50,))
    prefix, = prefixes
    first, _ = _build(prefixes, masks, folder / "cache")
    before = _tokens(first, 64)
    files = _indices(folder / "cache")
    again, _ = _build(prefixes, masks, folder / "cache")
    assert _indices(folder / "cache") == files, "the same mask finds its own index"
    np.testing.assert_array_equal(_tokens(again, 64), before)
    keep = masks[prefix].keep.copy()
    keep[np.flatnonzero(keep)[-1]] = False
    changed = {prefix: SampleMask(keep, masks[prefix].dataset_digest)}
    other, _ = _build(prefixes, changed, folder / "cache")
    assert len(_indices(folder / "cache")) == 2 * len(files), "another mask, another index"
    assert not np.array_equal(_tokens(other, 64), before)


def test_a_changed_mask_never_meets_the_index_of_another(tmp_path):
    run_on_ranks(1, _check_cache, tmp_path)


def _check_all_ones(folder):
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    from megatron_direct.mcore import blend

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
    with pytest.raises(RankError, match="the masks keep no document in any dataset"):
        run_on_ranks(1, _check_dropped_and_empty, tmp_path)


def _check_foreign(folder):
    prefixes, masks = make_pools(folder)
    _build(prefixes[:1], {prefixes[0]: masks[prefixes[1]]}, folder / "cache")


def test_a_mask_of_another_dataset_is_refused(tmp_path):
    with pytest.raises(RankError, match="the mask was made for a dataset with digest"):
        run_on_ranks(1, _check_foreign, tmp_path)


def _looks(local_ranks):
    from megatron_direct.mcore import masked_dataset

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", local_ranks[parallel.rank_and_size()[0]])
        return masked_dataset._comes_first()


def test_the_first_rank_of_each_node_looks_whether_a_mask_belongs_to_its_dataset():
    assert run_on_ranks(2, _looks, "00") == [True, True]  # a node each
    assert run_on_ranks(2, _looks, "01") == [True, False]


@pytest.mark.parametrize(("given", "prefixes", "weights"), [
    (["a", "b"], ["a", "b"], None),
    (["0.3", "a", "0.7", "b"], ["a", "b"], [0.3, 0.7]),
    (["a", "b", "c"], ["a", "b", "c"], None),
])
def test_data_path_as_megatron_takes_it(given, prefixes, weights):
    assert blend_files.parse_data_path(given) == Blend(prefixes, weights)


def _config(folder, blend, **settings):
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    from megatron_direct.mcore import blend as blends

    return GPTDatasetConfig(**{
        "random_seed": 3, "sequence_length": LENGTH, "path_to_cache": str(folder / "cache"),
        "blend": blend, "split": "100,0,0", "tokenizer": blends.Vocabulary(VOCAB + 1, "test"),
        "reset_position_ids": False, "reset_attention_mask": False, "eod_mask_loss": False,
        "create_attention_mask": False, **settings})


def _check_mixed(folder):
    """Two masked prefixes and one unmasked, against the materialised documents, on every rank."""
    from megatron_direct.data.materialize import materialize
    from megatron_direct.mcore.blend import masked_builder
    from megatron_direct.runtime import parallel

    if parallel.is_rank_zero():
        prefixes, masks = make_pools(folder)
        write_dataset(folder / "plain", random_documents(25, VOCAB, seed=9))
        for prefix, mask in masks.items():
            materialize(prefix, mask, prefix + "-alone")
            mask.save(prefix + ".mask.npz")
    parallel.barrier()
    prefixes = [str(folder / f"pool{i}") for i in range(2)]
    masks = {prefix: SampleMask.load(prefix + ".mask.npz") for prefix in prefixes}
    weights = [0.3, 0.3, 0.1]  # thirds of 0.7 do not come out even in floating point
    plain = str(folder / "plain")
    masked, _ = masked_builder([70, 0, 0], lambda: True,
                               _config(folder, ([*prefixes, plain], weights)), masks)
    alone, _ = masked_builder(
        [70, 0, 0], lambda: True,
        _config(folder, ([*(p + "-alone" for p in prefixes), plain], weights)), {})
    taken = _tokens(masked.build()[0], 70)
    np.testing.assert_array_equal(taken, _tokens(alone.build()[0], 70))
    assert not (taken == POISON).any()
    return taken


def test_masked_and_unmasked_prefixes_in_one_blend_and_one_cache_for_all_ranks(tmp_path):
    one, two = run_on_ranks(2, _check_mixed, tmp_path)
    np.testing.assert_array_equal(one, two)


def _built(folder, blend, sizes, masks_of, **settings):
    from megatron_direct.mcore.blend import masked_builder

    prefixes, masks = make_pools(folder)
    masks = {p: m for p, m in masks.items() if os.path.basename(p) in masks_of}
    names = dict(zip(("pool0", "pool1"), prefixes, strict=True))
    given = ([names[name] for name in blend[0]], blend[1])
    consumed = settings.pop("num_consumed", 0)
    rules = BlendRules(**{k: settings.pop(k) for k in ("blend_weights", "max_epochs")
                          if k in settings})
    builder, parts = masked_builder(sizes, lambda: True, _config(folder, given, **settings), masks,
                                    rules, consumed)
    return [dataset and len(dataset) for dataset in builder.build()], parts


def _check_without_weights(folder):
    both, all_masked = (["pool0", "pool1"], None), ("pool0", "pool1")
    lengths, parts = _built(folder, both, [None, 0, 0], all_masked)
    assert lengths[0] == sum((part.tokens - 1) // LENGTH for part in parts)
    lengths, parts = _built(folder, both, [100, 0, 0], all_masked, blend_weights="tokens")
    assert lengths[0] >= 100
    _, parts = _built(folder, both, [100, 0, 0], all_masked, blend_weights="tokens",
                      num_consumed=90, max_epochs=1.0)  # ten are left to draw
    assert parts[0].epochs == pytest.approx(10 * LENGTH / sum(part.tokens for part in parts))
    _built(folder, both, [100, 0, 0], all_masked)


def test_a_blend_without_weights_is_one_epoch(tmp_path):
    with pytest.raises(RankError, match="one epoch, which has .* needs 100. Give weights"):
        run_on_ranks(1, _check_without_weights, tmp_path)


@pytest.mark.parametrize(("settings", "match"), [
    ({"split": "99,1,0", "blend": (["pool1"], None)}, "keeps no document in the valid split"),
    ({"vocab_size": POISON, "blend": (["pool0"], None)},
     "pool0.bin holds token 60, but the tokenizer has 60 entries"),
    ({"max_epochs": 0.5, "blend": (["pool0"], None)}, "more often than --max-epochs 0.5"),
])
def test_a_blend_that_cannot_be_honoured_is_refused(tmp_path, settings, match):
    with pytest.raises(RankError, match=match):
        run_on_ranks(1, _refused, tmp_path, settings)


def _refused(folder, settings):
    from megatron_direct.mcore.blend import Vocabulary

    settings = dict(settings)
    vocab_size = settings.pop("vocab_size", None)
    if vocab_size is not None:
        settings["tokenizer"] = Vocabulary(vocab_size, "another")
    _built(folder, settings.pop("blend"), [64, 8, 0], ("pool0", "pool1"), **settings)


@pytest.mark.parametrize(("text", "expected"), [
    ('{"train": "0.3 a 0.7 b", "valid": ["c"], "test": null}',
     {"train": Blend(["a", "b"], [0.3, 0.7]), "valid": Blend(["c"]), "test": None}),
])
def test_blends_from_files(tmp_path, text, expected):
    (tmp_path / "splits.json").write_text(text)
    assert blend_files.read_per_split_data_args(str(tmp_path / "splits.json")) == expected
    (tmp_path / "args").write_text("0.3 a\n0.7 b\n")
    assert blend_files.read_data_args(str(tmp_path / "args")) == Blend(["a", "b"], [0.3, 0.7])


def test_damaged_blend_files_are_named(tmp_path):
    (tmp_path / "splits.json").write_text('{"train": "a"}')
    with pytest.raises(UserError, match="splits.json is not a JSON object with the keys train"):
        blend_files.read_per_split_data_args(str(tmp_path / "splits.json"))
    with pytest.raises(UserError, match="gone cannot be read .No such file"):
        blend_files.read_data_args(str(tmp_path / "gone"))


def _blend_of_annealing(**settings):
    from megatron_direct.commands.arm import AnnealConfig, blend_of
    from megatron_direct.steps.selected import SelectionOrigin

    origin = SelectionOrigin("theta", "digest", ("a", "b"), ("v",), {}, {})
    return blend_of(AnnealConfig(run_dir="runs/x", **settings), origin)


def test_an_annealing_takes_the_pools_of_its_run_or_the_blend_it_is_given(tmp_path):
    (tmp_path / "splits.json").write_text('{"train": "1 a 2 c", "valid": "v", "test": "t"}')
    (tmp_path / "args").write_text("1 a 2 c")
    assert _blend_of_annealing() == (Blend(["a", "b"]), [])
    assert _blend_of_annealing(data_path=("a", "b")) == (Blend(["a", "b"]), [])
    given = Blend(["a", "c"], [1.0, 2.0])
    assert _blend_of_annealing(data_path=("1", "a", "2", "c"), test_data_path=("u",)) == \
        (given, ["u"])
    assert _blend_of_annealing(data_args_path=str(tmp_path / "args")) == (given, [])
    assert _blend_of_annealing(per_split_data_args_path=str(tmp_path / "splits.json")) == \
        (given, ["t"])


def test_an_annealing_refuses_two_blends_and_another_validation_set(tmp_path):
    (tmp_path / "splits.json").write_text('{"train": "a", "valid": "w", "test": null}')
    with pytest.raises(UserError, match="--data-path and --data-args-path both define the blend"):
        _blend_of_annealing(data_path=("c",), data_args_path="x")
    with pytest.raises(UserError, match="validates on w, but the selection was made for v. Set"):
        _blend_of_annealing(per_split_data_args_path=str(tmp_path / "splits.json"))
