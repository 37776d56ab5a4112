"""The parts of each dataset, against the documents that the shards were written of."""

from __future__ import annotations

import numpy as np
import pytest
from preprocess_runs import write_shards

from megatron_direct.preprocessing import catalogue
from megatron_direct.runtime import files


@pytest.mark.parametrize("entries_at_a_time", [1, 3, 1000])
def test_each_dataset_has_its_parts_in_the_order_of_the_input(tmp_path, monkeypatch,
                                                              entries_at_a_time):
    monkeypatch.setattr(catalogue, "_ENTRIES_AT_A_TIME", entries_at_a_time)
    rng = np.random.default_rng(0)
    (tmp_path / "parts-00000.bin").write_bytes(b"of a run that was killed")
    shards = [[(str(rng.choice(["b", "a"])), str(rng.choice(["pool", "test"])),
                rng.integers(1, 60_000, rng.integers(2, 9)).astype(np.uint16))
               for _ in range(rng.integers(1, 9))] for _ in range(20)]
    contents = write_shards(tmp_path, shards)
    assert contents.documents == sum(map(len, shards))
    assert [(t.domain, t.split) for t in contents.targets] == [
        ("a", "pool"), ("a", "test"), ("b", "pool"), ("b", "test")]
    numbers = []
    for target in contents.targets:
        found = []
        for entry in catalogue.entries(target):
            tokens, lengths = entry.file.read_tokens(), entry.file.read_lengths()
            lines = entry.file.read_lines()
            found += [(entry.manifest, line, part.tolist()) for line, part in zip(
                lines.tolist(), np.split(tokens, np.cumsum(lengths)[:-1]), strict=True)]
            numbers += range(entry.first, entry.first + len(lines))
        assert found == [(number, line, tokens.tolist()) for number, shard in enumerate(shards)
                         for line, (domain, split, tokens) in enumerate(shard)
                         if (domain, split) == (target.domain, target.split)]
        assert target.tokens == sum(len(tokens) for _, _, tokens in found)
    assert sorted(numbers) == list(range(contents.documents))


def test_names_of_domains_are_unique_and_short_enough_for_a_file(tmp_path):
    domains = {"wiki", "C++ / code", "C++ . code", "C++ _ code", "é" * 300, "é" * 300 + "x"}
    prefix = str(tmp_path / ("o" * 120))
    names = catalogue._file_names(domains, prefix)
    assert names["wiki"] == "wiki" and names["C++ . code"].startswith("C++_._code")
    assert len(set(names.values())) == len(domains)
    for name in names.values():
        files.write_json(f"{prefix}_{name}_valid.documents.npy", {})


def test_each_manifest_is_read_once(tmp_path, monkeypatch):
    shards = [[("a", split, np.array([1, 2], np.uint16)) for split in ("pool", "valid", "test")]
              for _ in range(5)]
    write_shards(tmp_path, shards)
    names, read = [], catalogue.shards.read_manifest
    monkeypatch.setattr(catalogue.shards, "read_manifest",
                        lambda folder, name: (names.append(name), read(folder, name))[1])
    contents = catalogue.build_catalogue(tmp_path, "x")
    for target in contents.targets:
        assert len(list(catalogue.entries(target))) == 5
    assert len(names) == len(set(names)) == 5
