"""Text into indexed datasets."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_direct.data import indexed

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))
import preprocess_selection  # noqa: E402

WORDS = "the onset of annealing is where the learning rate begins to fall towards zero".split()


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Two domains: JSONL records, two to a file of theirs, and plain text with equal documents."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)

    def sentence():
        return " ".join(rng.choice(WORDS, 12)) + "\n    indented"

    with open(folder / "notes.jsonl", "w") as file:
        for number in range(300):
            file.write(json.dumps({"text": sentence(), "file": f"f{number // 2}"}) + "\n")
    plain = [sentence().replace("\n", " ") for _ in range(60)]
    (folder / "plain.txt").write_text("\n\n".join([*plain, *plain[:20], ""]))
    return folder


def _run(text: Path, prefix: Path, *flags: str, inputs=("notes.jsonl", "plain.txt")) -> None:
    model = text / "tokenizer.model"
    if not model.is_file():
        flags = (*flags, "--train-tokenizer", "--vocab-size", "330")
    preprocess_selection.main(["--input", *(str(text / name) for name in inputs),
                               "--output-prefix", str(prefix), "--tokenizer-model", str(model),
                               "--append-eod", *flags])


def _read(prefix: str):
    dataset = indexed.open_indexed(prefix)
    return [tuple(indexed.document_tokens(dataset, d).tolist())
            for d in range(indexed.num_documents(dataset))]


def _tokenizer(text):
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(text / "tokenizer.model"))


def test_text_comes_back_from_the_tokens(text, tmp_path):
    _run(text, tmp_path / "x")
    tokenizer = _tokenizer(text)
    documents = _read(f"{tmp_path}/x_notes_pool")
    records = [json.loads(line) for line in (text / "notes.jsonl").read_text().splitlines()]
    assert [tokenizer.decode(list(d[:-1])) for d in documents] == [r["text"] for r in records]
    assert {d[-1] for d in documents} == {tokenizer.eos_id()}
    card = indexed.read_card(f"{tmp_path}/x_notes_pool")
    assert card["documents"] == 300 and card["tokens"] == sum(map(len, documents))
    assert card["vocab_size"] == tokenizer.vocab_size()


def test_pool_valid_and_test_share_no_document_and_no_group(text, tmp_path):
    _run(text, tmp_path / "x", "--split", "60,20,20", "--group-key", "file",
         inputs=("notes.jsonl",))
    records = [json.loads(line) for line in (text / "notes.jsonl").read_text().splitlines()]
    tokenizer = _tokenizer(text)
    group_of = {r["text"]: r["file"] for r in records}
    groups = {}
    for split in preprocess_selection.SPLITS:
        texts = [tokenizer.decode(list(d[:-1])) for d in _read(f"{tmp_path}/x_notes_{split}")]
        groups[split] = {group_of[t] for t in texts}
        assert len(groups[split]) > 10
    assert sum(map(len, groups.values())) == 150  # no group in two of them


def test_equal_documents_land_in_the_same_split(text, tmp_path):
    _run(text, tmp_path / "x", "--split", "50,25,25", inputs=("plain.txt",))
    splits = [set(_read(f"{tmp_path}/x_plain_{s}")) for s in preprocess_selection.SPLITS]
    assert sum(map(len, splits)) == 60  # of 80 documents 20 are copies
    assert not splits[0] & splits[1] and not splits[0] & splits[2] and not splits[1] & splits[2]


@pytest.mark.parametrize("workers", ["2", "3"])
def test_the_number_of_workers_changes_no_byte(text, tmp_path, workers):
    flags = ("--split", "80,10,10", "--corrupt-fraction", "0.3")
    _run(text, tmp_path / "one", *flags)
    _run(text, tmp_path / "many", *flags, "--workers", workers)
    files = sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("one"))
    assert len(files) == 18
    for name in files:
        assert (tmp_path / name).read_bytes() == \
            (tmp_path / name.replace("one", "many", 1)).read_bytes(), name


def test_corrupted_documents_are_listed_and_hold_the_same_tokens(text, tmp_path):
    _run(text, tmp_path / "clean", inputs=("notes.jsonl",))
    _run(text, tmp_path / "some", "--corrupt-fraction", "0.25", inputs=("notes.jsonl",))
    clean, some = _read(f"{tmp_path}/clean_notes_pool"), _read(f"{tmp_path}/some_notes_pool")
    listed = set(indexed.read_card(f"{tmp_path}/some_notes_pool")["corrupted"])
    # Binomial(300, 0.25) lies in [45, 105] but for a probability of 1e-4.
    assert 45 <= len(listed) <= 105
    for number, (before, after) in enumerate(zip(clean, some, strict=True)):
        assert sorted(before) == sorted(after) and before[-1] == after[-1]
        assert (before != after) == (number in listed)


@pytest.mark.parametrize(("name", "content", "match"), [
    ("bad.jsonl", '{"text": "a"}\nnot json\n', r"bad.jsonl:2 is no JSON object with the keys"),
    ("keys.jsonl", '{"content": "a"}\n', r"keys.jsonl:1 is no JSON object with the keys text"),
])
def test_bad_lines_are_named(text, tmp_path, name, content, match):
    _run(text, tmp_path / "first")
    (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit, match=match):
        preprocess_selection.main(["--input", str(tmp_path / name), "--output-prefix",
                                   str(tmp_path / "x"), "--tokenizer-model",
                                   str(text / "tokenizer.model")])
    assert not (tmp_path / "x_bad_pool.idx").exists()


@pytest.mark.parametrize(("flags", "match"), [
    (["--input", "gone.jsonl"], "gone.jsonl does not exist"),
    (["--input", "a/x.txt", "b/x.txt"], "have one name"),
    (["--input", "x.txt", "--split", "1,2"], "--split 1,2 is not three numbers"),
])
def test_bad_flags_are_told(text, tmp_path, flags, match):
    _run(text, tmp_path / "first")
    with pytest.raises(SystemExit, match=match):
        preprocess_selection.main([*flags, "--output-prefix", str(tmp_path / "x"),
                                   "--tokenizer-model", str(text / "tokenizer.model")])


def test_a_missing_tokenizer_is_told(tmp_path):
    (tmp_path / "x.txt").write_text("some text\n")
    with pytest.raises(SystemExit, match="no.model does not exist. .* --train-tokenizer"):
        preprocess_selection.main(["--input", str(tmp_path / "x.txt"), "--output-prefix",
                                   str(tmp_path / "x"), "--tokenizer-model",
                                   str(tmp_path / "no.model")])
