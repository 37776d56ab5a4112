"""Kept documents as a dataset of their own, against one written document by document."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from indexed_files import random_documents, write_dataset

from megatron_direct import SampleMask
from megatron_direct.data import indexed
from megatron_direct.data.cards import read_card
from megatron_direct.data.materialize import materialize
from megatron_direct.errors import UserError
from megatron_direct.runtime import files

DOCUMENTS = random_documents(40, 60, seed=5)


@pytest.fixture
def prefix(tmp_path):
    return write_dataset(tmp_path / "whole", DOCUMENTS)


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_the_files_are_those_of_megatrons_own_builder(prefix, tmp_path, share):
    keep = np.random.default_rng(1).random(len(DOCUMENTS)) < share
    keep[3] = True
    written = materialize(prefix, SampleMask(keep, indexed.dataset_digest(prefix)),
                          str(tmp_path / "some"))
    kept = [document for document, k in zip(DOCUMENTS, keep, strict=True) if k]
    expected = write_dataset(tmp_path / "expected", kept)
    for suffix in (".bin", ".idx"):
        assert Path(f"{tmp_path}/some{suffix}").read_bytes() == \
            Path(expected + suffix).read_bytes()
    assert (written.documents, written.tokens) == \
        (len(kept), sum(len(s) for document in kept for s in document))
    assert not (tmp_path / "some.json").exists()


def test_the_card_is_carried_over(prefix, tmp_path):
    Path(prefix + ".json").write_text(json.dumps({
        "domain": "d", "tokenizer_digest": "t", "vocab_size": 60, "documents": 40, "tokens": 9,
        "corrupted": [2, 5, 7]}))
    keep = np.arange(40) % 5 == 2  # 2, 7, 12, ...
    written = materialize(prefix, SampleMask(keep, indexed.dataset_digest(prefix), "runs/x"),
                          str(tmp_path / "some"))
    card = read_card(str(tmp_path / "some"))
    assert (card["domain"], card["documents"], card["tokens"], card["corrupted"]) == \
        ("d", 8, written.tokens, [0, 1])
    assert card["materialized_from"]["run"] == "runs/x"


def test_what_cannot_be_written_is_refused(prefix, tmp_path):
    digest = indexed.dataset_digest(prefix)
    with pytest.raises(UserError, match="whole.idx exists. Choose another prefix"):
        materialize(prefix, SampleMask(np.ones(40), digest), prefix)
    with pytest.raises(UserError, match="keeps no document: there is nothing to write"):
        materialize(prefix, SampleMask(np.zeros(40), digest), str(tmp_path / "none"))
    with pytest.raises(UserError, match="it is a different dataset"):
        materialize(prefix, SampleMask(np.ones(40), "x"), str(tmp_path / "foreign"))
    assert not list(tmp_path.glob("none*")) and not list(tmp_path.glob("foreign*"))


def test_the_mask_is_unpacked_a_few_times_however_many_documents_are_corrupted(
        tmp_path, monkeypatch):
    """Unpacking takes a byte a document: once for each corrupted one would be quadratic."""
    prefix = write_dataset(tmp_path / "set", [[[1, 2]] for _ in range(300)])
    corrupted = list(range(0, 300, 2))
    files.write_json(prefix + ".json", {
        "tokenizer_digest": "x", "vocab_size": 9, "documents": 300, "corrupted": corrupted})
    keep = np.arange(300) % 3 == 0
    mask = SampleMask(keep, indexed.dataset_digest(prefix))
    unpacked = []
    whole = SampleMask.keep
    monkeypatch.setattr(SampleMask, "keep", property(
        lambda self: unpacked.append(1) or whole.fget(self)))
    materialize(prefix, mask, str(tmp_path / "some"))
    assert len(unpacked) < 5
    kept = np.flatnonzero(keep).tolist()
    assert read_card(str(tmp_path / "some"))["corrupted"] == [
        kept.index(document) for document in corrupted if keep[document]]
