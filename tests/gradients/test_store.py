"""Sketches on disk."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_direct.errors import UserError
from megatron_direct.gradients import store

PASSES = [[range(7)], [[4, 0, 6], [5, 1, 2, 3]], [range(7), []]]


def _rows():
    rng = np.random.default_rng(0)
    return rng.normal(size=(7, 3)).astype(np.float32), rng.random(7).astype(np.float32)


def _write(folder, shares, dtype="fp32"):
    rows, losses = _rows()
    store.begin(folder, {"layout": 1})
    for rank, numbers in enumerate(shares):
        writer = store.SketchWriter(folder, rank, 3, dtype)
        for number in numbers:
            writer.append(rows[[number]], np.array([number]), losses[[number]])
        writer.close()
    store.finish(folder, {"seed": 1}, 3, len(shares), dtype)
    return rows, losses


@pytest.mark.parametrize("shares", PASSES)
def test_rows_come_back_in_the_order_of_samples(tmp_path, shares):
    rows, losses = _write(tmp_path / "s", shares)
    found = store.load(tmp_path / "s")
    np.testing.assert_array_equal(found.samples, range(7))
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_array_equal(found.losses, losses)


def test_only_finished_sketches_of_the_same_identity_count(tmp_path):
    assert not store.is_finished(tmp_path / "s", {"seed": 1})
    store.begin(tmp_path / "s", {})
    store.SketchWriter(tmp_path / "s", 0, 3).close()
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


def test_bf16_rows_are_the_nearest(tmp_path):
    rows, losses = _write(tmp_path / "s", [range(7)], "bf16")
    found = store.load(tmp_path / "s")
    nearest = torch.from_numpy(rows).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(found.rows, nearest)
    np.testing.assert_array_equal(found.losses, losses)
    assert store.num_bytes(tmp_path / "s") == rows.nbytes
    assert (tmp_path / "s" / "rows-0.bf16").stat().st_size == rows.nbytes // 2


def test_bf16_keeps_what_is_not_finite(tmp_path):
    odd = np.array([[np.nan, -np.inf, 3.4e38]], np.float32)
    odd[0, 0:1].view(np.uint32)[0] = 0x7FFFFFFF  # a NaN that rounding its bits would make -0
    store.begin(tmp_path, {})
    writer = store.SketchWriter(tmp_path, 0, 3, "bf16")
    writer.append(odd, np.array([0]), np.ones(1))
    writer.close()
    store.finish(tmp_path, {}, 3, 1, "bf16")
    found = store.load(tmp_path)
    np.testing.assert_array_equal(found.rows, torch.from_numpy(odd).to(torch.bfloat16).float())
    assert not found.finite[0]


@pytest.mark.parametrize("cut", ["rows-0.f32", "samples-0.i64", "losses-0.f32", "passes-0.i64"])
def test_a_writer_carries_on_behind_the_last_whole_pass(tmp_path, cut):
    """Killed anywhere in the third pass: two are there, and the bytes end up the same."""
    rows, losses = _rows()
    passes = [[4, 0], [6, 5], [1, 2], [3]]

    def append(folder, which, done=0):
        writer = store.SketchWriter(folder, 0, 3, passes=done)
        for numbers in which:
            writer.append(rows[numbers], np.array(numbers), losses[numbers])
        writer.close()

    assert not store.begin(tmp_path / "whole", {"layout": 1})
    append(tmp_path / "whole", passes)
    assert not store.begin(tmp_path / "cut", {"layout": 1})
    append(tmp_path / "cut", passes[:3])
    path = tmp_path / "cut" / cut
    path.write_bytes(path.read_bytes()[:-5])
    assert store.begin(tmp_path / "cut", {"layout": 1})
    done = len(store.finished_passes(tmp_path / "cut", 0, 3))
    assert done == 2
    append(tmp_path / "cut", passes[done:], done)
    for file in sorted((tmp_path / "whole").iterdir()):
        assert (tmp_path / "cut" / file.name).read_bytes() == file.read_bytes()


def test_rows_of_another_plan_are_not_carried_on_with(tmp_path):
    _write(tmp_path, [range(7)])
    assert not store.begin(tmp_path, {"layout": 2})
    assert len(store.finished_passes(tmp_path, 0, 3)) == 0
