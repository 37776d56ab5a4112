"""Megatron-LM's flags about data, with masks: each works, or is refused for a reason.

One rank, the blend in a file per split; what a flag must not change is compared with a training
without it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import megatron_lm_runs as runs
import numpy as np
import pytest
from indexed_files import random_documents, write_dataset
from megatron_lm_runs import GPT2, SAMPLES, needs_checkout
from ranks import Layout

ALONE = Layout()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return runs.make_pools(tmp_path_factory.mktemp("megatron_lm_data"))


def _flags(folder, pools=("pool0", "pool1"), cache="cache") -> list:
    masks = ["--sample-masks", "masks"] if pools[0] == "pool0" else []
    return [*GPT2, "--train-samples", SAMPLES, "--data-cache-path", cache,
            *runs.blend_per_split(folder, list(pools)), *masks]


def _files(cache: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}


@pytest.fixture(scope="module")
def losses(folder):
    """Of the training that the flags are added to; its cache was built ahead."""
    runs.run(folder, ALONE, *_flags(folder), script="tools/build_blend_cache.py")
    built = _files(folder / "cache")
    assert any("BlendedDataset" in name for name in built)
    losses, _ = runs.run(folder, ALONE, *_flags(folder))
    assert len(losses) == 8 and _files(folder / "cache") == built
    return losses


def _counts(folder, prefixes) -> dict:
    """As Megatron-LM's tools/build_sequences_per_dataset.py writes them."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    datasets = {prefix: IndexedDataset(str(folder / prefix)) for prefix in prefixes}
    return {prefix: [len(dataset), len(dataset.document_indices)]
            for prefix, dataset in datasets.items()}


@needs_checkout
def test_a_trusted_cache_and_given_counts_change_nothing(folder, losses):
    (folder / "counts.json").write_text(json.dumps(_counts(folder, ["pool0", "pool1", "pool2"])))
    built = _files(folder / "cache")
    with_all, _ = runs.run(folder, ALONE, *_flags(folder), "--dataloader-fast-cache-load",
                           "--dataloader-defer-npy-index-mmap",
                           "--per-dataset-sequences-path", "counts.json")
    assert with_all == losses
    assert _files(folder / "cache") == built


@needs_checkout
def test_a_cache_without_the_masks_index_is_not_trusted(folder, losses):
    """It was built for both masks; here pool1 has none, so that its index is another."""
    flags = [*_flags(folder)[:-2], "--sample-mask", "pool0", "masks/pool0.mask.npz",
             "--dataloader-fast-cache-load"]
    _, output = runs.run(folder, Layout(tp=2), *flags, fails=True)
    assert output.count("megatron-direct: error:") == 1
    assert re.search(r"error: --dataloader-fast-cache-load and --dataloader-defer-npy-index-mmap "
                     r"need a finished cache, but cache has no index of pool1 for the train split "
                     r".* build it first: tools/build_blend_cache.py", output)


@needs_checkout
@pytest.mark.parametrize(("changed", "match"), [
    ({"pool1": [1, 2]}, r"gives pool1 \[1, 2\] sequences and document boundaries, but the dataset "
                        r"has \[\d+, 51\]. Write it again with .*build_sequences_per_dataset.py"),
    ({"pool1": None}, "has no entry for pool1. Write it again"),
    ({"wide": None}, "wide stores tokens in 4 bytes each, but with --per-dataset-sequences-path "
                     "Megatron reads 2, from the size of the vocabulary. Leave the flag out"),
], ids=["other counts", "no entry", "other type of tokens"])
def test_counts_that_are_not_the_datasets_are_refused(folder, changed, match):
    """Megatron-LM would read other tokens, or end in a KeyError."""
    counts = _counts(folder, ["pool0", "pool1", "pool2"])
    flags = _flags(folder)
    if "wide" in changed:
        write_dataset(folder / "wide", random_documents(40, 60, seed=2), np.int32)
        counts |= _counts(folder, ["wide"])
        flags = [*GPT2, "--train-samples", SAMPLES, "--eval-iters", 0,
                 "--train-data-path", 1, "pool0", 1, "wide",
                 "--sample-mask", "pool0", "masks/pool0.mask.npz"]
    else:
        counts = {prefix: count for prefix, count in {**counts, **changed}.items() if count}
    (folder / "wrong.json").write_text(json.dumps(counts))
    _, output = runs.run(folder, ALONE, *flags, "--per-dataset-sequences-path", "wrong.json",
                         script="tools/build_blend_cache.py", fails=True)
    assert output.count("megatron-direct: error:") == 1
    assert re.search(f"error: .*{match}", output)


@needs_checkout
def test_a_blend_in_a_file_is_the_one_on_the_command_line(folder):
    common = [*GPT2, "--train-samples", SAMPLES, "--sample-masks", "masks",
              "--data-cache-path", "cache-whole"]
    on_the_line, _ = runs.run(folder, ALONE, *common, *runs.whole_blend(["pool0", "pool1"]))
    (folder / "blend.txt").write_text("1 pool0 2 pool1\n1 pool2")
    in_a_file, _ = runs.run(folder, ALONE, *common, "--data-args-path", "blend.txt", "--split",
                            "100,0,0", "--eval-iters", 0)
    assert in_a_file == on_the_line and len(in_a_file) == 8


@needs_checkout
def test_attention_within_documents_sees_those_of_the_materialized_datasets(folder, losses):
    """Boundaries of documents come from the masked dataset; attention stays between them."""
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    if not hasattr(GPTDatasetConfig, "inter_document_masking"):
        pytest.skip("this version has no --dataloader-inter-document-masking (0.19 has)")
    masked, _ = runs.run(folder, ALONE, *_flags(folder), "--dataloader-inter-document-masking",
                         record="within-documents")
    alone, _ = runs.run(folder, ALONE, *_flags(folder, ("alone0", "alone1"), "cache-alone"),
                        "--dataloader-inter-document-masking")
    assert masked == alone and len(masked) == 8
    assert masked != losses  # which were of attention over the whole row
    assert not (runs.batches(folder, "within-documents")["tokens"] == runs.POISON).any()


@needs_checkout
def test_a_new_blend_begins_at_its_first_sequence_after_a_phase_transition(folder):
    """And without one, where the old blend stopped: docs/blends.md says so."""
    masked = [*GPT2, *runs.whole_blend(["pool0", "pool1"]), "--sample-masks", "masks",
              "--data-cache-path", "cache-phases"]
    before = [*GPT2, "--data-path", "pool2", "--split", "100,0,0", "--eval-iters", 0,
              "--data-cache-path", "cache-phases"]
    samples = ["--train-samples", SAMPLES, "--save", "phases", "--save-interval", 100]
    phases = [*samples, "--phase-transition-iterations", 4]
    losses, _ = runs.run(folder, ALONE, *before, *phases)
    assert sorted(losses) == [1, 2, 3, 4]
    losses, _ = runs.run(folder, ALONE, *masked, *phases, "--load", "phases",
                         record="second-phase")
    assert sorted(losses) == [5, 6, 7, 8]
    runs.run(folder, ALONE, *masked, "--train-samples", SAMPLES // 2, record="fresh-half")
    np.testing.assert_array_equal(runs.batches(folder, "second-phase")["tokens"],
                                  runs.batches(folder, "fresh-half")["tokens"])

    (folder / "phases" / "latest_checkpointed_iteration.txt").write_text("4")
    runs.run(folder, ALONE, *masked, *samples, "--load", "phases", record="no-transition")
    runs.run(folder, ALONE, *masked, "--train-samples", SAMPLES, record="fresh-whole")
    np.testing.assert_array_equal(runs.batches(folder, "no-transition")["tokens"],
                                  runs.batches(folder, "fresh-whole")["tokens"][8:])


@needs_checkout
@pytest.mark.parametrize(("flags", "match"), [
    (["--data-path", "1", "pool0", "1", "pool1", "--split", "100,0,0",
      "--sample-mask", "pool0", "masks/pool1.mask.npz"],
     "the mask was made for a dataset with digest"),
    (["--mock-data", "--sample-masks", "masks"], "sample masks are for GPT pre-training data"),
], ids=["mask of another dataset", "mock data"])
def test_what_cannot_be_honoured_is_told_once(folder, flags, match):
    _, output = runs.run(folder, Layout(tp=2), *GPT2, "--train-samples", SAMPLES,
                         "--eval-iters", 0, *flags, fails=True)
    assert output.count("megatron-direct: error:") == 1
    assert re.search(f"megatron-direct: error: {match}", output)
