"""Sketches on disk."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_direct.errors import UserError
from megatron_direct.gradients import store


def _write(folder, shares):
    rng = np.random.default_rng(0)
    rows, losses = rng.normal(size=(7, 3)).astype(np.float32), rng.random(7).astype(np.float32)
    for rank, numbers in enumerate(shares):
        writer = store.SketchWriter(folder, rank)
        for number in numbers:
            writer.append(rows[[number]], np.array([number]), losses[[number]])
        writer.close()
    store.finish(folder, {"seed": 1}, 3, len(shares))
    return rows, losses


@pytest.mark.parametrize("shares", [[range(7)], [[4, 0, 6], [5, 1, 2, 3]], [range(7), []]])
def test_rows_come_back_in_the_order_of_samples(tmp_path, shares):
    rows, losses = _write(tmp_path / "s", shares)
    found = store.load(tmp_path / "s")
    np.testing.assert_array_equal(found.samples, range(7))
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_array_equal(found.losses, losses)


def test_only_finished_sketches_of_the_same_identity_count(tmp_path):
    assert not store.is_finished(tmp_path / "s", {"seed": 1})
    writer = store.SketchWriter(tmp_path / "s", 0)
    writer.close()
    assert not store.is_finished(tmp_path / "s", {"seed": 1})
    _write(tmp_path / "s", [range(7)])
    assert store.is_finished(tmp_path / "s", {"seed": 1})
    assert not store.is_finished(tmp_path / "s", {"seed": 2})


def test_a_changed_file_is_named(tmp_path):
    _write(tmp_path / "s", [range(7)])
    with open(tmp_path / "s" / "rows-0.f32", "r+b") as file:
        file.write(b"\x01")
    with pytest.raises(UserError, match="rows-0.f32 is not as it was written. Delete"):
        store.load(tmp_path / "s")


def test_rows_that_are_not_finite_are_marked(tmp_path):
    rows = np.ones((3, 2), dtype=np.float32)
    rows[1, 0] = np.inf
    found = store.Sketches(rows, np.arange(3), np.array([1.0, 1.0, np.nan]))
    np.testing.assert_array_equal(found.finite, [True, False, False])
