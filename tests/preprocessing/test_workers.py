"""Workers: what they are given, and what becomes of their errors and their deaths."""

from __future__ import annotations

import functools
import os
import signal
import time
from pathlib import Path

import pytest

from megatron_direct.errors import UserError
from megatron_direct.preprocessing import workers


class Worker:
    """Takes a number, and does as the class that is made of it says."""

    def __init__(self, folder: Path | None = None):
        self._folder = folder
        if folder is not None:
            (folder / f"{os.getpid()}").touch()

    def __call__(self, number: int):
        return number**2


class KilledAtThree(Worker):
    def __call__(self, number: int):
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return number


class FailsAtThree(Worker):
    def __call__(self, number: int):
        if number == 3:
            raise EOFError("of the task, not of the pipe")
        return number


class CannotStart(Worker):
    def __init__(self):
        raise UserError("no tokenizer")

    def __call__(self, task):
        return task


class Large(Worker):
    def __call__(self, task: bytes):
        return task * 2


class Slow(Worker):
    def __call__(self, number: int):
        time.sleep(0.3)
        (self._folder / f"done-{number}").touch()
        return number


@pytest.mark.parametrize("count", [1, 2])
def test_all_tasks_are_done_and_drawn_as_they_are_needed(count):
    drawn = []

    def tasks():
        for number in range(20):
            drawn.append(number)
            yield number

    results = []
    for result in workers.work_through(Worker, tasks(), count):
        results.append(result)
        assert len(drawn) <= len(results) + count + 1
    assert sorted(results) == [n**2 for n in range(20)]


def test_a_worker_is_made_once_in_each_process(tmp_path):
    list(workers.work_through(functools.partial(Worker, tmp_path), range(20), 3))
    made = {int(path.name) for path in tmp_path.iterdir()}
    assert len(made) == 3 and os.getpid() not in made


def test_tasks_and_results_larger_than_a_pipe(tmp_path):
    tasks = [bytes([n]) * (1 << 20) for n in range(6)]
    assert sorted(workers.work_through(Large, tasks, 2)) == [task * 2 for task in tasks]


def test_a_killed_worker_is_reported():
    with pytest.raises(UserError, match="a worker process was killed.*resumes"):
        list(workers.work_through(KilledAtThree, range(20), 2))


@pytest.mark.parametrize("count", [1, 2])
def test_an_error_of_a_worker_is_raised_here(count):
    with pytest.raises(EOFError, match="of the task") as error:
        list(workers.work_through(FailsAtThree, range(20), count))
    assert count == 1 or "in __call__" in str(error.value.__cause__)


@pytest.mark.parametrize("task", [1, bytes(1 << 22)])
def test_an_error_at_the_start_is_raised_here(task):
    with pytest.raises(UserError, match="no tokenizer"):
        list(workers.work_through(CannotStart, [task] * 3, 2))


def test_tasks_that_are_begun_are_finished(tmp_path):
    """Who stops to ask for results does not leave a file half written."""
    results = workers.work_through(functools.partial(Slow, tmp_path), range(20), 2)
    first = next(results)
    results.close()
    done = len(list(tmp_path.glob("done-*")))
    assert (tmp_path / f"done-{first}").exists() and 2 <= done <= 4
    time.sleep(0.5)
    assert len(list(tmp_path.glob("done-*"))) == done
