"""Indexed datasets: what is refused, and what makes two of them the same."""

from __future__ import annotations

import os

import numpy as np
import pytest
from indexed_files import write_dataset

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
    (".idx", 20, "is no Megatron index, or is truncated"),
    (".idx", 60, "set.idx is truncated: its header promises"),
    (".bin", 8, "set.bin is truncated: .*set.idx promises 40 bytes, it has 8"),
])
def test_truncated_file_is_named(prefix, suffix, keep, match):
    os.truncate(prefix + suffix, keep)
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
