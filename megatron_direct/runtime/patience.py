"""Questions to what may be gone: such as a store beyond a link that is cut, which never answers."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def answer_within(seconds: float, question: Callable[[], T]) -> list[T]:
    """The answer, in a list; [] where there is an error instead, or nothing in time.

    It is asked in a thread, which nothing can call off: one that never comes back ends with the
    process.
    """
    answers: list[T] = []

    def ask() -> None:
        with contextlib.suppress(Exception):
            answers.append(question())

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[:]
