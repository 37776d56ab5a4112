"""Sketches on disk: rows that know their sample, whatever is lost behind them."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_direct.errors import UserError
from megatron_direct.gradients.store import Sketches, SketchStore

PASSES = [[range(7)], [[4, 0, 6], [5, 1, 2, 3]], [range(7), []]]
ENTRY_BYTES = 20


def _rows():
    rng = np.random.default_rng(0)
    return rng.normal(size=(7, 3)).astype(np.float32), rng.random(7).astype(np.float32)


def _write(folder, shares, dtype="fp32"):
    """Row i of document i of dataset 0; each share of its own file, row by row."""
    rows, losses = _rows()
    store = SketchStore(folder, 3, dtype)
    store.number_datasets(["d"])
    for number, documents in enumerate(shares):
        writer = store.writer(number)
        for document in documents:
            _append(writer, [document])
        writer.close()
    return store, rows, losses


def _append(writer, documents):
    rows, losses = _rows()
    writer.append(rows[documents], np.zeros(len(documents)), np.array(documents), losses[documents])


def _read(store) -> Sketches:
    entries = store.entries()
    return store.read(entries, entries.document)


@pytest.mark.parametrize("shares", PASSES)
def test_rows_come_back_in_the_order_of_samples(tmp_path, shares):
    store, rows, losses = _write(tmp_path, shares)
    found = _read(store)
    np.testing.assert_array_equal(found.samples, range(7))
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_array_equal(found.losses, losses)


def test_some_rows_can_be_read_alone(tmp_path):
    store, rows, _ = _write(tmp_path, [[4, 0, 6], [5, 1, 2, 3]])
    entries = store.entries()
    wanted = np.isin(entries.document, [1, 6])
    found = store.read(entries[wanted], entries.document[wanted])
    np.testing.assert_array_equal(found.samples, [1, 6])
    np.testing.assert_array_equal(found.rows, rows[[1, 6]])


def test_datasets_keep_their_numbers_when_others_are_added(tmp_path):
    store = SketchStore(tmp_path, 3)
    assert store.datasets() == []
    store.number_datasets(["b", "a"])
    store.number_datasets(["c", "a"])
    assert store.datasets() == ["b", "a", "c"]


def test_a_changed_row_is_named(tmp_path):
    store, *_ = _write(tmp_path, [range(7)])
    with open(tmp_path / "rows-0.f32", "r+b") as file:
        file.write(b"\x01")
    with pytest.raises(UserError, match="row 0 of .*rows-0.f32 is damaged .wrong check.* Delete"):
        _read(store)


def test_a_changed_entry_is_named(tmp_path):
    """Its row would be another sample's."""
    store, *_ = _write(tmp_path, [range(7)])
    with open(tmp_path / "entries-0.bin", "r+b") as file:
        file.write(b"\x05")
    with pytest.raises(UserError, match="row 0 of .*rows-0.f32 is damaged .wrong checksum."):
        _read(store)


def test_rows_that_are_not_finite_are_marked():
    rows = np.ones((3, 2), dtype=np.float32)
    rows[1, 0] = np.inf
    found = Sketches(rows, np.arange(3), np.array([1.0, 1.0, np.nan]))
    np.testing.assert_array_equal(found.finite, [True, False, False])


def test_bf16_rows_are_the_nearest(tmp_path):
    store, rows, losses = _write(tmp_path, [range(7)], "bf16")
    found = _read(store)
    nearest = torch.from_numpy(rows).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(found.rows, nearest)
    np.testing.assert_array_equal(found.losses, losses)
    assert store.num_bytes(7) == rows.nbytes
    assert (tmp_path / "rows-0.bf16").stat().st_size == rows.nbytes // 2


def test_what_is_not_finite_comes_back_as_it_is(tmp_path):
    odd = np.array([[np.nan, -np.inf, 3.4e38]], np.float32)
    odd[0, 0:1].view(np.uint32)[0] = 0x7FFFFFFF  # a NaN that rounding its bits would make -0
    store = SketchStore(tmp_path, 3, "bf16")
    store.number_datasets(["d"])
    writer = store.writer(0)
    writer.append(odd, np.zeros(1), np.zeros(1), np.array([np.nan]))
    writer.close()
    found = _read(store)
    np.testing.assert_array_equal(found.rows, torch.from_numpy(odd).to(torch.bfloat16).float())
    assert np.isnan(found.losses[0]) and not found.finite[0]


@pytest.mark.parametrize(("file", "lost"), [
    ("rows-0.f32", 5), ("rows-0.f32", 12), ("entries-0.bin", 1), ("entries-0.bin", ENTRY_BYTES)])
def test_a_writer_carries_on_after_the_last_row_that_counts(tmp_path, file, lost):
    """A kill cut the third append short: the bytes end up the same."""
    appends = [[4, 0], [6, 5], [1], [3, 2]]

    def append(folder, which):
        store = SketchStore(folder, 3)
        store.number_datasets(["d"])
        writer = store.writer(0)
        for documents in which:
            _append(writer, documents)
        writer.close()
        return store

    append(tmp_path / "whole", appends)
    store = append(tmp_path / "cut", appends[:3])
    path = tmp_path / "cut" / file
    path.write_bytes(path.read_bytes()[:-lost])
    assert store.entries().document.tolist() == [4, 0, 6, 5]
    append(tmp_path / "cut", appends[2:])
    for whole in sorted((tmp_path / "whole").iterdir()):
        assert (tmp_path / "cut" / whole.name).read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("zeroed", [1, 3])
def test_a_tail_of_zeros_does_not_count(tmp_path, zeroed):
    """What a disk leaves of blocks that it was told to keep, and did not: sizes, but no bytes."""
    store, rows, _ = _write(tmp_path, [range(7)])
    for name, width in (("rows-0.f32", 12), ("entries-0.bin", ENTRY_BYTES)):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[: -zeroed * width] + bytes(zeroed * width))
    assert store.entries().document.tolist() == list(range(7 - zeroed))
    writer = store.writer(0)
    _append(writer, list(range(7 - zeroed, 7)))
    writer.close()
    np.testing.assert_array_equal(_read(store).rows, rows)


def test_a_disk_that_is_full_is_reported_and_leaves_what_was_there(tmp_path):
    store, rows, _ = _write(tmp_path, [range(4)])
    writer = store.writer(0)

    class Full:
        """A file on a disk with room for a few bytes more."""

        name = "rows-0.f32"

        def __init__(self, file):
            self._file, self._left = file, 5

        def write(self, view):
            if not self._left:
                raise OSError(28, "No space left on device")
            count = self._file.write(view[: self._left])
            self._left -= count
            return count

        def fileno(self):
            return self._file.fileno()

    writer._rows = Full(writer._rows)
    with pytest.raises(UserError, match="rows-0.f32 cannot be written .No space left on device.*"
                                        "resumes where it stopped"):
        _append(writer, [4, 5])
    assert store.entries().document.tolist() == [0, 1, 2, 3]
    again = store.writer(0)
    _append(again, [4, 5, 6])
    again.close()
    np.testing.assert_array_equal(_read(store).rows, rows)


def test_rows_that_others_append_are_seen_whatever_is_remembered_of_the_files_names(
        tmp_path, monkeypatch):
    """As on NFS, where what a client knows of a name may be a minute old, and opening asks anew."""
    stat, known = Path.stat, {}
    monkeypatch.setattr(Path, "stat", lambda path, **how: known.setdefault(
        (path, *how.items()), stat(path, **how)))
    store, rows, _ = _write(tmp_path, [range(3)])
    assert len(_read(store).samples) == 3
    with contextlib.closing(store.writer(0)) as writer:
        _append(writer, [3, 4, 5, 6])
    np.testing.assert_array_equal(_read(store).rows, rows)
