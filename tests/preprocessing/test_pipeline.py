"""Text into indexed datasets, by the command."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_direct.data import indexed

TOOL = Path(__file__).parents[2] / "tools" / "preprocess_selection.py"
sys.path.insert(0, str(TOOL.parent))
import preprocess_selection  # noqa: E402

WORDS = "the onset of annealing is where the learning rate begins to fall towards zero".split()
SPLITS = ("pool", "valid", "test")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Two domains: JSONL records, two to a file of theirs, and plain text with equal documents."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)

    def sentence():
        return " ".join(rng.choice(WORDS, 12)) + "\n    indented"

    with open(folder / "notes.jsonl", "w") as file:
        for number in range(300):
            file.write(json.dumps({"text": sentence(), "file": f"f{number // 2}",
                                   "meta": {"set": ["Web", "C++ / code"][number % 2]}}) + "\n")
    plain = [sentence().replace("\n", " ") for _ in range(60)]
    (folder / "plain.txt").write_text("\n\n".join([*plain, *plain[:20], ""]))
    preprocess_selection.main([*_flags(folder, folder / "first"), "--train-tokenizer",
                               "--vocab-size", "330"])
    return folder


def _flags(text: Path, prefix: Path, *flags: str, inputs=("notes.jsonl", "plain.txt")) -> list[str]:
    return ["--input", *(str(text / name) for name in inputs), "--output-prefix", str(prefix),
            "--tokenizer-model", str(text / "tokenizer.model"), "--append-eod", *flags]


def _run(text: Path, prefix: Path, *flags: str, **inputs) -> None:
    preprocess_selection.main(_flags(text, prefix, *flags, **inputs))


def _read(prefix: str) -> list[tuple]:
    dataset = indexed.open_indexed(prefix)
    return [tuple(indexed.document_tokens(dataset, d).tolist())
            for d in range(indexed.num_documents(dataset))]


def _tokenizer(text):
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(text / "tokenizer.model"))


def _texts(text: Path, prefix: str) -> list[str]:
    return [_tokenizer(text).decode(list(document[:-1])) for document in _read(prefix)]


def _records(text: Path) -> list[dict]:
    return [json.loads(line) for line in (text / "notes.jsonl").read_text().splitlines()]


def _files(prefix: Path) -> dict[str, bytes]:
    """What stands behind a prefix, by the rest of the name."""
    return {path.name[len(prefix.name):]: path.read_bytes()
            for path in prefix.parent.iterdir() if path.name.startswith(prefix.name + "_")}


def test_text_comes_back_from_the_tokens(text, tmp_path):
    _run(text, tmp_path / "x")
    documents = _read(f"{tmp_path}/x_notes_pool")
    assert _texts(text, f"{tmp_path}/x_notes_pool") == [r["text"] for r in _records(text)]
    assert {d[-1] for d in documents} == {_tokenizer(text).eos_id()}
    card = indexed.read_card(f"{tmp_path}/x_notes_pool")
    assert card["documents"] == 300 and card["tokens"] == sum(map(len, documents))
    assert card["vocab_size"] == _tokenizer(text).vocab_size()
    assert not (tmp_path / "x.shards").exists()


def test_a_hugging_face_tokenizer(text, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    texts = [r["text"] for r in _records(text)]
    model.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], show_progress=False))
    model.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    _run(text, tmp_path / "x", "--tokenizer-model", str(tmp_path), "--workers", "2")
    documents = _read(f"{tmp_path}/x_notes_pool")
    assert [model.decode(list(d), skip_special_tokens=False) for d in documents] == [
        t + "<end>" for t in texts]
    assert indexed.read_card(f"{tmp_path}/x_notes_pool")["vocab_size"] == model.get_vocab_size()


def test_pool_valid_and_test_share_no_document_and_no_group(text, tmp_path):
    _run(text, tmp_path / "x", "--split", "60,20,20", "--group-key", "file",
         inputs=("notes.jsonl",))
    group_of = {r["text"]: r["file"] for r in _records(text)}
    groups = {}
    for split in SPLITS:
        groups[split] = {group_of[t] for t in _texts(text, f"{tmp_path}/x_notes_{split}")}
        assert len(groups[split]) > 10
    assert sum(map(len, groups.values())) == 150  # no group in two of them


def test_equal_documents_land_in_the_same_split(text, tmp_path):
    _run(text, tmp_path / "x", "--split", "50,25,25", inputs=("plain.txt",))
    splits = [set(_read(f"{tmp_path}/x_plain_{s}")) for s in SPLITS]
    assert sum(map(len, splits)) == 60  # of 80 documents 20 are copies
    assert not splits[0] & splits[1] and not splits[0] & splits[2] and not splits[1] & splits[2]


def test_a_dotted_domain_key_divides_the_records(text, tmp_path):
    _run(text, tmp_path / "x", "--domain-key", "meta.set", inputs=("notes.jsonl",))
    for name, domain in (("Web", "Web"), ("C++___code", "C++ / code")):
        prefix = f"{tmp_path}/x_{name}_pool"
        assert indexed.read_card(prefix)["domain"] == domain
        assert _texts(text, prefix) == [r["text"] for r in _records(text)
                                        if r["meta"]["set"] == domain]


def test_files_of_one_domain_follow_one_another(text, tmp_path):
    _run(text, tmp_path / "x", "--domain", "all")
    assert _texts(text, f"{tmp_path}/x_all_pool")[:300] == [r["text"] for r in _records(text)]
    assert indexed.read_card(f"{tmp_path}/x_all_pool")["documents"] == 380


CHANGES = ("--split", "80,10,10", "--corrupt-fraction", "0.3", "--drop-duplicates")


@pytest.fixture(scope="module")
def reference(text, tmp_path_factory) -> dict[str, bytes]:
    prefix = tmp_path_factory.mktemp("reference") / "x"
    _run(text, prefix, *CHANGES)
    files = _files(prefix)
    assert len(files) == 18  # two domains, three splits, .bin .idx .json
    return files


@pytest.mark.parametrize("flags", [("--workers", "2"), ("--workers", "3", "--shard-size", "0.001"),
                                   ("--shard-size", "0.0005")])
def test_workers_and_shard_size_change_no_byte(text, tmp_path, reference, flags):
    _run(text, tmp_path / "x", *CHANGES, *flags)
    assert _files(tmp_path / "x") == reference


@pytest.mark.parametrize(("suffix", "package"), [("gz", None), ("zst", "zstandard")])
def test_compression_changes_no_byte(text, tmp_path, reference, suffix, package):
    compress = pytest.importorskip(package).compress if package else gzip.compress
    for name in ("notes.jsonl", "plain.txt"):
        (tmp_path / f"{name}.{suffix}").write_bytes(compress((text / name).read_bytes()))
    inputs = [str(tmp_path / f"{name}.{suffix}") for name in ("notes.jsonl", "plain.txt")]
    _run(text, tmp_path / "x", *CHANGES, "--shard-size", "0.005", "--workers", "2", inputs=inputs)
    assert _files(tmp_path / "x") == reference


def test_empty_files_add_nothing(text, tmp_path, reference):
    (tmp_path / "a.jsonl").write_bytes(b"")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b""))
    _run(text, tmp_path / "x", *CHANGES, inputs=(
        "notes.jsonl", tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz", "plain.txt"))
    assert _files(tmp_path / "x") == reference


def test_parquet_changes_no_byte(text, tmp_path, reference):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(_records(text)), tmp_path / "notes.parquet",
                        row_group_size=50)
    _run(text, tmp_path / "x", *CHANGES, "--shard-size", "0.005",
         inputs=(tmp_path / "notes.parquet", "plain.txt"))
    assert _files(tmp_path / "x") == reference


@pytest.mark.parametrize(("ranks", "workers"), [(2, 1), (3, 1), (2, 2)])
def test_mpi_ranks_change_no_byte(text, tmp_path, reference, ranks, workers):
    pytest.importorskip("mpi4py")
    done = _mpirun(ranks, _flags(text, tmp_path / "x", *CHANGES, "--shard-size", "0.002",
                                 "--workers", str(workers)))
    assert done.returncode == 0, done.stderr
    assert _files(tmp_path / "x") == reference
    for name in reference:  # by one of the ranks
        if name.endswith(".idx"):
            assert done.stdout.count(f"/x{name.removesuffix('.idx')}: ") == 1, done.stdout


def test_an_error_ends_all_mpi_ranks(text, tmp_path):
    pytest.importorskip("mpi4py")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\nnot json\n')
    done = _mpirun(2, _flags(text, tmp_path / "x", inputs=("notes.jsonl", tmp_path / "bad.jsonl")))
    assert done.returncode != 0 and "bad.jsonl:2 is no JSON object" in done.stderr
    assert not (tmp_path / "x_notes_pool.idx").exists()


def _mpirun(ranks: int, flags: list[str]) -> subprocess.CompletedProcess:
    mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if mpirun is None:
        pytest.skip("there is no mpirun")
    return subprocess.run([mpirun, "-n", str(ranks), sys.executable, str(TOOL), *flags],
                          capture_output=True, text=True, timeout=100)


def test_a_killed_run_is_carried_on(text, tmp_path, reference, capsys):
    flags = _flags(text, tmp_path / "x", *CHANGES, "--shard-size", "0.0002", "--workers", "2")
    folder = tmp_path / "x.shards"
    run = subprocess.Popen([sys.executable, str(TOOL), *flags], stdout=subprocess.DEVNULL)
    while len(list(folder.glob("0*.json"))) < 20 and run.poll() is None:
        time.sleep(0.001)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    time.sleep(1)  # the workers end with it
    finished = sorted(folder.glob("0*.json"))
    total = sum(-(-(text / name).stat().st_size // 209) for name in ("notes.jsonl", "plain.txt"))
    assert 20 <= len(finished) < total
    assert not list(tmp_path.glob("x_*"))

    with pytest.raises(SystemExit, match="x.shards holds the shards of an unfinished run with "
                                         "another seed.*delete the folder"):
        preprocess_selection.main([*flags, "--seed", "5"])
    preprocess_selection.main(flags)
    assert f"x.shards has {len(finished)} of {total} shards already" in capsys.readouterr().out
    assert _files(tmp_path / "x") == reference


def test_a_killed_run_takes_up_a_compressed_file(text, tmp_path, reference, capsys):
    for name in ("notes.jsonl", "plain.txt"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((text / name).read_bytes()))
    flags = _flags(text, tmp_path / "x", *CHANGES, "--shard-size", "0.0002",
                   inputs=(tmp_path / "notes.jsonl.gz", tmp_path / "plain.txt.gz"))
    run = subprocess.Popen([sys.executable, str(TOOL), *flags], stdout=subprocess.DEVNULL)
    # All of the first file and some of the second.
    while len(list((tmp_path / "x.shards").glob("000001-*.json"))) < 3 and run.poll() is None:
        time.sleep(0.001)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    preprocess_selection.main(flags)
    assert "x.shards has 1 of 2 shards already" in capsys.readouterr().out
    assert _files(tmp_path / "x") == reference


def test_bad_lines_are_listed_and_skipped_on_request(text, tmp_path, capsys):
    good = (text / "notes.jsonl").read_text().splitlines()
    (tmp_path / "notes.jsonl").write_text("\n".join([*good[:3], "{", *good[3:], '{"text": 1}']))
    flags = ("--shard-size", "0.001", "--workers", "2")
    with pytest.raises(SystemExit, match=r"notes.jsonl:(4|302) is no JSON object with the keys "
                                         r"text .*Mend it.*--skip-bad-lines"):
        _run(text, tmp_path / "x", *flags, inputs=(tmp_path / "notes.jsonl",))
    _run(text, tmp_path / "x", *flags, "--skip-bad-lines", inputs=(tmp_path / "notes.jsonl",))
    assert "2 bad lines left out, all listed in" in capsys.readouterr().out
    listed = (tmp_path / "x_bad_lines.txt").read_text().splitlines()
    assert [line.split(": ")[:2] for line in listed] == [
        [f"{tmp_path}/notes.jsonl:4", "JSONDecodeError"],
        [f"{tmp_path}/notes.jsonl:302", "TypeError"]]
    assert _texts(text, f"{tmp_path}/x_notes_pool") == [r["text"] for r in _records(text)]


def test_bad_lines_are_refused_that_an_unfinished_run_skipped(text, tmp_path):
    record = json.dumps({"text": "held out"}) + "\n"
    (tmp_path / "held.jsonl").write_text(record)
    (tmp_path / "a.jsonl").write_text(record + "{")
    _run(text, tmp_path / "held", inputs=(tmp_path / "held.jsonl",))
    flags = ("--exclude", f"{tmp_path}/held_held_pool")
    with pytest.raises(SystemExit, match="also stand in"):
        _run(text, tmp_path / "x", *flags, "--skip-bad-lines", inputs=(tmp_path / "a.jsonl",))
    with pytest.raises(SystemExit, match="a.jsonl:2 cannot be read.*--skip-bad-lines"):
        _run(text, tmp_path / "x", *flags, inputs=(tmp_path / "a.jsonl",))


def test_duplicates_are_counted_and_dropped_on_request(text, tmp_path):
    _run(text, tmp_path / "x", inputs=("plain.txt",))
    card = indexed.read_card(f"{tmp_path}/x_plain_pool")
    assert (card["documents"], card["duplicates"], card["dropped"]) == (80, 20, 0)
    _run(text, tmp_path / "y", "--drop-duplicates", inputs=("plain.txt",))
    card = indexed.read_card(f"{tmp_path}/y_plain_pool")
    assert (card["documents"], card["duplicates"], card["dropped"]) == (60, 20, 20)
    assert _read(f"{tmp_path}/y_plain_pool") == _read(f"{tmp_path}/x_plain_pool")[:60]


@pytest.mark.parametrize("samples", [("document",), ("window", "--seq-length", "16")])
def test_held_out_documents_are_refused(text, tmp_path, samples):
    """A validation set made first; then pools, in which some of its documents stand."""
    lines = (text / "notes.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "held.jsonl").write_text("".join(lines[100:110]))
    _run(text, tmp_path / "v", "--split", "0,1,0", "--samples", *samples,
         inputs=(tmp_path / "held.jsonl",))
    flags = ("--exclude", f"{tmp_path}/v_held_valid")
    with pytest.raises(SystemExit, match=r"documents also stand in the validation or test set.*\n"
                                         r".*notes.jsonl:101 equals document 0 of .*v_held_valid"):
        _run(text, tmp_path / "x", *flags, inputs=("notes.jsonl",))
    assert not (tmp_path / "x_notes_pool.idx").exists()
    _run(text, tmp_path / "x", *flags, "--drop-duplicates", inputs=("notes.jsonl",))
    left, held = _texts(text, f"{tmp_path}/x_notes_pool"), [r["text"] for r in _records(text)]
    # The last window cuts off the end of the last document, which so is not held out.
    last = 110 if samples == ("document",) else 109
    assert left == held[:100] + held[last:]


def test_a_held_out_document_of_another_group_is_refused(text, tmp_path):
    record = {"text": "the same words in every one", "file": ""}
    (tmp_path / "same.jsonl").write_text("".join(
        json.dumps({**record, "file": str(n)}) + "\n" for n in range(20)))
    flags = ("--split", "50,25,25", "--group-key", "file")
    with pytest.raises(SystemExit, match=r"same.jsonl:\d+ equals .*same.jsonl:\d+ \(test\)"):
        _run(text, tmp_path / "x", *flags, inputs=(tmp_path / "same.jsonl",))
    _run(text, tmp_path / "x", *flags, "--drop-duplicates", inputs=(tmp_path / "same.jsonl",))
    assert len(_read(f"{tmp_path}/x_same_test")) == 1
    assert not (tmp_path / "x_same_pool.idx").exists()


def test_windows_hold_the_tokens_of_the_documents(text, tmp_path):
    _run(text, tmp_path / "x")
    _run(text, tmp_path / "y", "--samples", "window", "--seq-length", "32")
    windows = _read(f"{tmp_path}/y_notes_pool")
    assert {len(window) for window in windows} == {32}
    tokens = sum(_read(f"{tmp_path}/x_notes_pool"), ())
    assert sum(windows, ()) == tokens[: len(tokens) // 32 * 32]


@pytest.mark.parametrize(("name", "content", "match"), [
    ("bad.jsonl", '{"text": "a"}\nnot json\n', r"bad.jsonl:2 is no JSON object with the keys"),
    ("keys.jsonl", '{"content": "a"}\n', r"keys.jsonl:1 is no JSON object with the keys text"),
    ("empty.jsonl", "\n", "--input holds no document of two tokens or more"),
])
def test_bad_files_are_named(text, tmp_path, name, content, match):
    (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit, match=match):
        _run(text, tmp_path / "x", inputs=(tmp_path / name,))
    assert not list(tmp_path.glob("x_*"))


@pytest.mark.parametrize(("flags", "match"), [
    (["--input", "gone.jsonl"], "gone.jsonl does not exist"),
    (["--input", "a/x.txt", "b/x.txt"], "have one name.*: x. Rename one.*--domain"),
    (["--input", "x.txt", "--split", "1,2"], "--split 1,2 is not three numbers"),
    (["--shard-size", "0"], "--shard-size 0.0 holds no text"),
    (["--samples", "window"], "--samples window and --seq-length go together"),
    (["--seq-length", "8"], "--samples window and --seq-length go together"),
    (["--exclude", "gone"], "gone.idx does not exist"),
    (["--eod-token", "<gone>"], "has no <gone>, which --append-eod needs"),
    (["--tokenizer-model", "no.model"], "no.model does not exist. .* --train-tokenizer"),
])
def test_bad_flags_are_told(text, tmp_path, flags, match):
    with pytest.raises(SystemExit, match=match):
        _run(text, tmp_path / "x", *flags, inputs=("notes.jsonl",))


def test_domains_that_would_be_one_file_are_told(text, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "one text", "set": "a b"}\n'
                                       '{"text": "another", "set": "a/b"}\n')
    with pytest.raises(SystemExit, match="domains 'a b' and 'a/b' would both be written as"):
        _run(text, tmp_path / "x", "--domain-key", "set", inputs=(tmp_path / "in.jsonl",))


def test_a_domain_key_that_names_documents_is_told(text, tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(
        json.dumps({"text": "the same text", "id": number}) + "\n" for number in range(1001)))
    with pytest.raises(SystemExit, match="--domain-key gives more than 1000 domains"):
        _run(text, tmp_path / "x", "--domain-key", "id", inputs=(tmp_path / "in.jsonl",))
