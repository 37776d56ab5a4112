"""Masks on disk, and whose they are."""

from __future__ import annotations

import numpy as np
import pytest
from indexed_files import random_documents, write_dataset

from megatron_direct import SampleMask
from megatron_direct.data.indexed import dataset_digest
from megatron_direct.errors import UserError


def test_a_mask_comes_back_as_it_was(tmp_path):
    keep = np.random.default_rng(0).random(1001) < 0.3
    mask = SampleMask(keep, "abc")
    mask.save(tmp_path / "m.npz")
    again = SampleMask.load(tmp_path / "m.npz")
    np.testing.assert_array_equal(again.keep, keep)
    assert (again.dataset_digest, again.digest) == ("abc", mask.digest)
    assert (tmp_path / "m.npz").stat().st_size < 1001  # bits, not bytes


def test_the_digest_tells_masks_apart():
    keep = np.array([True, False, True])
    masks = [SampleMask(keep, "a"), SampleMask(~keep, "a"), SampleMask(keep, "b"),
             SampleMask(np.append(keep, False), "a")]
    assert len({mask.digest for mask in masks}) == 4


def test_a_mask_is_refused_on_another_dataset(tmp_path):
    documents = random_documents(5, 20)
    own = write_dataset(tmp_path / "own", documents)
    other = write_dataset(tmp_path / "other", documents[1:])
    mask = SampleMask(np.ones(5, dtype=bool), dataset_digest(own))
    mask.require_belongs_to(own)
    with pytest.raises(UserError, match="other has .* the dataset is another one"):
        mask.require_belongs_to(other)


def test_damaged_and_missing_masks_are_named(tmp_path):
    with pytest.raises(UserError, match="gone.npz does not exist"):
        SampleMask.load(tmp_path / "gone.npz")
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 half a zip")
    with pytest.raises(UserError, match="bad.npz is no sample mask, or is damaged"):
        SampleMask.load(tmp_path / "bad.npz")


def test_a_mask_is_one_entry_a_document():
    with pytest.raises(ValueError, match="one entry a document"):
        SampleMask(np.ones((2, 2)), "a")
