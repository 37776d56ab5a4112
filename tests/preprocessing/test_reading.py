"""Shards of a file: every document once, in order, wherever the cuts fall."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from megatron_direct.errors import UserError
from megatron_direct.preprocessing import documents, formats, reading
from megatron_direct.preprocessing.documents import BadLine, Document, Fields

RNG = np.random.default_rng(0)
# Lines of 0 to 60 characters, of one to three bytes each; U+2028 ends a line for str.splitlines.
ALPHABET = list("ab é\u2028漢\r")
TEXTS = ["x" + "".join(RNG.choice(ALPHABET, RNG.integers(0, 60))) + "x" for _ in range(80)]
RECORDS = [json.dumps({"text": text, "meta": {"set": f"s{n % 3}"}}, ensure_ascii=n % 2 == 0)
           for n, text in enumerate(TEXTS)]
PARAGRAPHS = [f"{text}\nsecond line" if n % 2 else text for n, text in enumerate(TEXTS)]


def _write(path: Path, content: bytes) -> Path:
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        # Two frames, as parallel compressors write them.
        half = len(content) // 2
        content = b"".join(zstandard.compress(part) for part in (content[:half], content[half:]))
    path.write_bytes(content)
    return path


def _read(paths: list[Path], shard_bytes: int, fields: Fields) -> list[tuple]:
    """(path, line of the file, document) of all shards."""
    return [(shard.path.name, reading.lines_before(shard) + item.line, item)
            for unit in reading.plan(paths, shard_bytes)
            for shard in reading.shards_of(unit, shard_bytes)
            for item in documents.read_documents(shard, fields)]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("shard_bytes", [1, 37, 256, 10**6])
def test_records_are_all_there_in_order_with_their_lines(tmp_path, suffix, shard_bytes):
    lines = [*RECORDS[:40], "", "  ", *RECORDS[40:]]  # the last one without a line end
    path = _write(tmp_path / f"a.jsonl{suffix}", "\n".join(lines).encode())
    found = _read([path], shard_bytes, Fields(domain="meta.set"))
    assert [(d.text, d.domain) for _, _, d in found] == [
        (text, f"s{n % 3}") for n, text in enumerate(TEXTS)]
    assert [line for _, line, _ in found] == [*range(40), *range(42, 82)]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("shard_bytes", [1, 37, 256, 10**6])
def test_paragraphs_are_all_there_in_order_with_their_lines(tmp_path, suffix, shard_bytes):
    content = ("\n\n" + "\n \n\n".join(PARAGRAPHS)).encode()
    path = _write(tmp_path / f"a.txt{suffix}", content)
    found = _read([path], shard_bytes, Fields())
    # A carriage return ends a line only in front of a line feed; none of the texts has that.
    assert [d.text for _, _, d in found] == PARAGRAPHS
    lines = content.split(b"\n")
    for _, line, document in found:
        assert lines[line].decode() == document.text.split("\n")[0]


@pytest.mark.parametrize("shard_bytes", [1, 2000, 10**6])
def test_parquet_rows(tmp_path, shard_bytes):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"unread": [b"\0"] * 80, "text": TEXTS,
                           "meta": [{"set": f"s{n % 3}"} for n in range(80)]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    found = _read([tmp_path / "a.parquet"], shard_bytes, Fields(domain="meta.set"))
    assert [(line, d.text, d.domain) for _, line, d in found] == [
        (n, text, f"s{n % 3}") for n, text in enumerate(TEXTS)]


def test_shards_have_about_the_size_asked_for(tmp_path):
    path = _write(tmp_path / "a.jsonl", "\n".join(RECORDS).encode())
    zipped = _write(tmp_path / "b.jsonl.gz", "\n".join(RECORDS).encode())
    longest = max(len(record.encode()) for record in RECORDS) + 1
    for file in (path, zipped):
        sizes = [len(reading.text_of(shard)) for unit in reading.plan([file], 500)
                 for shard in reading.shards_of(unit, 500)]
        assert sum(sizes) == path.stat().st_size
        assert max(sizes) <= 500 + longest


@pytest.mark.parametrize(("name", "line", "reason"), [
    ("a.jsonl", b'{"text": "cut', "JSONDecodeError"),
    ("a.jsonl", b'{"content": "x"}', "KeyError: 'text'"),
    ("a.jsonl", b'{"text": null}', "expected str instance, NoneType found"),
    ("a.jsonl", b'{"text": "\\ud800"}', "surrogates not allowed"),
    ("a.jsonl", b'["text"]', "TypeError"),
    ("a.jsonl", b"7", "TypeError"),
    ("a.jsonl", b'{"text": "\xff"}', "invalid start byte"),
    ("a.jsonl", b"[" * 100_000, "RecursionError"),
    ("a.txt", b"caf\xe9", "invalid continuation byte|unexpected end of data"),
])
def test_bad_lines_do_not_end_the_shard(tmp_path, name, line, reason):
    good = b'{"text": "good"}' if name == "a.jsonl" else b"good"
    path = _write(tmp_path / name, b"\n\n".join([good, line, good]))
    (_, _, first), (_, number, bad), (_, _, last) = _read([path], 10**6, Fields())
    assert isinstance(first, Document) and isinstance(last, Document)
    assert isinstance(bad, BadLine) and number == 2
    with pytest.raises(UserError, match=rf"{name}:3 is not .*({reason}).*--skip-bad-lines"):
        [list(documents.checked(shard, Fields(), False)) for shard in reading.plan([path], 10**6)]


@pytest.mark.parametrize(("record", "key", "value"), [
    ({"a": {"b": {"c": 1}}}, "a.b.c", 1),
    ({"a.b": 2, "a": {"b": 1}}, "a.b", 2),
    ({"a": 3}, "a", 3),
])
def test_dotted_keys(record, key, value):
    assert documents.lookup(record, key) == value


@pytest.mark.parametrize("record", [{}, {"a": {}}, {"a": "text"}, {"a": None}])
def test_dotted_keys_that_are_not_there(record):
    with pytest.raises((KeyError, TypeError)):
        documents.lookup(record, "a.b")


@pytest.mark.parametrize(("name", "stem", "kind"), [
    ("wiki.jsonl", "wiki", "jsonl"), ("wiki.jsonl.zst", "wiki", "jsonl"),
    ("v1.2.txt.gz", "v1.2", "text"), ("code.parquet", "code", "parquet"),
    ("notes", "notes", "text"), ("WIKI.JSONL.ZST", "WIKI", "jsonl"), ("a.Parquet", "a", "parquet"),
    ("a.jsonlines", "a", "jsonl"), ("a.ndjson.gz", "a", "jsonl"),
])
def test_names(name, stem, kind):
    assert formats.stem(Path(name)) == stem and formats.format_of(Path(name)) == kind


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz", "a.jsonl.zst", "a.parquet"])
@pytest.mark.parametrize("damage", ["cut", "noise"])
def test_damaged_files_are_named(tmp_path, name, damage):
    if name == "a.parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / name)
    else:
        _write(tmp_path / name, "\n".join(TEXTS if name == "a.txt.gz" else RECORDS).encode())
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[:-5] if damage == "cut" else b"\0" * 99)
    with pytest.raises(UserError, match=f"{name} is .*(damaged|not a Parquet).*Copy it again"):
        _read([tmp_path / name], 1000, Fields())


@pytest.mark.parametrize("name", ["part-00000", "a.jl.gz"])
def test_records_under_the_name_of_plain_text_are_refused(tmp_path, name):
    _write(tmp_path / name, ("\ufeff" + "\n".join(RECORDS)).encode())
    with pytest.raises(UserError, match=f"{name} would be read as plain text, for its name, but .*"
                                        "Give it a name that ends in .jsonl"):
        _read([tmp_path / name], 1000, Fields())
    _write(tmp_path / name, b"[1] is no record\n{}")
    assert len(_read([tmp_path / name], 1000, Fields())) == 1


def test_a_column_that_is_not_there_is_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"content": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="a.parquet has no column text, but content.*--json-keys"):
        _read([tmp_path / "a.parquet"], 1000, Fields())


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match="gone.jsonl does not exist"):
        reading.plan([tmp_path / "gone.jsonl"], 1000)
