"""Indexed datasets: what is refused, and what makes two of them the same."""

from __future__ import annotations

import os
import struct

import numpy as np
import pytest
from indexed_files import random_documents, write_dataset

from megatron_direct.data import indexed
from megatron_direct.errors import UserError

DOCUMENTS = [[[1, 2, 3], [4, 5]], [[6]], [[7, 8, 9, 10]]]


@pytest.fixture
def prefix(tmp_path):
    return write_dataset(tmp_path / "set", DOCUMENTS)


def test_documents_are_counted_not_sequences(prefix):
    dataset = indexed.open_indexed(prefix)
    assert indexed.num_documents(dataset) == 3
    np.testing.assert_array_equal(indexed.document_lengths(dataset), [5, 1, 4])
    np.testing.assert_array_equal(indexed.document_tokens(dataset, 0), [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(indexed.document_tokens(dataset, 0, limit=4), [1, 2, 3, 4])
    np.testing.assert_array_equal(indexed.document_tokens(dataset, 2), [7, 8, 9, 10])


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_missing_file_is_named(prefix, suffix):
    os.remove(prefix + suffix)
    with pytest.raises(UserError, match=rf"set\{suffix} does not exist.*preprocess_selection"):
        indexed.open_indexed(prefix)


def test_a_path_with_its_suffix_gets_a_hint(prefix):
    with pytest.raises(UserError, match="Give the path without its suffix"):
        indexed.open_indexed(prefix + ".idx")


@pytest.mark.parametrize(("suffix", "keep", "match"), [
    (".idx", 20, "is not a Megatron index, or is truncated"),
    (".idx", 60, "set.idx is truncated: its header promises"),
    (".bin", 8, "set.bin is truncated: .*set.idx promises 40 bytes, it has 8"),
])
def test_truncated_file_is_named(prefix, suffix, keep, match):
    os.truncate(prefix + suffix, keep)
    with pytest.raises(UserError, match=match):
        indexed.open_indexed(prefix)


def test_what_is_read_is_what_megatron_reads(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    prefix = write_dataset(tmp_path / "many", random_documents(40, 90))
    ours, theirs = indexed.open_indexed(prefix), IndexedDataset(prefix)
    assert len(ours) == len(theirs)
    np.testing.assert_array_equal(ours.sequence_lengths, theirs.sequence_lengths)
    np.testing.assert_array_equal(ours.document_indices, theirs.document_indices)
    np.testing.assert_array_equal(ours.sequence_pointers, theirs.index.sequence_pointers)
    for sequence in range(len(ours)):
        np.testing.assert_array_equal(ours.get(sequence), theirs[sequence])


# Where the fields of an index lie: a header of 34 bytes, then lengths, offsets and boundaries.
_LENGTHS, _OFFSETS, _BOUNDARIES = 34, 34 + 4 * 4, 34 + 12 * 4


@pytest.mark.parametrize(("place", "value", "match"), [
    (9, 2, "version 2 and number type 4"),
    (17, 9, "version 1 and number type 9"),
    (_LENGTHS, 7, "sequence 1 has length 2 and begins at byte 12"),
    (_LENGTHS + 3, 255, "sequence 0 has length -"),
    (_OFFSETS + 8, 13, "begins at byte 13, which is not where the sequence before it ends"),
    (_BOUNDARIES, 1, "boundaries of its documents do not rise from 0 to its 4 sequences"),
    (_BOUNDARIES + 8, 4, "boundaries of its documents do not rise"),
    (_BOUNDARIES + 24, 3, "boundaries of its documents do not rise"),
])
def test_an_index_that_contradicts_itself_is_refused(prefix, place, value, match):
    with open(prefix + ".idx", "r+b") as file:
        file.seek(place)
        file.write(bytes([value]))
    with pytest.raises(UserError, match=rf"set.idx is damaged.*{match}"):
        indexed.open_indexed(prefix)


def _write_as_others_do(prefix, documents, offsets=None, num_boundaries=None) -> str:
    """By hand, tokens of two bytes, a sequence to a document."""
    lengths = np.array([len(document) for document in documents], np.int32)
    if offsets is None:
        offsets = 2 * (np.cumsum(lengths, dtype=np.int64) - lengths)
    boundaries = np.arange(len(lengths) + 1 if num_boundaries is None else num_boundaries)
    with open(f"{prefix}.bin", "wb") as file:
        file.write(np.concatenate(documents).astype(np.uint16).tobytes())
    with open(f"{prefix}.idx", "wb") as file:
        file.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, len(lengths), len(boundaries)))
        for array, dtype in ((lengths, np.int32), (offsets, np.int64), (boundaries, np.int64)):
            file.write(np.asarray(array, dtype).tobytes())
    return str(prefix)


@pytest.mark.parametrize(("change", "match"), [
    ("none", None),
    ("offsets of tokens of four bytes", "sequence 1 has length 23 and begins at byte 80"),
    ("offsets that have wrapped", "sequence 6 .* begins at byte -"),
    ("the last boundary is missing", "boundaries of its documents do not rise from 0 to its 12"),
])
def test_indexes_that_other_tools_have_written(tmp_path, change, match):
    documents = [np.full(20 + 3 * number, number) for number in range(12)]
    starts = np.cumsum([len(d) for d in documents]) - [len(d) for d in documents]
    prefix = _write_as_others_do(tmp_path / "set", documents, **{
        "none": {}, "offsets of tokens of four bytes": {"offsets": 4 * starts},
        "offsets that have wrapped": {"offsets": np.where(starts < starts[6], 2 * starts,
                                                          2 * starts - 2**32)},
        "the last boundary is missing": {"num_boundaries": 12}}[change])
    if match is None:
        dataset = indexed.open_indexed(prefix)
        assert indexed.document_tokens(dataset, 11).tolist() == [11] * 53
        return
    with pytest.raises(UserError, match=f"set.idx is damaged.*{match}"):
        indexed.open_indexed(prefix)


@pytest.mark.parametrize(("suffix", "tail", "match"), [
    (".idx", b"0", "set.idx is damaged: its header promises"),
    (".bin", b"0000", "set.bin is damaged: .*set.idx promises 40 bytes, it has 44"),
    (".bin", b"0", "its 41 bytes are not a whole number of 4-byte tokens"),
])
def test_a_file_that_is_too_long_is_refused(prefix, suffix, tail, match):
    with open(prefix + suffix, "ab") as file:
        file.write(tail)
    with pytest.raises(UserError, match=match):
        indexed.open_indexed(prefix)


def test_digest_changes_with_tokens_and_with_boundaries(tmp_path, prefix):
    same = write_dataset(tmp_path / "same", DOCUMENTS)
    tokens = write_dataset(tmp_path / "tokens", [[[1, 2, 3], [4, 5]], [[6]], [[7, 8, 9, 11]]])
    boundaries = write_dataset(tmp_path / "boundaries", [[[1, 2], [3, 4, 5]], [[6]],
                                                         [[7, 8, 9, 10]]])
    digest = indexed.dataset_digest(prefix)
    assert indexed.dataset_digest(same) == digest
    assert len({digest, indexed.dataset_digest(tokens), indexed.dataset_digest(boundaries)}) == 3


def test_names_are_short_where_they_can_be():
    assert indexed.prefix_names(["a/x", "b/y"]) == {"a/x": "x", "b/y": "y"}
    assert indexed.prefix_names(["a/x", "b/x"]) == {"a/x": "a__x", "b/x": "b__x"}


@pytest.mark.parametrize("prefixes", [
    ["a/b__c", "a__b/c", "x/c", "x/b__c"], ["/data/a", "data/a"],
    ["p/" + "é" * 200, "q/" + "é" * 200, "r/" + "é" * 200 + "x"],
], ids=["underscores", "absolute", "long"])
def test_names_are_unique_and_short_enough_for_a_file(prefixes, tmp_path):
    names = indexed.prefix_names(prefixes)
    assert len(set(names.values())) == len(prefixes)
    for name in names.values():
        (tmp_path / f".{name}.mask.npz.1234567.partial").touch()
