"""The folder of an unfinished run: carried on with by the same command, and by no other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from preprocess_runs import main, outputs, read

from megatron_direct.preprocessing import pipeline, shard_folder, shards, tokenizer

ENTRIES = [f"Entry {n}: the tide turned at {n} past the hour." for n in range(40)]


@pytest.fixture
def hugging_face(tmp_path) -> Path:
    """A tokenizer with two tokens that may end a document, of which its config names the first."""
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.train_from_iterator(ENTRIES, tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<a>", "<b>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    (tmp_path / "model").mkdir()
    model.save(str(tmp_path / "model" / "tokenizer.json"))
    _name_end(tmp_path / "model", "<a>")
    return tmp_path / "model"


def _name_end(model: Path, token: str) -> None:
    (model / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))


def _stopped(tmp_path: Path, model: Path) -> list[str]:
    """The flags of a run that a bad line stopped after some shards."""
    (tmp_path / "two.jsonl").write_text("\n".join(
        [*(json.dumps({"text": entry}) for entry in ENTRIES[:30]), "not json",
         *(json.dumps({"text": entry}) for entry in ENTRIES[30:])]))
    flags = ["--input", str(tmp_path / "two.jsonl"), "--output-prefix", str(tmp_path / "x"),
             "--tokenizer-model", str(model), "--append-eod", "--shard-size", "0.0005"]
    with pytest.raises(SystemExit, match="two.jsonl:31 is not a JSON object"):
        main(flags)
    assert 0 < len(shards.names(tmp_path / "x.shards")) < 8
    return [*flags, "--skip-bad-lines"]


def test_another_end_of_documents_is_refused(tmp_path, hugging_face):
    flags = _stopped(tmp_path, hugging_face)
    _name_end(hugging_face, "<b>")
    with pytest.raises(SystemExit, match=r"unfinished run with different tokenizer \(eod\)"):
        main(flags)
    _name_end(hugging_face, "<a>")
    main(flags)
    assert {document[-1] for document in read(tmp_path / "x_two_pool")} == {0}


def test_the_same_end_by_another_name_is_not_refused(tmp_path, hugging_face):
    flags = _stopped(tmp_path, hugging_face)
    _name_end(hugging_face, "<b>")
    main([*flags, "--eod-token", "<a>"])
    assert {document[-1] for document in read(tmp_path / "x_two_pool")} == {0}


def test_another_version_of_the_tokenizers_library_is_refused(tmp_path, hugging_face, monkeypatch):
    flags = _stopped(tmp_path, hugging_face)
    monkeypatch.setattr("tokenizers.__version__", "0")
    with pytest.raises(SystemExit, match=r"unfinished run with different tokenizer \(library\)"):
        main(flags)


@pytest.mark.parametrize(("changed", "named"), [
    (("--append-eod",), "append_eod"), (("--split", "90,5,5"), "split"), (("--seed", "1"), "seed"),
    (("--group-key", "text"), "group_key"), (("--domain", "one"), "domain"),
    (("--domain-key", "text"), "domain_key"), (("--shard-size", "1"), "shard_size"),
    (("--json-keys", "text", "text"), "json_keys"),
])
def test_other_flags_are_refused(tmp_path, hugging_face, changed, named):
    flags = _stopped(tmp_path, hugging_face)
    if changed == ("--append-eod",):
        flags.remove(changed[0])
    else:
        flags += changed
    with pytest.raises(SystemExit, match=f"unfinished run with different {named}. Repeat that run"):
        main(flags)


def test_other_input_is_refused(tmp_path, hugging_face):
    flags = _stopped(tmp_path, hugging_face)
    with open(tmp_path / "two.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(SystemExit, match="unfinished run with different input"):
        main(flags)


def test_a_tokenizer_is_not_trained_anew_for_another_run(text, tmp_path):
    """The refused run must not have replaced the tokenizer of the unfinished one."""
    (tmp_path / "bad.jsonl").write_text(text.notes.read_text() + "not json")
    (tmp_path / "other.jsonl").write_text(text.notes.read_text()[: 20_000].rpartition("\n")[0])
    model = tmp_path / "tokenizer.model"
    flags = ["--output-prefix", str(tmp_path / "x"), "--tokenizer-model", str(model),
             "--train-tokenizer", "--vocab-size", "320", "--skip-bad-lines", "--input"]
    text.run(tmp_path / "held", "--tokenizer-model", str(model), "--train-tokenizer",
             "--vocab-size", "320", inputs=[text.notes])
    exclude = ["--exclude", f"{tmp_path}/held_notes_pool"]
    with pytest.raises(SystemExit, match="also in the validation or test set"):
        main([*flags, str(tmp_path / "bad.jsonl"), *exclude])
    before = model.read_bytes()
    with pytest.raises(SystemExit, match="unfinished run with different input"):
        main([*flags, str(tmp_path / "other.jsonl")])
    assert model.read_bytes() == before


def test_bad_lines_are_refused_that_an_unfinished_run_skipped(text, tmp_path):
    record = json.dumps({"text": "held out"}) + "\n"
    (tmp_path / "held.jsonl").write_text(record)
    (tmp_path / "a.jsonl").write_text(record + "{")
    text.run(tmp_path / "held", inputs=[tmp_path / "held.jsonl"])
    flags = ("--exclude", f"{tmp_path}/held_held_pool")
    with pytest.raises(SystemExit, match="are also in"):
        text.run(tmp_path / "x", *flags, "--skip-bad-lines", inputs=[tmp_path / "a.jsonl"])
    with pytest.raises(SystemExit, match="a.jsonl:2 cannot be read.*--skip-bad-lines"):
        text.run(tmp_path / "x", *flags, inputs=[tmp_path / "a.jsonl"])


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("deleted", [0, 1, 5, 10**6])
def test_a_run_killed_while_it_deletes_its_shards_does_no_harm(text, tmp_path, monkeypatch,
                                                              deleted):
    """deleted: files that are gone when it is killed, plan.json the first."""
    def killed(path):
        files = sorted(Path(path).iterdir(), key=lambda file: (file.name != "plan.json", file.name))
        for file in files[:deleted]:
            file.unlink()
        raise _Killed

    (tmp_path / "a.jsonl").write_text("".join(
        json.dumps({"text": entry}) + "\n" for entry in ENTRIES[:20]))
    (tmp_path / "b.jsonl").write_text("".join(
        json.dumps({"text": entry}) + "\n" for entry in ENTRIES[20:]))
    flags = ("--domain", "d", "--shard-size", "0.0002")
    with monkeypatch.context() as patched, pytest.raises(_Killed):
        patched.setattr(shard_folder.shutil, "rmtree", killed)
        text.run(tmp_path / "x", *flags, inputs=[tmp_path / "a.jsonl"])
    assert text.texts(tmp_path / "x_d_pool") == ENTRIES[:20]
    text.run(tmp_path / "x", *flags, inputs=[tmp_path / "b.jsonl"])
    assert text.texts(tmp_path / "x_d_pool") == ENTRIES[20:]
    assert not list(tmp_path.glob("x.shards*"))


def test_shards_without_a_plan_are_refused(text, tmp_path):
    path = tmp_path / "x.shards"
    path.mkdir()
    (path / ".plan.json.7.partial").write_text("{")  # killed at its very start
    text.run(tmp_path / "x", inputs=[text.plain])
    done = outputs(tmp_path / "x")
    path.mkdir()
    (path / "000000-0000000.json").write_text("{}")
    with pytest.raises(SystemExit, match="x.shards holds shards, but no plan.json.*Delete"):
        text.run(tmp_path / "x", inputs=[text.plain])
    shutil.rmtree(path)
    text.run(tmp_path / "x", inputs=[text.plain])
    assert outputs(tmp_path / "x") == done


def test_a_split_that_a_run_no_longer_writes_is_not_left_beside_it(text, tmp_path):
    """Its documents would be in the new pool, too."""
    text.run(tmp_path / "x", "--split", "80,10,10", "--drop-duplicates", inputs=[text.plain])
    match = "x_plain_test is there from an earlier run.*share documents. Delete it.*--exclude"
    with pytest.raises(SystemExit, match=match):
        text.run(tmp_path / "x", "--split", "90,10,0", inputs=[text.plain])
    kept = ("--exclude", f"{tmp_path}/x_plain_test", "--drop-duplicates")
    text.run(tmp_path / "x", "--split", "90,10,0", *kept, inputs=[text.plain])
    test, pool = (set(read(tmp_path / f"x_plain_{split}")) for split in ("test", "pool"))
    assert test and pool and not test & pool
    for path in tmp_path.glob("x_plain_test.*"):
        path.unlink()
    text.run(tmp_path / "x", "--split", "90,10,0", inputs=[text.plain])


def test_a_run_that_is_killed_while_it_merges_leaves_no_dataset_of_an_earlier_one(
        text, tmp_path, monkeypatch):
    """Its documents are divided otherwise: of the two runs some would be in both sets."""
    split = ("--split", "60,20,20")
    text.run(tmp_path / "x", *split, "--drop-duplicates", inputs=[text.plain])
    assert len(list(tmp_path.glob("x_plain_*.idx"))) == 3

    def killed(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "_merge", killed)
    again = (*split, "--drop-duplicates", "--seed", "7")
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        text.run(tmp_path / "x", *again, inputs=[text.plain])
    assert not list(tmp_path.glob("x_plain_*.idx"))
    monkeypatch.undo()
    text.run(tmp_path / "x", *again, inputs=[text.plain])
    assert len(list(tmp_path.glob("x_plain_*.idx"))) == 3


def test_what_the_run_itself_writes_cannot_be_excluded(text, tmp_path):
    split = ("--split", "80,10,10", "--drop-duplicates")
    text.run(tmp_path / "x", *split, inputs=[text.plain])
    before = read(tmp_path / "x_plain_test")
    with pytest.raises(SystemExit, match="x_plain_test names a dataset that this run writes"):
        text.run(tmp_path / "x", *split, "--exclude", f"{tmp_path}/./x_plain_test",
                 inputs=[text.plain])
    assert read(tmp_path / "x_plain_test") == before


def test_an_identity_tells_what_tokens_depend_on(hugging_face):
    known = tokenizer.identify(hugging_face, tokenizer.load_tokenizer(hugging_face, None, True))
    other = tokenizer.identify(hugging_face, tokenizer.load_tokenizer(hugging_face, "<b>", True))
    assert (known.eod, other.eod) == (0, 1) and known.digest == other.digest
