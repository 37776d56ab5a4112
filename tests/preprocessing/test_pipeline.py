"""Text into indexed datasets, by the command: what they hold."""

from __future__ import annotations

import json

import pytest
from preprocess_runs import read

from megatron_direct.data.cards import read_card
from megatron_direct.data.sources import read_sources, source_number

SPLITS = ("pool", "valid", "test")


def test_text_comes_back_from_the_tokens(text, tmp_path):
    text.run(tmp_path / "x")
    documents = read(tmp_path / "x_notes_pool")
    assert text.texts(tmp_path / "x_notes_pool") == [r["text"] for r in text.records]
    assert {d[-1] for d in documents} == {text.tokenizer.eos_id()}
    card = read_card(f"{tmp_path}/x_notes_pool")
    assert card["documents"] == 300 and card["tokens"] == sum(map(len, documents))
    assert card["vocab_size"] == text.tokenizer.vocab_size()
    assert card["eod"] == text.tokenizer.eos_id()
    assert not (tmp_path / "x.shards").exists()


def test_a_hugging_face_tokenizer(text, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    texts = [r["text"] for r in text.records]
    model.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], show_progress=False))
    model.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    text.run(tmp_path / "x", "--tokenizer-model", str(tmp_path), "--workers", "2")
    documents = read(tmp_path / "x_notes_pool")
    assert [model.decode(list(d), skip_special_tokens=False) for d in documents] == [
        t + "<end>" for t in texts]
    assert read_card(f"{tmp_path}/x_notes_pool")["vocab_size"] == model.get_vocab_size()


def test_pool_valid_and_test_share_no_document_and_no_group(text, tmp_path):
    text.run(tmp_path / "x", "--split", "60,20,20", "--group-key", "file", inputs=[text.notes])
    group_of = {r["text"]: r["file"] for r in text.records}
    groups = {}
    for split in SPLITS:
        groups[split] = {group_of[t] for t in text.texts(tmp_path / f"x_notes_{split}")}
        assert len(groups[split]) > 10
    assert sum(map(len, groups.values())) == 150  # no group in two of them


def test_the_sources_of_documents_are_kept_beside_them(text, tmp_path):
    """The group of each, by a number that depends on its name alone; copies are left out."""
    text.run(tmp_path / "x", "--split", "60,20,20", "--group-key", "file", "--drop-duplicates",
             "--shard-size", "0.004", "--workers", "2", inputs=[text.notes])
    group_of = {r["text"]: r["file"] for r in text.records}
    for split in SPLITS:
        prefix = f"{tmp_path}/x_notes_{split}"
        expected = [source_number(str(group_of[t])) for t in text.texts(prefix)]
        assert read_sources(prefix, len(expected)).tolist() == expected
        assert len(set(expected)) > 10
    for flags in ((), ("--group-key", "file", "--samples", "window", "--seq-length", "16")):
        text.run(tmp_path / "x", "--split", "60,20,20", *flags, inputs=[text.notes])
        assert not (tmp_path / "x_notes_pool.sources.npy").exists()  # it was of other documents


def test_equal_documents_meet_in_one_split(text, tmp_path):
    text.run(tmp_path / "x", "--split", "50,25,25", inputs=[text.plain])
    splits = [set(read(tmp_path / f"x_plain_{s}")) for s in SPLITS]
    assert sum(map(len, splits)) == 60  # of 80 documents 20 are copies
    assert not splits[0] & splits[1] and not splits[0] & splits[2] and not splits[1] & splits[2]


def test_a_dotted_domain_key_divides_the_records(text, tmp_path):
    text.run(tmp_path / "x", "--domain-key", "meta.set", inputs=[text.notes])
    for name, domain in (("Web", "Web"), ("C++___code", "C++ / code")):
        prefix = f"{tmp_path}/x_{name}_pool"
        assert read_card(prefix)["domain"] == domain
        assert text.texts(prefix) == [r["text"] for r in text.records
                                      if r["meta"]["set"] == domain]


def test_files_of_one_domain_follow_one_another(text, tmp_path):
    text.run(tmp_path / "x", "--domain", "all")
    assert text.texts(tmp_path / "x_all_pool")[:300] == [r["text"] for r in text.records]
    assert read_card(f"{tmp_path}/x_all_pool")["documents"] == 380


def test_windows_hold_the_tokens_of_the_documents(text, tmp_path):
    text.run(tmp_path / "x")
    text.run(tmp_path / "y", "--samples", "window", "--seq-length", "32")
    windows = read(tmp_path / "y_notes_pool")
    assert {len(window) for window in windows} == {32}
    tokens = sum(read(tmp_path / "x_notes_pool"), ())
    assert sum(windows, ()) == tokens[: len(tokens) // 32 * 32]


def test_bad_lines_are_listed_and_skipped_on_request(text, tmp_path, capsys):
    good = text.notes.read_text().splitlines()
    notes = tmp_path / "notes.jsonl"
    notes.write_text("\n".join([*good[:3], "{", *good[3:], '{"text": 1}']))
    flags = ("--shard-size", "0.001", "--workers", "2")
    with pytest.raises(SystemExit, match=r"notes.jsonl:(4|302) is not a JSON object with the keys "
                                         r"text .*--json-keys.*--skip-bad-lines"):
        text.run(tmp_path / "x", *flags, inputs=[notes])
    text.run(tmp_path / "x", *flags, "--skip-bad-lines", inputs=[notes])
    assert "2 bad lines left out, all listed in" in capsys.readouterr().out
    listed = (tmp_path / "x_bad_lines.txt").read_text().splitlines()
    assert [line.split(": ")[:2] for line in listed] == [
        [f"{notes}:4", "JSONDecodeError"], [f"{notes}:302", "TypeError"]]
    assert text.texts(tmp_path / "x_notes_pool") == [r["text"] for r in text.records]


def test_duplicates_are_counted_and_dropped_on_request(text, tmp_path):
    text.run(tmp_path / "x", inputs=[text.plain])
    card = read_card(f"{tmp_path}/x_plain_pool")
    assert (card["documents"], card["duplicates"], card["dropped"]) == (80, 20, 0)
    text.run(tmp_path / "y", "--drop-duplicates", inputs=[text.plain])
    card = read_card(f"{tmp_path}/y_plain_pool")
    assert (card["documents"], card["duplicates"], card["dropped"]) == (60, 20, 20)
    assert read(tmp_path / "y_plain_pool") == read(tmp_path / "x_plain_pool")[:60]


@pytest.mark.parametrize("samples", [("document",), ("window", "--seq-length", "16")])
def test_held_out_documents_are_refused(text, tmp_path, samples):
    """A validation set made first; then pools that hold some of its documents."""
    held, lines = tmp_path / "held.jsonl", text.notes.read_text().splitlines(keepends=True)
    held.write_text("".join(lines[100:110]))
    text.run(tmp_path / "v", "--split", "0,1,0", "--samples", *samples, inputs=[held])
    flags = ("--exclude", f"{tmp_path}/v_held_valid")
    with pytest.raises(SystemExit, match=r"documents are also in the validation or test set.*\n"
                                         r".*notes.jsonl:101 equals document 0 of .*v_held_valid"):
        text.run(tmp_path / "x", *flags, inputs=[text.notes])
    assert not (tmp_path / "x_notes_pool.idx").exists()
    text.run(tmp_path / "x", *flags, "--drop-duplicates", inputs=[text.notes])
    left, texts = text.texts(tmp_path / "x_notes_pool"), [r["text"] for r in text.records]
    assert left == texts[:100] + texts[110:]  # also the one that the last window cuts


def test_a_held_out_document_of_another_group_is_refused(text, tmp_path):
    same = tmp_path / "same.jsonl"
    same.write_text("".join(json.dumps({"text": "the same words in every one", "file": str(n)})
                            + "\n" for n in range(20)))
    flags = ("--split", "50,25,25", "--group-key", "file")
    with pytest.raises(SystemExit, match=r"same.jsonl:\d+ equals .*same.jsonl:\d+ \(test\)"):
        text.run(tmp_path / "x", *flags, inputs=[same])
    text.run(tmp_path / "x", *flags, "--drop-duplicates", inputs=[same])
    assert len(read(tmp_path / "x_same_test")) == 1
    assert not (tmp_path / "x_same_pool.idx").exists()


@pytest.mark.parametrize(("name", "content", "match"), [
    ("bad.jsonl", '{"text": "a"}\nnot json\n', r"bad.jsonl:2 is not a JSON object with the keys"),
    ("keys.jsonl", '{"content": "a"}\n', r"keys.jsonl:1 is not a JSON object with the keys text"),
    ("empty.jsonl", "\n", "--input holds no document of two tokens or more"),
    ("nothing.jsonl", "", "--input holds no document of two tokens or more"),
])
def test_bad_files_are_named(text, tmp_path, name, content, match):
    (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit, match=match):
        text.run(tmp_path / "x", inputs=[tmp_path / name])
    assert not list(tmp_path.glob("x_*"))


@pytest.mark.parametrize(("flags", "match"), [
    (["--input", "gone.jsonl"], "gone.jsonl does not exist"),
    (["--exclude", "gone"], "gone.idx does not exist"),
    (["--eod-token", "<gone>"], "has no <gone>, which --append-eod needs"),
    (["--tokenizer-model", "no.model"], "no.model does not exist. .* --train-tokenizer"),
])
def test_files_and_tokens_that_are_missing_are_named(text, tmp_path, flags, match):
    with pytest.raises(SystemExit, match=match):
        text.run(tmp_path / "x", *flags, inputs=[text.notes])
    text.run(tmp_path / "x", "--seed", "7", inputs=[text.notes])  # no unfinished run is in the way


def _records_of(folder, domains):
    notes = folder / "in.jsonl"
    notes.write_text("".join(json.dumps({"text": f"one text {n}", "set": domain}) + "\n"
                             for n, domain in enumerate(domains)))
    return notes


def test_domains_of_any_name_are_written_apart(text, tmp_path):
    domains = ["a b", "a/b", "short", "x" * 300, "x" * 300 + "y"]
    text.run(tmp_path / "x", "--domain-key", "set", inputs=[_records_of(tmp_path, domains)])
    cards = [read_card(str(path).removesuffix(".idx")) for path in tmp_path.glob("x_*.idx")]
    assert sorted(card["domain"] for card in cards) == sorted(domains)
    assert all(card["documents"] == 1 for card in cards)


def test_too_many_domains_are_refused(text, tmp_path):
    domains = [str(number) for number in range(1001)]
    with pytest.raises(SystemExit, match="--domain-key gives more than 1000 domains"):
        text.run(tmp_path / "x", "--domain-key", "set", inputs=[_records_of(tmp_path, domains)])
