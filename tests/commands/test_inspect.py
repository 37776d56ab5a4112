"""Masks on the command line."""

from __future__ import annotations

import numpy as np
import pytest
from indexed_files import random_documents, write_dataset

from megatron_direct import SampleMask
from megatron_direct.commands.inspect import InspectConfig, InspectRequest, inspect
from megatron_direct.data import indexed
from megatron_direct.errors import UserError

DOCUMENTS = random_documents(30, 50)


@pytest.fixture
def files(tmp_path):
    """A dataset, and the masks of its first 10, of its even and of its last 5 documents."""
    prefix = write_dataset(tmp_path / "pool", DOCUMENTS)
    numbers = np.arange(30)
    paths = []
    for name, keep in (("first", numbers < 10), ("even", numbers % 2 == 0), ("last", numbers > 24)):
        paths.append(str(tmp_path / f"{name}.npz"))
        SampleMask(keep, indexed.dataset_digest(prefix), f"runs/{name}").save(paths[-1])
    return prefix, paths


def _tokens(documents):
    return sum(len(sequence) for document in documents for sequence in document)


def test_statistics(files, capsys):
    prefix, paths = files
    inspect(InspectRequest(InspectConfig(mask=tuple(paths[:2]), data_path=(prefix,))))
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["first.npz", "30", "10", "0.3333", str(_tokens(DOCUMENTS)),
                                str(_tokens(DOCUMENTS[:10])),
                                f"{_tokens(DOCUMENTS[:10]) / _tokens(DOCUMENTS):.4f}", prefix,
                                "runs/first"]
    inspect(InspectRequest(InspectConfig(mask=(paths[0],))))
    assert capsys.readouterr().out.splitlines()[2].split()[4:7] == ["-"] * 3


@pytest.mark.parametrize(("operation", "which", "kept"), [
    ("and", (0, 1), [0, 2, 4, 6, 8]),
    ("or", (0, 2), [*range(10), *range(25, 30)]),
    ("minus", (1, 0, 2), list(range(10, 25, 2))),
    ("minus", (0, 0), []),
])
def test_masks_out_of_masks(files, tmp_path, operation, which, kept):
    _, paths = files
    output = tmp_path / "made.npz"
    inspect(InspectRequest(InspectConfig(mask=tuple(paths[i] for i in which), operation=operation,
                          output=str(output))))
    assert np.flatnonzero(SampleMask.load(output).keep).tolist() == kept


def test_materialize(files, tmp_path, capsys):
    prefix, paths = files
    inspect(InspectRequest(InspectConfig(
        mask=tuple(paths[:2]), operation="and", data_path=(prefix,),
        materialize=str(tmp_path / "some"))))
    dataset = indexed.open_indexed(str(tmp_path / "some"))
    expected = [_tokens([DOCUMENTS[i]]) for i in range(0, 10, 2)]
    assert indexed.document_lengths(dataset).tolist() == expected
    assert f"some: 5 documents, {sum(expected)} tokens" in capsys.readouterr().out


def test_the_documents_of_a_mask_are_listed(files, capsys):
    _, paths = files
    inspect(InspectRequest(InspectConfig(mask=(paths[1], paths[0]), operation="minus",
                                         list_documents=True)))
    assert capsys.readouterr().out == "".join(f"{i}\n" for i in range(10, 30, 2))


@pytest.mark.parametrize(("settings", "match"), [
    ({"output": "x"}, "--output is for the mask that --operation makes"),
    ({"materialize": "x"}, "--materialize is for the documents of one mask, but several"),
    ({"list_documents": True}, "--list-documents is for the documents of one mask, but several"),
    ({"materialize": "x", "operation": "or"}, "--materialize needs the dataset .* --data-path"),
])
def test_flags_that_say_nothing_are_refused(files, settings, match):
    _, paths = files
    with pytest.raises(UserError, match=match):
        inspect(InspectRequest(InspectConfig(mask=tuple(paths), **settings)))


def test_a_dataset_that_no_mask_belongs_to_is_refused(files, tmp_path):
    _, paths = files
    other = write_dataset(tmp_path / "other", DOCUMENTS[1:])
    with pytest.raises(UserError, match="none of the masks belongs to .*other .*Correct --data-"):
        inspect(InspectRequest(InspectConfig(mask=tuple(paths), data_path=(other,))))
