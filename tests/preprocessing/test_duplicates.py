"""Copies and leaks against a dictionary that is filled in the order of precedence."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from indexed_files import write_dataset
from preprocess_runs import write_shards

from megatron_direct.errors import UserError
from megatron_direct.preprocessing import catalogue, duplicates, shards, windows
from megatron_direct.preprocessing.catalogue import Catalogue
from megatron_direct.preprocessing.excluded import ExcludedDataset

EOD = 0
ENDS = frozenset({EOD})
PRECEDENCE = {"excluded": 0, "test": 1, "valid": 2, "pool": 3}


def _flags(folder: Path, contents: Catalogue) -> dict[int, int]:
    """Line of the input -> flag."""
    flags = np.fromfile(folder / duplicates.FLAGS, np.uint8)
    before = [lines for _, lines in shards.with_lines_before(folder)]
    return {before[entry.manifest] + line: int(flags[entry.first + number])
            for target in contents.targets for entry in catalogue.entries(target)
            for number, line in enumerate(entry.file.read_lines().tolist())}


def _in_shards(documents: list[tuple], per_shard: int) -> list[list[tuple]]:
    arrays = [(domain, split, np.array(tokens, np.uint16)) for domain, split, tokens in documents]
    return [arrays[start: start + per_shard] for start in range(0, len(arrays), per_shard)]


def _expected(documents: list[tuple], excluded: list[list[int]]) -> dict[int, int]:
    ranked = [(0, -1, "excluded", tuple(tokens)) for tokens in excluded]
    ranked += [(PRECEDENCE[split], line, split, tuple(tokens))
               for line, (_, split, tokens) in enumerate(documents)]
    seen, flags = {}, {}
    for _, line, split, tokens in sorted(ranked):
        kept = seen.setdefault(tokens, (split, line))
        flags[line] = (duplicates.UNIQUE if kept == (split, line) else
                       duplicates.COPY if kept[0] == split else duplicates.LEAK)
    flags.pop(-1, None)
    return flags


@pytest.mark.parametrize("per_shard", [1, 7, 1000])
@pytest.mark.parametrize("records_at_a_time", [16, 1 << 20])
def test_against_a_dictionary(tmp_path, monkeypatch, per_shard, records_at_a_time):
    monkeypatch.setattr(duplicates, "_RECORDS_AT_A_TIME", records_at_a_time)
    rng = np.random.default_rng(per_shard)
    # 300 documents out of 2 + 4 + ... + 64 possible ones: many copies, within and across splits.
    documents = [(str(rng.choice(["a", "b"])), str(rng.choice(["pool", "pool", "valid", "test"])),
                  [*rng.integers(1, 3, rng.integers(1, 8)).tolist(), EOD]) for _ in range(300)]
    excluded = [[*rng.integers(1, 3, 6).tolist(), EOD] for _ in range(10)]
    prefix = write_dataset(tmp_path / "excluded", [[tokens] for tokens in excluded])
    contents = write_shards(tmp_path, _in_shards(documents, per_shard), EOD)
    datasets = [ExcludedDataset(prefix, "digest", ENDS)]
    found = duplicates.find(tmp_path, contents, datasets)
    expected = _expected(documents, excluded)
    assert _flags(tmp_path, contents) == expected
    counts = np.bincount(list(expected.values()), minlength=3)
    assert (found.copies, found.leaks) == (counts[duplicates.COPY], counts[duplicates.LEAK])
    assert min(counts) > 10
    with pytest.raises(UserError, match=f"^{found.leaks} documents are also in") as error:
        duplicates.refuse_leaks(tmp_path, found, datasets)
    named = [int(line.split()[0].split(":")[1]) - 1
             for line in str(error.value).splitlines() if line.startswith("  in.jsonl")]
    leaks = sorted(line for line, flag in expected.items() if flag == duplicates.LEAK)
    assert named == leaks[:5]


POOL = [("a", "pool", [*tokens, EOD]) for tokens in ([5, 6], [5, 6, 9], [5, 6, 7], [8], [5])]


def _leaked(folder: Path, prefix: str) -> list[list[int]]:
    """The documents of POOL that are also in the dataset."""
    contents = write_shards(folder / "shards", _in_shards(POOL, 2), EOD)
    duplicates.find(folder / "shards", contents, [ExcludedDataset(prefix, "digest", ENDS)])
    flags = _flags(folder / "shards", contents)
    return [POOL[line][2][:-1] for line in sorted(flags) if flags[line] == duplicates.LEAK]


@pytest.mark.parametrize(("documents", "leaked"), [
    ([[5, 6], [7]], [[5, 6]]),
    ([[5, 6, EOD], [7, EOD]], [[5, 6]]),
    ([[5, 6, EOD, EOD], [EOD], [EOD, 8]], [[5, 6]]),  # an end in front is text
    ([[5, 6, 9], [8, 9]], [[5, 6], [5, 6, 9], [8]]),  # 9 may be text, or what ended the documents
    ([[5, 6, 9], [8, 3]], [[5, 6, 9]]),
    ([[5, 6, 9], [], [8, 9]], [[5, 6], [5, 6, 9], [8]]),
])
def test_the_end_of_a_document_does_not_count(tmp_path, documents, leaked):
    prefix = write_dataset(tmp_path / "excluded", [[tokens] for tokens in documents])
    assert _leaked(tmp_path, prefix) == leaked


@pytest.mark.parametrize(("eod", "leaked"), [(9, [[5, 6], [8]]), (None, [[5, 6, 9]])])
def test_the_card_says_what_ends_the_documents(tmp_path, eod, leaked):
    prefix = write_dataset(tmp_path / "excluded", [[[5, 6, 9]], [[8, 9]]])
    Path(prefix + ".json").write_text(json.dumps(
        {"eod": eod, "tokenizer_digest": "digest", "vocab_size": 99}))
    assert _leaked(tmp_path, prefix) == leaked


def _window_dataset(folder: Path, documents: list[list[int]], length: int, eod: int | None) -> str:
    stream = sum(documents, [])
    whole = len(stream) // length * length
    prefix = write_dataset(folder / "excluded", [
        [stream[start: start + length]] for start in range(0, whole, length)])
    windows.write_lengths(prefix, np.array([len(tokens) for tokens in documents], np.int32))
    Path(prefix + ".json").write_text(json.dumps({
        "samples": "window", "eod": eod, "tokenizer_digest": "digest", "vocab_size": 99,
        "tokens": whole,
        "tokens_cut": len(stream) - whole}))
    return prefix


@pytest.mark.parametrize(("documents", "length", "eod", "leaked"), [
    ([[5, 6, 9], [5, EOD, 6, 9], [8, 9], [7, 7, 9]], 3, 9, [[5, 6], [8]]),
    ([[5, 6], [5, EOD, 6], [8], [7, 7]], 3, None, [[5, 6], [8]]),
    ([[5, 6, EOD], [8, 9, EOD], [5, EOD]], 7, EOD, [[5, 6], [5]]),  # lost its end alone
    ([[5, 6, EOD], [8, 9, EOD], [5, 6, 7, EOD]], 4, EOD, [[5, 6]]),  # lost text
])
def test_windows_are_read_as_the_documents_they_were_cut_from(tmp_path, documents, length, eod,
                                                              leaked):
    assert _leaked(tmp_path, _window_dataset(tmp_path, documents, length, eod)) == leaked


def test_windows_without_their_documents_are_refused(tmp_path):
    prefix = _window_dataset(tmp_path, [[5, 6, EOD], [7, EOD]], 2, EOD)
    windows.write_lengths(prefix, np.array([3, 3], np.int32))
    with pytest.raises(UserError, match="documents.npy belongs to another dataset: .* 6 tokens, .*"
                                        "made from 5.*make the dataset again"):
        ExcludedDataset(prefix, "digest", ENDS)
    windows.lengths_path(prefix).write_bytes(b"not numbers")
    with pytest.raises(UserError, match="documents.npy is damaged"):
        ExcludedDataset(prefix, "digest", ENDS)
    windows.lengths_path(prefix).unlink()
    with pytest.raises(UserError, match="holds windows.*documents.npy, which does not exist"):
        ExcludedDataset(prefix, "digest", ENDS)


def test_datasets_of_another_tokenizer_are_refused(tmp_path):
    prefix = write_dataset(tmp_path / "excluded", [[[5, 6]]])
    Path(prefix + ".json").write_text(json.dumps({"tokenizer_digest": "other", "vocab_size": 99}))
    with pytest.raises(UserError, match="excluded of --exclude was made with another tokenizer"):
        ExcludedDataset(prefix, "digest", ENDS)


def test_truncated_datasets_are_refused(tmp_path):
    prefix = write_dataset(tmp_path / "excluded", [[[5, 6]]])
    Path(prefix + ".bin").write_bytes(b"")
    with pytest.raises(UserError, match="excluded.bin is truncated"):
        ExcludedDataset(prefix, "digest", ENDS)
