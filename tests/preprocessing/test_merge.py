"""Merged shards against Megatron's own builder, and windows against its own GPTDataset."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from preprocess_runs import read, write_shards

from megatron_direct.data import indexed
from megatron_direct.preprocessing import duplicates, shards, windows
from megatron_direct.preprocessing.merge import Merger
from megatron_direct.preprocessing.settings import PreprocessSettings
from megatron_direct.preprocessing.tokenizer import TokenizerIdentity

EOD = 0
IDENTITY = TokenizerIdentity("digest", "library", 60_000, EOD)


class Shards:
    """A folder of shards with documents of one domain and split."""

    def __init__(self, folder: Path, per_shard: list[list[np.ndarray]], split: str = "pool"):
        self.folder = folder / "x.shards"
        self._contents = write_shards(
            self.folder, [[("d", split, tokens) for tokens in shard] for shard in per_shard], EOD)

    def merge(self, prefix: Path, **changed) -> dict:
        """The card."""
        settings = PreprocessSettings(
            input=(Path("in.jsonl"),), output_prefix=str(self.folder).removesuffix(".shards"),
            tokenizer_model=Path("t.model"), append_eod=True, seed=1, **changed)
        target, = self._contents.targets
        target = dataclasses.replace(target, prefix=str(prefix))
        same, card = Merger(settings, IDENTITY)(target)
        assert same is target
        if card.documents:
            assert json.loads(Path(f"{prefix}.json").read_text()) == card.as_json()
        return card.as_json()


def _documents(dtype, seed: int = 0) -> list[list[np.ndarray]]:
    """Three shards of documents of 2 to 40 tokens; the last token of each is the end."""
    rng = np.random.default_rng(seed)
    return [[np.append(rng.integers(1, 60_000, rng.integers(1, 40)), EOD).astype(dtype)
             for _ in range(count)] for count in (30, 1, 17)]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_the_bytes_are_those_of_megatrons_builder(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(indexed, "_BLOCK", 10)  # of 48, so that blocks meet
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    per_shard = _documents(dtype)
    for number, documents in enumerate(per_shard):
        builder = IndexedDatasetBuilder(f"{tmp_path}/shard{number}.bin", dtype=dtype)
        for tokens in documents:
            builder.add_document(torch.from_numpy(tokens.astype(np.int32)), [len(tokens)])
        builder.finalize(f"{tmp_path}/shard{number}.idx")
    builder = IndexedDatasetBuilder(f"{tmp_path}/theirs.bin", dtype=dtype)
    for number in range(len(per_shard)):
        builder.add_index(f"{tmp_path}/shard{number}")
    builder.finalize(f"{tmp_path}/theirs.idx")

    card = Shards(tmp_path, per_shard).merge(tmp_path / "ours")
    assert card["documents"] == 48 and card["tokens"] == sum(len(t) for s in per_shard for t in s)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == \
            (tmp_path / f"theirs{suffix}").read_bytes()


def test_no_manifest_is_read_again(tmp_path, monkeypatch):
    """The catalogue has read them all; with many datasets each would else be read many times."""
    made = Shards(tmp_path, _documents(np.uint16))
    monkeypatch.setattr(shards, "read_manifest", None)
    assert made.merge(tmp_path / "x")["documents"] == 48


def test_flagged_documents_are_dropped_on_request(tmp_path):
    per_shard = _documents(np.uint16)
    made = Shards(tmp_path, per_shard)
    flags = np.random.default_rng(0).integers(0, 3, 48).astype(np.uint8)
    flags.tofile(made.folder / duplicates.FLAGS)
    documents = [tuple(tokens.tolist()) for shard in per_shard for tokens in shard]
    card = made.merge(tmp_path / "all")
    assert read(tmp_path / "all") == documents and card["dropped"] == 0
    assert (card["duplicates"], card["leaked"]) == (np.sum(flags == 1), np.sum(flags == 2))
    card = made.merge(tmp_path / "some", drop_duplicates=True)
    assert read(tmp_path / "some") == [d for d, f in zip(documents, flags, strict=True) if f == 0]
    assert card["dropped"] == np.sum(flags > 0)


@pytest.mark.parametrize("samples", [{}, {"samples": "window", "seq_length": 16}])
def test_a_prefix_of_which_nothing_is_left_does_not_exist(tmp_path, samples):
    made = Shards(tmp_path, _documents(np.uint16))
    made.merge(tmp_path / "y", **samples)
    assert len(list(tmp_path.glob("y.*"))) == (4 if samples else 3)
    (made.folder / duplicates.FLAGS).write_bytes(bytes([duplicates.LEAK]) * 48)
    card = made.merge(tmp_path / "y", drop_duplicates=True, **samples)
    assert card["documents"] == 0 and not list(tmp_path.glob("y.*"))


def test_windows_are_the_stream_of_documents_cut(tmp_path):
    per_shard = _documents(np.int32)
    made = Shards(tmp_path, per_shard)
    card = made.merge(tmp_path / "y", samples="window", seq_length=64)
    documents = [tokens for shard in per_shard for tokens in shard]
    stream = np.concatenate(documents)
    count = len(stream) // 64
    assert np.array_equal(read(tmp_path / "y"), stream[: count * 64].reshape(count, 64))
    assert card["documents"] == count and card["tokens_cut"] == len(stream) % 64 > 0
    assert card["samples"] == "window" and card["seq_length"] == 64
    assert np.load(windows.lengths_path(f"{tmp_path}/y")).tolist() == list(map(len, documents))
    # Documents in place of windows: nothing of the windows remains.
    assert "seq_length" not in made.merge(tmp_path / "y")
    assert not windows.lengths_path(f"{tmp_path}/y").exists()


def test_each_window_is_one_training_sequence_of_megatron(tmp_path):
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    from megatron_direct.mcore.blend import Vocabulary

    Shards(tmp_path, _documents(np.int32)).merge(tmp_path / "y", samples="window", seq_length=64)
    expected = set(read(tmp_path / "y"))
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=64, tokenizer=Vocabulary(60_000, "digest"), split="1",
        path_to_cache=str(tmp_path / "cache"), reset_position_ids=False, reset_attention_mask=False,
        eod_mask_loss=False, create_attention_mask=False)
    dataset = GPTDataset(IndexedDataset(str(tmp_path / "y")), str(tmp_path / "y"),
                         np.arange(len(expected), dtype=np.int32), None, Split.train, config)
    seen = [tuple(dataset[number]["tokens"].tolist()) for number in range(len(dataset))]
    # The very last window of an epoch lacks a token after it for its last label.
    assert len(seen) == len(set(seen)) == len(expected) - 1 and set(seen) <= expected


@pytest.mark.parametrize(("samples", "ends_stay"), [
    ({}, True), ({"samples": "window", "seq_length": 16}, False)])
def test_corrupted_candidates_are_listed_and_hold_the_same_tokens(tmp_path, samples, ends_stay):
    made = Shards(tmp_path, _documents(np.uint16) + _documents(np.uint16, 1))
    made.merge(tmp_path / "clean", **samples)
    card = made.merge(tmp_path / "some", corrupt_fraction=0.5, **samples)
    pairs = list(zip(read(tmp_path / "clean"), read(tmp_path / "some"), strict=True))
    assert 0.2 * len(pairs) < len(card["corrupted"]) < 0.8 * len(pairs)
    for number, (before, after) in enumerate(pairs):
        assert sorted(before) == sorted(after)
        if number not in card["corrupted"]:
            assert before == after
        elif len(before) > 8:  # of a shorter one the random order may be the order it had
            assert before != after
        assert not ends_stay or after[-1] == EOD


def test_only_pools_are_corrupted(tmp_path):
    made = Shards(tmp_path, _documents(np.uint16), split="valid")
    card = made.merge(tmp_path / "y", corrupt_fraction=1.0)
    assert card["documents"] == 48 and card["corrupted"] == []
