"""Masks on disk, and whose they are."""

from __future__ import annotations

import numpy as np
import pytest
from indexed_files import random_documents, write_dataset

from megatron_direct import SampleMask
from megatron_direct.data.indexed import dataset_digest
from megatron_direct.errors import UserError


def test_a_mask_comes_back_as_it_was(tmp_path):
    keep = np.random.default_rng(0).random(20_001) < 0.3
    mask = SampleMask(keep, "abc")
    mask.save(tmp_path / "m.npz")
    again = SampleMask.load(tmp_path / "m.npz")
    np.testing.assert_array_equal(again.keep, keep)
    assert (again.dataset_digest, again.digest) == ("abc", mask.digest)
    assert (tmp_path / "m.npz").stat().st_size < 20_001 / 4  # bits, not bytes


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
    with pytest.raises(UserError, match="other has .* it is a different dataset"):
        mask.require_belongs_to(other)


def test_damaged_and_missing_masks_are_named(tmp_path):
    with pytest.raises(UserError, match="gone.npz does not exist"):
        SampleMask.load(tmp_path / "gone.npz")
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 half a zip")
    with pytest.raises(UserError, match="bad.npz is damaged, or not what it should be"):
        SampleMask.load(tmp_path / "bad.npz")


def test_a_mask_is_one_entry_a_document():
    with pytest.raises(ValueError, match="one entry per document"):
        SampleMask(np.ones((2, 2)), "a")


@pytest.mark.parametrize("count", [1, 7, 8, 9, 1000])
def test_set_operations_are_those_of_numpy(count):
    rng = np.random.default_rng(count)
    a, b = rng.random(count) < 0.5, rng.random(count) < 0.5
    one, two = SampleMask(a, "d", "run1"), SampleMask(b, "d", "run2")
    for made, expected in ((one & two, a & b), (one | two, a | b), (one - two, a & ~b)):
        np.testing.assert_array_equal(made.keep, expected)
        assert made.num_kept == expected.sum()
        assert made.digest == SampleMask(expected, "d").digest
    assert (one - two).run == "(run1 minus run2)"


def test_masks_of_different_datasets_are_not_combined():
    with pytest.raises(UserError, match="belong to different datasets .digests a and b"):
        _ = SampleMask(np.ones(3), "a") & SampleMask(np.ones(3), "b")


def test_a_mask_says_how_many_it_keeps_and_which_run_it_came_from(tmp_path):
    SampleMask(np.arange(20) < 7, "d").with_run("runs/x").save(tmp_path / "m.npz")
    mask = SampleMask.load(tmp_path / "m.npz")
    assert (mask.num_kept, mask.num_documents, mask.run) == (7, 20, "runs/x")


def test_a_mask_takes_a_bit_a_document_in_memory():
    mask = SampleMask(np.random.default_rng(0).random(8000) < 0.5, "d")
    assert sum(value.nbytes for value in vars(mask).values() if hasattr(value, "nbytes")) == 1000


@pytest.mark.parametrize(("changed", "match"), [
    ({"num_kept": 3}, "is damaged: it keeps 8 documents in 2 bytes, where 3 of 16"),
    ({"keep": np.full(1, 255, np.uint8)}, "is damaged: it keeps 8 documents in 1 bytes"),
    ({"format": 3}, "is not a sample mask, or is damaged .format 3, where 1 or 2"),
])
def test_a_mask_that_contradicts_itself_is_refused(tmp_path, changed, match):
    SampleMask(np.arange(16) < 8, "d").save(tmp_path / "m.npz")
    with np.load(tmp_path / "m.npz") as data:
        values = {**data, **changed}
    np.savez(tmp_path / "m.npz", **values)
    with pytest.raises(UserError, match=match):
        SampleMask.load(tmp_path / "m.npz")


def test_counts_come_back_as_they_were(tmp_path):
    counts = np.random.default_rng(0).integers(0, 5, 1000)
    mask = SampleMask(counts, "abc")
    mask.save(tmp_path / "m.npz")
    again = SampleMask.load(tmp_path / "m.npz")
    np.testing.assert_array_equal(again.counts, counts)
    np.testing.assert_array_equal(again.keep, counts > 0)
    assert again.keep.dtype == bool and again.counts.dtype == np.uint8
    assert (again.digest, again.num_seen, again.num_kept, again.max_count) == (
        mask.digest, counts.sum(), np.count_nonzero(counts), 4)
    assert mask.digest != SampleMask(counts > 0, "abc").digest


def test_a_mask_of_yes_and_no_stays_as_it_was(tmp_path):
    """Counts of 0 and 1 are the same mask, in the same file, as bools: older versions read it."""
    keep = np.random.default_rng(0).random(999) < 0.3
    masks = [SampleMask(keep, "a"), SampleMask(keep.astype(np.int64), "a")]
    for number, mask in enumerate(masks):
        mask.save(tmp_path / f"{number}.npz")
    assert masks[0].digest == masks[1].digest and masks[0].max_count == 1
    with np.load(tmp_path / "0.npz") as one, np.load(tmp_path / "1.npz") as two:
        assert set(one) == set(two) == {"format", "num_documents", "num_kept", "keep",
                                        "dataset_digest", "run"}
        assert int(one["format"]) == 1
        np.testing.assert_array_equal(one["keep"], two["keep"])
    np.testing.assert_array_equal(masks[0].counts, keep)


def test_set_operations_of_counts():
    a, b = np.array([0, 1, 2, 3, 3]), np.array([2, 0, 1, 0, 3])
    one, two = SampleMask(a, "d"), SampleMask(b, "d")
    np.testing.assert_array_equal((one & two).counts, np.minimum(a, b))
    np.testing.assert_array_equal((one | two).counts, np.maximum(a, b))
    np.testing.assert_array_equal((one - two).counts, np.where(b > 0, 0, a))


@pytest.mark.parametrize("counts", [[0, -1], [0, 256]])
def test_counts_that_a_byte_cannot_hold_are_refused(counts):
    with pytest.raises(ValueError, match="expected 0 to 255"):
        SampleMask(np.array(counts), "d")


def test_counts_of_other_documents_than_are_kept_are_refused(tmp_path):
    SampleMask(np.array([0, 2, 1]), "d").save(tmp_path / "m.npz")
    with np.load(tmp_path / "m.npz") as data:
        values = {**data, "counts": np.array([1, 2, 0], np.uint8)}
    np.savez(tmp_path / "m.npz", **values)
    with pytest.raises(UserError, match="its counts are not of the documents it keeps"):
        SampleMask.load(tmp_path / "m.npz")
