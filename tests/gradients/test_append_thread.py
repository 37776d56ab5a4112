"""Rows that a thread writes are those that the caller would have written."""

from __future__ import annotations

import contextlib
import signal

import numpy as np
import pytest

from megatron_direct.errors import UserError
from megatron_direct.gradients.append_thread import AppendThread
from megatron_direct.gradients.store import SketchStore
from megatron_direct.runtime.stopping import Stopped

SIZE, PASSES = 64, 12


def _store(folder):
    store = SketchStore(folder, SIZE)
    store.number_datasets(["d"])
    return store


def _passes():
    """Rows, datasets, documents and losses of passes of 1 to 4 samples."""
    rng = np.random.default_rng(0)
    first = 0
    for number in range(PASSES):
        count = 1 + number % 4
        yield (rng.normal(size=(count, SIZE)).astype(np.float32), np.zeros(count, np.int64),
               first + np.arange(count), rng.random(count).astype(np.float32))
        first += count


def _written(folder, wrap):
    store = _store(folder)
    with contextlib.closing(wrap(store.writer(0))) as writer:
        for of_pass in _passes():
            writer.append(*of_pass)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_bytes_are_those_of_a_caller_that_writes_itself(tmp_path):
    expected = _written(tmp_path / "caller", lambda writer: writer)
    assert _written(tmp_path / "thread", AppendThread) == expected


def test_an_append_waits_for_the_one_before_it(tmp_path):
    """So memory is bounded, however slow the disk."""
    store = _store(tmp_path)
    handed_over = 0
    with contextlib.closing(AppendThread(store.writer(0))) as writer:
        for of_pass in _passes():
            writer.append(*of_pass)
            assert len(store.entries()) >= handed_over
            handed_over += len(of_pass[0])
    assert len(store.entries()) == handed_over


def _full_after_one_pass(store):
    """A writer whose disk has no room for the second pass, and the later passes."""
    writer = store.writer(0)
    first, *others = _passes()
    writer.append(*first)
    writer._rows.close()
    writer._rows = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    return AppendThread(writer), others


def test_an_error_of_the_disk_is_raised_by_the_next_append_which_writes_nothing(tmp_path):
    store = _store(tmp_path)
    writer, (second, third, *_) = _full_after_one_pass(store)
    writer.append(*second)
    with pytest.raises(UserError, match="cannot be written .No space left on device.*resumes"):
        writer.append(*third)
    writer.close()  # it was told once
    assert store.entries().document.tolist() == [0]


def test_an_error_of_the_last_append_is_raised_at_the_end(tmp_path):
    store = _store(tmp_path)
    writer, (second, *_) = _full_after_one_pass(store)
    writer.append(*second)
    with pytest.raises(UserError, match="cannot be written .No space left on device"):
        writer.close()
    assert writer._writer._entries.closed
    assert store.entries().document.tolist() == [0]


@pytest.mark.parametrize("error", [Stopped(signal.SIGTERM), RuntimeError("a rank was lost")])
def test_a_stop_leaves_every_row_that_was_handed_over(tmp_path, error):
    store = _store(tmp_path)
    expected = [of_pass[0] for of_pass in _passes()][:5]
    with pytest.raises(type(error)), \
            contextlib.closing(AppendThread(store.writer(0))) as writer:
        for number, of_pass in enumerate(_passes()):
            if number == len(expected):
                raise error
            writer.append(*of_pass)
    entries = store.entries()
    np.testing.assert_array_equal(store.read(entries, entries.document).rows,
                                  np.concatenate(expected))
