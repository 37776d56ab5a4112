"""Who speaks of an error, and when the store through which ranks agree on it is out of reach."""

from __future__ import annotations

import time

import pytest

from megatron_direct.runtime import parallel


def test_a_store_that_does_not_answer_is_not_waited_for():
    with parallel.process_group():
        start = time.monotonic()
        assert parallel._answered(lambda store: time.sleep(20), 0.2) == []
        assert time.monotonic() - start < 10
        assert parallel._answered(lambda store: store.add("count", 1), 5) == [1]

        def gone(store):
            raise RuntimeError("Connection reset by peer")

        assert parallel._answered(gone, 5) == []


def test_a_rank_alone_speaks(capsys):
    parallel.speak_once("no group yet")
    with parallel.process_group():
        parallel.speak_once("in a group of one")
    assert capsys.readouterr().err == "no group yet\nin a group of one\n"


@pytest.mark.parametrize(("error", "is_lost"), [
    (RuntimeError("[pair.cc:553] Connection closed by peer [::1]:4. This is typically x"), True),
    (RuntimeError("Timed out waiting 60000ms for recv operation to complete"), True),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    (ValueError("Connection closed by peer"), False)])
def test_another_ranks_absence_is_told_from_other_errors(error, is_lost):
    with parallel.process_group():
        text = parallel.lost_rank(error)
    assert bool(text) == is_lost and "typically" not in text
