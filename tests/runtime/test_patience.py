from __future__ import annotations

import time

from megatron_direct.runtime.patience import answer_within


def test_a_question_that_is_not_answered_is_not_waited_for():
    start = time.monotonic()
    assert answer_within(0.2, lambda: time.sleep(20)) == []
    assert time.monotonic() - start < 10


def test_an_answer_comes_in_a_list_and_an_error_is_none():
    def gone():
        raise RuntimeError("Connection reset by peer")

    assert answer_within(5, lambda: None) == [None]
    assert answer_within(5, gone) == []
