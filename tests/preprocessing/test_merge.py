"""Merged shards against Megatron's own builder, and windows against its own GPTDataset."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_direct.data import indexed
from megatron_direct.preprocessing import duplicates, merge

EOD = 0


def _write_shards(folder: Path, per_shard: list[list[np.ndarray]], split: str = "pool") -> None:
    folder.mkdir(exist_ok=True)
    for number, documents in enumerate(per_shard):
        name = f"000000-{number:07d}"
        with open(folder / f"{name}.bin", "wb") as file:
            for tokens in documents:
                file.write(tokens)
            file.write(np.array([len(tokens) for tokens in documents], np.int32))
            file.write(np.arange(len(documents), dtype=np.uint32))
            file.write(bytes(16 * len(documents)))
        part = {"domain": "d", "split": split, "documents": len(documents),
                "tokens": sum(map(len, documents)), "offset": 0}
        (folder / f"{name}.json").write_text(json.dumps({
            "path": "in.jsonl", "file": 0, "lines": len(documents), "is_last": False, "bad": [],
            "too_short": 0, "dtype": documents[0].dtype.name, "parts": [part]}))
    (folder / duplicates.FLAGS).write_bytes(bytes(sum(map(len, per_shard))))


def _merge(folder: Path, prefix: Path, split: str = "pool", **changed) -> dict:
    settings = {"folder": folder, "drop_duplicates": False, "seq_length": None, "seed": 1,
                "corrupt_fraction": 0.0, "eod": EOD, "card": {}}
    merge.start(merge.Settings(**settings | changed))
    return merge.merge(merge.Target(str(prefix), "d", split))[1]


def _documents(dtype, seed: int = 0) -> list[list[np.ndarray]]:
    """Three shards of documents of 2 to 40 tokens; the last token of each is the end."""
    rng = np.random.default_rng(seed)
    return [[np.append(rng.integers(1, 60_000, rng.integers(1, 40)), EOD).astype(dtype)
             for _ in range(count)] for count in (30, 1, 17)]


def _read(prefix: Path) -> list[list[int]]:
    dataset = indexed.open_indexed(str(prefix))
    return [indexed.document_tokens(dataset, d).tolist()
            for d in range(indexed.num_documents(dataset))]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_the_bytes_are_those_of_megatrons_builder(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(merge, "_ENTRIES_AT_A_TIME", 10)  # of 48, so that blocks meet
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

    _write_shards(tmp_path / "shards", per_shard)
    card = _merge(tmp_path / "shards", tmp_path / "ours")
    assert card["documents"] == 48 and card["tokens"] == sum(len(t) for s in per_shard for t in s)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == \
            (tmp_path / f"theirs{suffix}").read_bytes()


def test_flagged_documents_are_dropped_on_request(tmp_path):
    per_shard = _documents(np.uint16)
    _write_shards(tmp_path / "shards", per_shard)
    flags = np.random.default_rng(0).integers(0, 3, 48).astype(np.uint8)
    flags.tofile(tmp_path / "shards" / duplicates.FLAGS)
    documents = [tokens.tolist() for shard in per_shard for tokens in shard]
    card = _merge(tmp_path / "shards", tmp_path / "all")
    assert _read(tmp_path / "all") == documents and card["dropped"] == 0
    assert (card["duplicates"], card["leaked"]) == (np.sum(flags == 1), np.sum(flags == 2))
    card = _merge(tmp_path / "shards", tmp_path / "some", drop_duplicates=True)
    assert _read(tmp_path / "some") == [d for d, f in zip(documents, flags, strict=True) if f == 0]
    assert card["dropped"] == np.sum(flags > 0)


def test_a_prefix_that_nothing_is_left_of_is_not_there(tmp_path):
    _write_shards(tmp_path / "shards", _documents(np.uint16))
    _merge(tmp_path / "shards", tmp_path / "x")
    (tmp_path / "shards" / duplicates.FLAGS).write_bytes(bytes([duplicates.LEAK]) * 48)
    card = _merge(tmp_path / "shards", tmp_path / "x", drop_duplicates=True)
    assert card["documents"] == 0 and not list(tmp_path.glob("x.*"))


def test_windows_are_the_stream_of_documents_cut(tmp_path):
    per_shard = _documents(np.int32)
    _write_shards(tmp_path / "shards", per_shard)
    card = _merge(tmp_path / "shards", tmp_path / "x", seq_length=64)
    stream = np.concatenate([tokens for shard in per_shard for tokens in shard])
    count = len(stream) // 64
    assert _read(tmp_path / "x") == stream[: count * 64].reshape(count, 64).tolist()
    assert card["documents"] == count and card["tokens_cut"] == len(stream) % 64 > 0
    assert card["samples"] == "window" and card["seq_length"] == 64


def test_each_window_is_one_training_sequence_of_megatron(tmp_path):
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    from megatron_direct.mcore.blend import Vocabulary

    _write_shards(tmp_path / "shards", _documents(np.int32))
    _merge(tmp_path / "shards", tmp_path / "x", seq_length=64)
    windows = {tuple(window) for window in _read(tmp_path / "x")}
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=64, tokenizer=Vocabulary(60_000, "digest"), split="1",
        path_to_cache=str(tmp_path / "cache"), reset_position_ids=False, reset_attention_mask=False,
        eod_mask_loss=False, create_attention_mask=False)
    dataset = GPTDataset(indexed.open_indexed(str(tmp_path / "x")), str(tmp_path / "x"),
                         np.arange(len(windows), dtype=np.int32), None, Split.train, config)
    seen = [tuple(dataset[number]["tokens"].tolist()) for number in range(len(dataset))]
    # The very last window of an epoch has no token behind it for its last label.
    assert len(seen) == len(set(seen)) == len(windows) - 1 and set(seen) <= windows


@pytest.mark.parametrize(("seq_length", "ends_stay"), [(None, True), (16, False)])
def test_corrupted_candidates_are_listed_and_hold_the_same_tokens(tmp_path, seq_length, ends_stay):
    _write_shards(tmp_path / "shards", _documents(np.uint16) + _documents(np.uint16, 1))
    _merge(tmp_path / "shards", tmp_path / "clean", seq_length=seq_length)
    card = _merge(tmp_path / "shards", tmp_path / "some", seq_length=seq_length,
                  corrupt_fraction=0.5)
    pairs = list(zip(_read(tmp_path / "clean"), _read(tmp_path / "some"), strict=True))
    assert 0.2 * len(pairs) < len(card["corrupted"]) < 0.8 * len(pairs)
    for number, (before, after) in enumerate(pairs):
        assert sorted(before) == sorted(after)
        if number not in card["corrupted"]:
            assert before == after
        elif len(before) > 8:  # of a shorter one the random order may be the order it had
            assert before != after
        assert not ends_stay or after[-1] == EOD


def test_only_pools_are_corrupted(tmp_path):
    _write_shards(tmp_path / "shards", _documents(np.uint16), split="valid")
    card = _merge(tmp_path / "shards", tmp_path / "x", split="valid", corrupt_fraction=1.0)
    assert card["documents"] == 48 and card["corrupted"] == []
