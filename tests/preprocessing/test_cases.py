"""Input as users have it: what went wrong with tools of this kind, and what is right."""

from __future__ import annotations

import gzip
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from preprocess_runs import read, run

from megatron_direct.data.cards import read_card
from megatron_direct.errors import UserError
from megatron_direct.preprocessing import documents, reading, tokenizer
from megatron_direct.preprocessing.documents import Fields

FERRY = ["The ferry leaves the east pier at dawn.", "The keeper writes the hour in the log."]
QUOTED = ["The lamp at the pier was lit at nine.",
          "The guide quotes <|endoftext|> between two parts of the text.",
          "<|endoftext|> begins this one, and ends it <|endoftext|>",
          "The boats came home before the storm."]


def _write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def model(tmp_path) -> Path:
    """A tokenizer.json with three tokens that may end a document; the last is not a special one."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.train_from_iterator(FERRY + QUOTED, tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    made.add_tokens(["<end>"])
    (tmp_path / "model").mkdir()
    made.save(str(tmp_path / "model" / "tokenizer.json"))
    (tmp_path / "model" / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    return tmp_path / "model"


@pytest.mark.parametrize("has_card", [True, False])
@pytest.mark.parametrize("end", [(), ("--append-eod",),
                                 ("--append-eod", "--eod-token", "<|im_end|>"),
                                 ("--append-eod", "--eod-token", "<end>")])
@pytest.mark.parametrize("pool_end", [(), ("--append-eod",)])
def test_a_held_out_document_is_found_whatever_ends_it(tmp_path, model, end, pool_end, has_card):
    texts = FERRY + QUOTED
    held = _write(tmp_path / "held.jsonl", texts[1:])
    run([held], tmp_path / "v", model, "--split", "0,0,100", *end)
    prefix = f"{tmp_path}/v_held_test"
    if not has_card:  # as of another tool
        Path(prefix + ".json").unlink()
    pool = _write(tmp_path / "pool.jsonl", texts)
    with pytest.raises(SystemExit, match=r"5 documents are also in (.|\n)*"
                                         r"pool.jsonl:2 equals document 0 of .*v_held_test\n"):
        run([pool], tmp_path / "x", model, "--exclude", prefix, *pool_end)
    run([pool], tmp_path / "x", model, "--exclude", prefix, "--drop-duplicates", *pool_end)
    assert len(read(tmp_path / "x_pool_pool")) == 1


@pytest.mark.parametrize("end", [(), ("--append-eod",),
                                 ("--append-eod", "--eod-token", "<|im_end|>")])
def test_a_held_out_document_is_found_in_windows_whatever_it_quotes(tmp_path, model, end):
    # A last document that takes what is left of the last window and is not held out itself.
    held = _write(tmp_path / "held.jsonl", [*QUOTED, "Left over at the very end of the windows."])
    run([held], tmp_path / "v", model, "--samples", "window", "--seq-length", "8", *end)
    assert len(read(tmp_path / "v_held_pool")) > 4
    run([_write(tmp_path / "pool.jsonl", [FERRY[0], *QUOTED])], tmp_path / "x", model,
        "--append-eod", "--exclude", f"{tmp_path}/v_held_pool", "--drop-duplicates")
    card = read_card(f"{tmp_path}/x_pool_pool")
    assert (card["documents"], card["leaked"], card["dropped"]) == (1, 4, 4)


@pytest.mark.parametrize("end", [(), ("--append-eod",)])
@pytest.mark.parametrize("length", [*range(2, 24), 90])
def test_a_document_that_the_last_window_cuts_is_held_out(tmp_path, model, end, length):
    """Every document with a token in a window, wherever the last window ends."""
    run([_write(tmp_path / "held.jsonl", QUOTED)], tmp_path / "v", model, "--samples", "window",
        "--seq-length", str(length), *end)
    lengths = np.load(tmp_path / "v_held_pool.documents.npy")
    begins = np.cumsum(lengths) - lengths
    held = int(np.sum(begins < lengths.sum() // length * length))
    run([_write(tmp_path / "pool.jsonl", [FERRY[0], *QUOTED])], tmp_path / "x", model,
        "--exclude", f"{tmp_path}/v_held_pool", "--drop-duplicates")
    assert read_card(f"{tmp_path}/x_pool_pool")["leaked"] == held
    assert (held == len(QUOTED)) or length == 90


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.jsonlines", "a.JsonLines", "a.ndjson",
                                  "a.JSONL.GZ", "a.jsonlines.gz"])
def test_jsonl_is_known_by_its_suffix(text, tmp_path, name):
    content = _write(tmp_path / "records", FERRY).read_bytes()
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.lower().endswith(".gz") else content)
    text.run(tmp_path / "x", inputs=[path])
    assert text.texts(tmp_path / "x_a_pool") == FERRY


@pytest.mark.parametrize("shard_size", ["1", "0.00001"])
def test_a_byte_order_mark_is_not_text(text, tmp_path, shard_size):
    mark = "\ufeff"
    (tmp_path / "a.txt").write_text(f"{mark}{FERRY[0]}\n\n{FERRY[1]}\n\n{FERRY[0]}\n")
    (tmp_path / "joined.txt").write_text(f"{mark}{FERRY[0]}\n\n{mark}{FERRY[1]}\n")
    (tmp_path / "b.jsonl").write_text(mark + _write(tmp_path / "records", FERRY).read_text())
    (tmp_path / "empty.txt").write_text(mark)
    text.run(tmp_path / "x", "--shard-size", shard_size,
             inputs=[tmp_path / name for name in ("a.txt", "joined.txt", "b.jsonl", "empty.txt")])
    assert text.texts(tmp_path / "x_a_pool") == [*FERRY, FERRY[0]]
    assert text.texts(tmp_path / "x_joined_pool") == text.texts(tmp_path / "x_b_pool") == FERRY
    assert not (tmp_path / "x_empty_pool.idx").exists()
    assert read_card(f"{tmp_path}/x_a_pool")["duplicates"] == 1


@pytest.mark.parametrize("flags", [(), ("--group-key", "book"), ("--domain-key", "book")])
def test_half_a_surrogate_pair_is_a_bad_line(text, tmp_path, flags):
    (tmp_path / "a.jsonl").write_text(
        '{"text": "The river rose in spring.", "book": "plain"}\n'
        '{"text": "A second page%s", "book": "half an emoji \\ud83d"}\n'
        '{"text": "A third page", "book": "a whole one \\ud83d\\ude00"}\n'
        % ("" if flags else "\\ud83d"))
    with pytest.raises(SystemExit, match=r"a.jsonl:2 is not a JSON object .*surrogates"):
        text.run(tmp_path / "x", *flags, inputs=[tmp_path / "a.jsonl"])
    text.run(tmp_path / "x", *flags, "--skip-bad-lines", inputs=[tmp_path / "a.jsonl"])
    texts = [t for path in sorted(tmp_path.glob("x_*.idx"), reverse=True)
             for t in text.texts(str(path).removesuffix(".idx"))]
    assert texts == ["The river rose in spring.", "A third page"]
    assert "a.jsonl:2: " in (tmp_path / "x_bad_lines.txt").read_text()


@pytest.mark.parametrize("flag", ["--group-key", "--domain-key"])
@pytest.mark.parametrize("value", ["null", '""', "NaN", None])
def test_records_without_a_group_have_nothing_in_common(text, tmp_path, flag, value):
    book = "" if value is None else f', "book": {value}'
    record = '{"text": "page %d"' + book + "}"
    (tmp_path / "a.jsonl").write_text("\n".join(
        ['{"text": "page 0", "book": "x"}', *(record % n for n in range(1, 20))]))
    with pytest.raises(SystemExit, match=rf"a.jsonl:2 is not .*book.*{flag}.*--skip-bad-lines"):
        text.run(tmp_path / "x", flag, "book", inputs=[tmp_path / "a.jsonl"])
    text.run(tmp_path / "x", flag, "book", "--skip-bad-lines", inputs=[tmp_path / "a.jsonl"])
    assert len((tmp_path / "x_bad_lines.txt").read_text().splitlines()) == 19


def test_rows_without_a_group_have_nothing_in_common(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["a", "b", "c"], "book": [1.0, None, float("nan")]}),
                        tmp_path / "a.parquet")
    shard, = reading.plan([tmp_path / "a.parquet"], 10**6)
    good, *bad = documents.read_documents(shard, Fields(group="book"))
    assert good == documents.Document(0, "a", "1.0", "a")
    assert [line for line, _ in bad] == [1, 2]


def test_rows_that_python_cannot_hold_are_bad_lines(text, tmp_path):
    """A string that is not UTF-8, and a day after the year 9999 as the group."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [b"The tide came in.", b"half of \xff\xfe", b"It went out.", b"Nothing is left."]
    ends = np.cumsum([0, *map(len, texts)]).astype(np.int32)
    strings = pyarrow.StringArray.from_buffers(len(texts), pyarrow.py_buffer(ends.tobytes()),
                                               pyarrow.py_buffer(b"".join(texts)))
    days = pyarrow.array([1, 2, 3, 2**31 - 1], pyarrow.int32()).view(pyarrow.date32())
    parquet.write_table(pyarrow.table({"text": strings, "day": days}), tmp_path / "a.parquet")
    flags = ("--group-key", "day")
    with pytest.raises(SystemExit, match="a.parquet:2 is not a row .*utf-8"):
        text.run(tmp_path / "x", *flags, inputs=[tmp_path / "a.parquet"])
    text.run(tmp_path / "x", *flags, "--skip-bad-lines", inputs=[tmp_path / "a.parquet"])
    assert text.texts(tmp_path / "x_a_pool") == ["The tide came in.", "It went out."]
    assert [line.split(": ")[0].rpartition(":")[2] for line in
            (tmp_path / "x_bad_lines.txt").read_text().splitlines()] == ["2", "4"]


def test_a_vocabulary_that_the_text_does_not_give(tmp_path):
    """The largest and the smallest size that the messages name are indeed those that fit."""
    small = _write(tmp_path / "small.jsonl", [
        f"On day {n} the boats {'left' if n % 2 else 'came'} with {3 * n} crates of salt."
        for n in range(60)])
    model = tmp_path / "tokenizer.model"

    def train(size: int) -> str:
        try:
            run([small], tmp_path / "x", model, "--train-tokenizer", "--vocab-size", str(size))
        except SystemExit as error:
            return str(error)
        return ""

    largest = int(re.search(r"--vocab-size 8192 is too large: .* Give --vocab-size (\d+) or less",
                            train(8192))[1])
    assert f"--vocab-size {largest + 1} is too large" in train(largest + 1)
    smallest = int(re.search(r"--vocab-size 100 is too small: .* take (\d+) entries",
                             train(100))[1])
    assert f"--vocab-size {smallest - 1} is too small" in train(smallest - 1)
    assert not model.exists()
    for size in (smallest, largest):
        assert train(size) == ""
        assert tokenizer.load_tokenizer(model, None, False).vocab_size == size
        model.unlink()


@pytest.mark.parametrize("between", ["\u2585", "\t", "\0", "\u2581", " zebra" * 2**18])
def test_no_text_is_left_out_of_training(tmp_path, between):
    """The word stands only in documents with a character that SentencePiece keeps for itself, or
    in such as are longer than it takes."""
    plain = ["plain words of a text"] * 9
    with_word = [*plain, *[f"zebra{between}zebra zebra"] * (40 if len(between) == 1 else 2)]

    def pieces_of_word(texts: list[str]) -> int:
        tokenizer.train_model(tmp_path / "tokenizer.model", iter(texts), 280)
        found = tokenizer.load_tokenizer(tmp_path / "tokenizer.model", None, append_eod=False)
        return len(found.encode([" zebra"])[0])

    assert pieces_of_word(with_word) < pieces_of_word(plain)


def test_bad_input_of_training_is_named(text, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{')
    flags = ["--tokenizer-model", str(tmp_path / "t.model"), "--train-tokenizer"]
    with pytest.raises(SystemExit, match="a.jsonl:2 is not a JSON object"):
        text.run(tmp_path / "x", *flags, inputs=[tmp_path / "a.jsonl"])
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n')
    with pytest.raises(SystemExit, match="found no pool document.*--split"):
        text.run(tmp_path / "x", *flags, "--split", "0,1,0", inputs=[tmp_path / "a.jsonl"])


class _Counting(io.FileIO):
    """A file that counts what is read of it."""

    total = 0

    def readinto(self, buffer):
        count = super().readinto(buffer)
        _Counting.total += count
        return count


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_a_file_that_is_one_document_is_read_in_linear_time(tmp_path, monkeypatch, kind):
    size, shard_bytes = 1 << 20, 1 << 12
    body = b"not a line end " * (size // 15)
    if kind == "txt":  # lines, but no empty one
        body = b"x".join([body[start: start + 79] + b"\n" for start in range(0, size, 79)])
    (tmp_path / f"a.{kind}").write_bytes(
        b'{"text": "' + body + b'"}\n' if kind == "jsonl" else body)
    monkeypatch.setattr(_Counting, "total", 0)
    monkeypatch.setattr(reading, "opened", lambda path: io.BufferedReader(_Counting(path)))
    shards = reading.plan([tmp_path / f"a.{kind}"], shard_bytes)
    found = [item for shard in shards for item in documents.read_documents(shard, Fields())]
    assert len(shards) > 250 and len(found) == 1
    # Its own shard and the owner of the document read each byte, the owner twice: to find the end,
    # then the text; and a buffer (of 8 KiB or more) is read for each shard.
    assert _Counting.total < 3 * size + len(shards) * io.DEFAULT_BUFFER_SIZE * 4


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("shard_bytes", [64, 1000, 10**6])
@pytest.mark.parametrize(("kind", "remedy"), [("text", "Put empty lines"), ("jsonl", "Write one")])
def test_documents_that_are_too_long_are_named(tmp_path, monkeypatch, kind, remedy, shard_bytes,
                                               suffix):
    monkeypatch.setitem(reading.LONGEST, kind, 2000)
    name = "a.txt" if kind == "text" else "a.jsonl"

    def read_all(length: int) -> list[str]:
        good = [f"short {n}" for n in range(5)]
        long = "\n".join(["x" * 49] * (length // 50)) if kind == "text" else "x" * (length - 13)
        texts = [*good, long, *good]
        content = "\n\n".join(texts) if kind == "text" else "\n".join(
            json.dumps({"text": text}) for text in texts)
        path = tmp_path / (name + suffix)
        path.write_bytes(gzip.compress(content.encode()) if suffix else content.encode())
        return [item.text for unit in reading.plan([path], shard_bytes)
                for shard in reading.shards_of(unit, shard_bytes)
                for item in documents.read_documents(shard, Fields())]

    assert len(read_all(2000)) == 11
    match = rf"{name}{suffix}:(\d+) .* longer than .*{remedy}"
    with pytest.raises(UserError, match=match) as error:
        read_all(2100)
    line = int(re.search(r":(\d+) ", str(error.value))[1])
    assert line == 6 if kind == "jsonl" else 11 <= line <= 11 + 42


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_every_cut_gives_the_same_documents(tmp_path, kind, seed):
    """Against the file read as one shard: line ends and white space in all combinations."""
    rng = np.random.default_rng(seed)
    pieces = rng.choice(["a", "bc", "\n", "\n", "\n", " ", "\r\n", "\t", "\n\n"], 200)
    content = "".join(pieces)
    if kind == "jsonl":
        content = "\n".join(f'{{"text": {json.dumps(part)}}}' if part.strip() else part
                            for part in content.split("\n"))
    path = tmp_path / f"a.{kind}"
    path.write_bytes(content.encode())

    def read_all(shard_bytes):
        return [(reading.lines_before(shard) + item.line, item.text)
                for shard in reading.plan([path], shard_bytes)
                for item in documents.read_documents(shard, Fields())]

    whole = read_all(10**6)
    assert len(whole) > 10
    lines = content.encode().split(b"\n")
    for line, text in whole:
        assert lines[line].rstrip(b"\r").decode() == text.split("\n")[0] or kind == "jsonl"
    for shard_bytes in range(1, 20):
        assert read_all(shard_bytes) == whole
        assert sum(map(reading.num_lines, reading.plan([path], shard_bytes))) == \
            content.count("\n") + (not content.endswith("\n"))
