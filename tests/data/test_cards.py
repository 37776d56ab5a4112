"""Cards: what is read of them, and what is refused."""

from __future__ import annotations

import json

import pytest
from indexed_files import write_dataset

from megatron_direct.data.cards import Card, corrupted_documents, read_card
from megatron_direct.errors import UserError

GOOD = {"tokenizer_digest": "d", "vocab_size": 9, "documents": 3}


def test_a_card_is_read_as_it_was_written(tmp_path):
    card = Card(tokenizer_digest="d", vocab_size=9, samples="window", seq_length=4, tokens_cut=2,
                rest=[5, 6])
    (tmp_path / "a.json").write_text(json.dumps(card.as_json()))
    assert Card(**read_card(str(tmp_path / "a"))) == card
    assert "rest" not in Card(tokenizer_digest="d", vocab_size=9).as_json()
    assert read_card(str(tmp_path / "none")) == {}


@pytest.mark.parametrize(("text", "match"), [
    ("{", "a.json cannot be read"), ("[" * 10**5, "a.json cannot be read"),
    ("\xff", "a.json cannot be read"), ('{"text": "a record"}\n{}', "a.json cannot be read"),
    ("[]", "a.json is not the card of a dataset"),
    ('{"text": "a record"}', "tokenizer_digest is missing.*counts as one that was made elsewhere"),
    (json.dumps(GOOD | {"vocab_size": "9"}), "card.vocab_size: expected int"),
    (json.dumps(GOOD | {"vocab_size": 0}), "counts below zero"),
    (json.dumps(GOOD | {"corrupted": [1, -1]}), "counts below zero"),
    (json.dumps(GOOD | {"corrupted": [3]}), "documents corrupted that the dataset does not have"),
])
def test_what_is_not_a_card_is_named(tmp_path, text, match):
    (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=match):
        read_card(str(tmp_path / "a"))


def test_the_card_of_another_dataset_is_found(tmp_path):
    prefix = write_dataset(tmp_path / "a", [[[1, 2]], [[3]]])
    (tmp_path / "a.json").write_text(json.dumps(GOOD | {"corrupted": [1, 2]}))
    with pytest.raises(UserError, match="a.json is the card of another dataset: .*document 2 .* 2"):
        corrupted_documents(prefix, 2)
    assert corrupted_documents(prefix, 3).tolist() == [1, 2]
