"""The file that says which documents are of one source."""

from __future__ import annotations

import re

import numpy as np
import pytest
from indexed_files import random_documents, write_dataset

from megatron_direct import SampleMask
from megatron_direct.data import indexed
from megatron_direct.data.materialize import materialize
from megatron_direct.data.samples import Samples
from megatron_direct.data.sources import read_sources, source_number, write_sources
from megatron_direct.errors import UserError

DOCUMENTS = random_documents(12, 60, seed=5)


@pytest.fixture
def prefix(tmp_path):
    return write_dataset(tmp_path / "d", DOCUMENTS)


def test_numbers_come_back_whatever_wrote_them(prefix):
    assert read_sources(prefix, 12) is None
    numbers = np.array([source_number(name) for name in "abcabcabcabc"])
    write_sources(prefix, numbers)
    np.testing.assert_array_equal(read_sources(prefix, 12), numbers)
    for dtype in (np.uint8, np.int32, np.uint64):
        np.save(prefix + ".sources.npy", np.arange(12, dtype=dtype))
        np.testing.assert_array_equal(read_sources(prefix, 12), np.arange(12))


def test_a_name_has_one_number_that_is_none_below_zero():
    numbers = [source_number(str(name)) for name in range(1000)]
    assert numbers == [source_number(str(name)) for name in range(1000)]
    assert len(set(numbers)) == 1000 and 0 <= min(numbers) <= max(numbers) < 2**63


@pytest.mark.parametrize(("content", "match"), [
    (np.arange(11), "has the sources of 11 documents, and .*d has 12"),
    (np.arange(12.0), "is not a vector of integers"),
    (np.zeros((12, 1), int), "is not a vector of integers"),
    (np.arange(12) - 1, "has a number below 0, or of more than 63 bits"),
    (np.full(12, 2**63, np.uint64), "has a number below 0, or of more than 63 bits"),
    (b"not an array", "cannot be read as a NumPy array"),
    (b"", "cannot be read as a NumPy array"),
])
def test_what_is_not_understood_is_refused(prefix, content, match):
    path = prefix + ".sources.npy"
    if isinstance(content, bytes):
        with open(path, "wb") as file:
            file.write(content)
    else:
        np.save(path, content)
    with pytest.raises(UserError, match=f"{match}.*Write it again, or delete it: without "
                                        f"{re.escape(path)} sources are not known"):
        read_sources(prefix, 12)


def test_samples_have_the_sources_of_their_datasets(tmp_path, prefix):
    other = write_dataset(tmp_path / "other", DOCUMENTS[:5])
    assert Samples([prefix, other], 16).sources is None
    assert Samples([prefix, other], 16).sources_digest is None
    write_sources(other, np.arange(5))
    samples = Samples([prefix, other], 16)
    np.testing.assert_array_equal(samples.sources_of(np.array([0, 11, 12, 16])), [-1, -1, 0, 4])
    write_sources(other, np.arange(5) + 1)
    assert Samples([prefix, other], 16).sources_digest != samples.sources_digest


def test_a_materialized_dataset_has_the_sources_of_what_is_kept(tmp_path, prefix):
    write_sources(prefix, np.arange(12) // 2)
    counts = np.arange(12) % 3
    materialize(prefix, SampleMask(counts, indexed.dataset_digest(prefix)), str(tmp_path / "some"))
    np.testing.assert_array_equal(read_sources(str(tmp_path / "some"), 12),
                                  np.repeat(np.arange(12) // 2, counts))


def test_nothing_is_materialized_beside_sources_of_other_documents(tmp_path, prefix):
    np.save(prefix + ".sources.npy", np.arange(11))
    mask = SampleMask(np.ones(12), indexed.dataset_digest(prefix))
    with pytest.raises(UserError, match="has the sources of 11 documents"):
        materialize(prefix, mask, str(tmp_path / "some"))
    assert not list(tmp_path.glob("some*"))
    (tmp_path / "d.sources.npy").unlink()
    np.save(tmp_path / "some.sources.npy", np.arange(3))  # left over
    materialize(prefix, mask, str(tmp_path / "some"))
    assert not (tmp_path / "some.sources.npy").exists()
