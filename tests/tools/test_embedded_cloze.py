"""Cloze questions: made of test passages alone, whole words, the same for the same seed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from indexed_files import write_dataset

from megatron_direct.errors import UserError
from megatron_direct.evaluation import questions as multiple_choice

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import embedded_cloze  # noqa: E402

TEXTS = [" ".join(f"word{number}x{i}" for i in range(60)) for number in range(9)] + ["short"]


def test_choices_are_continuations_of_the_passages(tmp_path):
    records = embedded_cloze.questions(TEXTS, seed=1)
    assert len(records) == 9
    for text, record in zip(TEXTS, records, strict=False):
        assert len(set(record["choices"])) == embedded_cloze.NUM_CHOICES
        own = [text.startswith(f"{record['context']} {choice} ") for choice in record["choices"]]
        assert [n for n, is_own in enumerate(own) if is_own] == [record["answer"]]
        for choice in record["choices"]:
            assert any(f" {choice} " in other for other in TEXTS)
    assert records == embedded_cloze.questions(TEXTS, seed=1)
    assert records != embedded_cloze.questions(TEXTS, seed=2)
    assert len({record["answer"] for record in records}) > 1
    path = tmp_path / "cloze.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    read = multiple_choice.read_questions(path)
    assert [q.answer for q in read] == [r["answer"] for r in records]


def test_a_cut_is_between_words_of_one_line():
    text = "a" * 119 + "\n  b c  d " + "e" * 60 + " f"
    context, continuation = embedded_cloze.cut(text)
    assert (context[-3:], continuation) == ("  b", "c  d " + "e" * 60)
    assert embedded_cloze.cut("a " * 60) is None


def test_a_pool_is_refused(tmp_path):
    prefix = write_dataset(tmp_path / "a", [[[1, 2, 3]]])
    with pytest.raises(UserError, match="a is no split known, not a test set"):
        embedded_cloze.passages(prefix, None)
    (tmp_path / "a.json").write_text(json.dumps({
        "split": "pool", "tokenizer_digest": "x", "vocab_size": 9}))
    with pytest.raises(UserError, match="a is pool, not a test set"):
        embedded_cloze.passages(prefix, None)
