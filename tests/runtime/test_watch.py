"""A rank that is gone is found by the one that looks after it, and named."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch

from megatron_direct.runtime import watch


@pytest.fixture
def rank():
    """A process, and its sign of life."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process, watch.Sign(process.pid, "n1", watch._machine(),
                              psutil.Process(process.pid).create_time(), "anneal, iteration 5", 1)
    process.kill()
    process.wait()


def _await(process, status):
    while psutil.Process(process.pid).status() != status:
        time.sleep(0.01)


def test_one_that_lives_is_left_alone(rank):
    _, sign = rank
    neighbour = watch._Neighbour(2)
    for now in range(1000):
        assert neighbour.what_is_wrong(dataclasses.replace(sign, count=now), now) is None


def test_one_that_died_is_named_at_once(rank):
    process, sign = rank
    process.kill()
    _await(process, psutil.STATUS_ZOMBIE)
    words = f"rank 2 .process {process.pid} on n1. died at anneal, iteration 5"
    assert re.match(words, watch._Neighbour(2).what_is_wrong(sign, 1.0))
    assert watch._Neighbour(2).what_is_wrong(dataclasses.replace(sign, has_left=True), 1.0) is None


def test_another_process_of_the_same_number_is_not_it(rank):
    _, sign = rank
    found = watch._Neighbour(2).what_is_wrong(dataclasses.replace(sign, started=1.0), 1.0)
    assert "rank 2" in found and "died" in found


def test_one_that_is_stopped_is_ended_in_time(rank):
    process, sign = rank
    neighbour = watch._Neighbour(2)
    process.send_signal(signal.SIGSTOP)
    _await(process, psutil.STATUS_STOPPED)
    assert neighbour.what_is_wrong(sign, 100.0) is None
    process.send_signal(signal.SIGCONT)  # a scheduler suspends jobs, and lets them go on
    _await(process, psutil.STATUS_SLEEPING)
    assert neighbour.what_is_wrong(dataclasses.replace(sign, count=2), 125.0) is None
    process.send_signal(signal.SIGSTOP)
    _await(process, psutil.STATUS_STOPPED)
    sign = dataclasses.replace(sign, count=3)
    assert neighbour.what_is_wrong(sign, 126.0) is None
    assert neighbour.what_is_wrong(sign, 155.0) is None
    assert "was stopped at anneal, iteration 5 (SIGSTOP)" in neighbour.what_is_wrong(sign, 157.0)
    assert process.wait(10) == -signal.SIGKILL


def test_one_on_another_machine_is_lost_when_it_is_silent(rank):
    _, sign = rank
    sign = dataclasses.replace(sign, machine="another")
    neighbour = watch._Neighbour(2)
    assert neighbour.what_is_wrong(sign, 100.0) is None
    assert neighbour.what_is_wrong(sign, 139.0) is None
    assert "no sign of life for 40 s at anneal" in neighbour.what_is_wrong(sign, 141.0)


def test_one_on_this_machine_that_is_at_work_is_not_lost(rank):
    """As while Megatron holds Python's lock for an index of a thousand million documents."""
    process, sign = rank
    neighbour = watch._Neighbour(2)
    own = dataclasses.replace(sign, pid=os.getpid(), started=psutil.Process().create_time())
    assert all(neighbour.what_is_wrong(own, now) is None for now in (100.0, 160.0))
    _await(process, psutil.STATUS_SLEEPING)
    assert neighbour.what_is_wrong(sign, 199.0) is None
    assert "no sign of life for 40 s at anneal" in neighbour.what_is_wrong(sign, 201.0)


def test_after_being_suspended_oneself_nobody_is_to_blame(rank):
    _, sign = rank
    sign = dataclasses.replace(sign, machine="another")
    neighbour = watch._Neighbour(2)
    assert neighbour.what_is_wrong(sign, 100.0) is None
    neighbour.excuse(5000.0)
    assert neighbour.what_is_wrong(sign, 5001.0) is None


def test_a_process_ends_with_the_one_that_started_it():
    """As Megatron's server for checkpoints has to."""
    child = ("import sys, time; from megatron_direct.runtime import watch; "
             "watch.end_with_parent(int(sys.argv[1])); print('up', flush=True); time.sleep(60)")
    parent = subprocess.Popen(
        [sys.executable, "-c", "import os, subprocess, sys; p = subprocess.Popen([sys.executable, "
         f"'-c', {child!r}, str(os.getpid())], stdout=subprocess.PIPE); p.stdout.readline(); "
         "print(p.pid, flush=True); p.wait()"], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    assert psutil.pid_exists(pid)
    parent.kill()
    parent.wait()
    psutil.Process(pid).wait(10)


def test_the_first_sign_is_given_at_the_start(monkeypatch):
    """A rank that dies within its first second can be named."""
    monkeypatch.setattr(watch, "_SECONDS_BETWEEN_SIGNS", 60.0)
    store = torch.distributed.HashStore()
    ours = watch.Watch(store, 0, 2, None)
    ours.start()
    try:
        assert json.loads(store.get("alive/0"))["pid"] == os.getpid()
    finally:
        ours.end()
    assert json.loads(store.get("alive/0"))["has_left"]


class _BeyondACutLink:
    """A store whose answers never come."""

    def __init__(self):
        self.set_once = threading.Event()

    def set(self, key, value):
        if self.set_once.is_set():
            threading.Event().wait()
        self.set_once.set()

    def clone(self):
        threading.Event().wait()


def test_a_store_that_does_not_answer_is_given_up(monkeypatch):
    said, ended = [], threading.Event()
    monkeypatch.setattr(watch, "_say", said.append)
    monkeypatch.setattr(watch, "_exit", lambda code: ended.set())
    monkeypatch.setattr(watch, "_SECONDS_BETWEEN_SIGNS", 0.05)
    monkeypatch.setattr(watch, "_SECONDS_UNTIL_SILENT", 0.3)
    monkeypatch.setattr(watch, "_SECONDS_TO_END", 0.1)
    ours = watch.Watch(_BeyondACutLink(), 3, 4, None)
    ours.start()
    assert ended.wait(30)
    assert "rank 3 lost the launcher's store" in said[0] and "it resumes" in said[0]
    ours.leave("an error")  # neither waits for an answer
    ours.end()
