"""Copies and leaks against a dictionary that is filled in the order of precedence."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from indexed_files import write_dataset

from megatron_direct.errors import UserError
from megatron_direct.preprocessing import duplicates, shards
from megatron_direct.preprocessing.excluded import ExcludedDataset

EOD = 0
PRECEDENCE = {"excluded": 0, "test": 1, "valid": 2, "pool": 3}


def _write_shards(folder: Path, documents: list[tuple], per_shard: int) -> None:
    """documents: (domain, split, tokens) in the order of the input, one a line."""
    for number, start in enumerate(range(0, len(documents), per_shard)):
        mine = list(enumerate(documents[start: start + per_shard]))
        name, described = f"000000-{number:07d}", []
        with open(folder / f"{name}.bin", "wb") as file:
            for domain, split in sorted({d[:2] for _, d in mine}):
                of_part = [(line, d[2]) for line, d in mine if d[:2] == (domain, split)]
                tokens = [np.array(t, np.uint16) for _, t in of_part]
                described.append({"domain": domain, "split": split, "documents": len(of_part),
                                  "tokens": sum(map(len, tokens)), "offset": file.tell()})
                file.write(b"".join(t.tobytes() for t in tokens))
                file.write(np.array([len(t) for t in tokens], np.int32))
                file.write(np.array([line for line, _ in of_part], np.uint32))
                file.write(b"".join(shards.document_hash(t.astype(np.int32), EOD) for t in tokens))
        (folder / f"{name}.json").write_text(json.dumps({
            "path": "in.jsonl", "file": 0, "lines": len(mine), "is_last": False, "too_short": 0,
            "bad": [], "dtype": "uint16", "parts": described}))


def _flags(folder: Path) -> dict[int, int]:
    """Line of the input -> flag."""
    flags = np.fromfile(folder / duplicates.FLAGS, np.uint8)
    lines = [before + line for manifest, before in duplicates.with_lines_before(folder)
             for part in manifest.parts for line in part.read_lines().tolist()]
    return dict(zip(lines, flags.tolist(), strict=True))


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
    _write_shards(tmp_path, documents, per_shard)
    datasets = [ExcludedDataset(prefix, "digest", EOD)]
    found = duplicates.find(tmp_path, datasets)
    expected = _expected(documents, excluded)
    assert _flags(tmp_path) == expected
    counts = np.bincount(list(expected.values()), minlength=3)
    assert (found.copies, found.leaks) == (counts[duplicates.COPY], counts[duplicates.LEAK])
    assert min(counts) > 10
    with pytest.raises(UserError, match=f"^{found.leaks} documents also stand in") as error:
        duplicates.refuse_leaks(tmp_path, found, datasets)
    named = [int(line.split()[0].split(":")[1]) - 1
             for line in str(error.value).splitlines() if line.startswith("  in.jsonl")]
    leaks = sorted(line for line, flag in expected.items() if flag == duplicates.LEAK)
    assert named == leaks[:5]


def test_the_end_of_a_document_does_not_count(tmp_path):
    prefix = write_dataset(tmp_path / "excluded", [[[5, 6]], [[7]]])
    _write_shards(tmp_path, [("a", "pool", [5, 6, EOD]), ("a", "pool", [5, 6, 7, EOD])], 10)
    duplicates.find(tmp_path, [ExcludedDataset(prefix, "digest", EOD)])
    assert _flags(tmp_path) == {0: duplicates.LEAK, 1: duplicates.UNIQUE}


def test_windows_are_read_as_the_documents_they_were_cut_from(tmp_path):
    stream = [1, 2, 3, EOD, 4, 5, EOD, 6, 7, 8]  # the last document lost its end
    prefix = write_dataset(tmp_path / "excluded", [[stream[:5]], [stream[5:]]])
    card = {"samples": "window", "eod": EOD, "tokenizer_digest": "digest"}
    Path(prefix + ".json").write_text(json.dumps(card))
    _write_shards(tmp_path, [("a", "pool", [*tokens, EOD]) for tokens in (
        [1, 2, 3], [4, 5], [6, 7, 8], [1, 2, 3, EOD, 4])], 10)
    duplicates.find(tmp_path, [ExcludedDataset(prefix, "digest", EOD)])
    assert list(_flags(tmp_path).values()) == [
        duplicates.LEAK, duplicates.LEAK, duplicates.UNIQUE, duplicates.UNIQUE]


@pytest.mark.parametrize(("card", "match"), [
    ({"tokenizer_digest": "other"}, "excluded of --exclude was made with another tokenizer"),
    ({"samples": "window", "eod": None}, "windows without end-of-document tokens.*--append-eod"),
])
def test_datasets_that_cannot_be_compared_are_refused(tmp_path, card, match):
    prefix = write_dataset(tmp_path / "excluded", [[[5, 6]]])
    Path(prefix + ".json").write_text(json.dumps(card))
    with pytest.raises(UserError, match=match):
        ExcludedDataset(prefix, "digest", EOD)


def test_truncated_datasets_are_refused(tmp_path):
    prefix = write_dataset(tmp_path / "excluded", [[[5, 6]]])
    Path(prefix + ".bin").write_bytes(b"")
    with pytest.raises(UserError, match="excluded.bin is truncated"):
        ExcludedDataset(prefix, "digest", EOD)
