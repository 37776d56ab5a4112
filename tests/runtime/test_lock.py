"""One command at a time works in a folder; a holder that is killed leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from megatron_direct.errors import UserError
from megatron_direct.runtime import lock

_HOLDER = """
import os, sys, time
from pathlib import Path
from megatron_direct.runtime.lock import Lock
folder = Path(sys.argv[1])
Lock(folder / ".lock", folder, "megatron-direct anneal").acquire()
if sys.argv[2] == "fork" and os.fork() == 0:
    print(os.getpid(), flush=True)
    time.sleep(60)
if sys.argv[2] != "fork":
    print(os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Starts processes that hold the folder's lock."""
    started = []

    def start(how=""):
        process = subprocess.Popen([sys.executable, "-c", _HOLDER, str(tmp_path), how],
                                   stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process, int(process.stdout.readline())

    yield start
    for process in started:
        process.kill()
        process.wait()


def _lock(folder):
    return lock.Lock(folder / lock.NAME, folder, "megatron-direct select")


def test_the_second_is_told_who_holds_it(tmp_path, holder, monkeypatch):
    process, _ = holder()
    monkeypatch.setattr(lock, "_PATIENCE_SECONDS", 0.2)
    with pytest.raises(UserError, match=rf"{tmp_path} is in use: megatron-direct anneal .process "
                                        rf"{process.pid} on .*since 20.* Wait for it to end"):
        _lock(tmp_path).acquire()


@pytest.mark.parametrize("how", ["", "fork"])
def test_a_killed_holder_leaves_no_lock(tmp_path, holder, how):
    """Nor does a child that it forked, and that lives on."""
    process, child = holder(how)
    process.send_signal(signal.SIGKILL)
    process.wait()
    own = _lock(tmp_path)
    own.acquire()
    assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()
    own.release()
    assert not list(tmp_path.iterdir())
    if how:
        os.kill(child, signal.SIGKILL)


def test_it_waits_for_one_that_is_dying(tmp_path, holder):
    process, _ = holder()
    dies = tmp_path.parent / f"{tmp_path.name}-dies"
    subprocess.Popen(["sh", "-c", f"sleep 0.5; touch {dies}; kill -9 {process.pid}"])
    own = _lock(tmp_path)
    own.acquire()
    assert dies.exists()
    own.release()


def test_one_that_waits_says_so_once_and_goes_on(tmp_path, holder, monkeypatch, capsys):
    process, _ = holder()
    monkeypatch.setattr(lock, "_PATIENCE_SECONDS", 0.0)
    subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {process.pid}"])
    own = lock.Lock(tmp_path / lock.NAME, tmp_path, "megatron-direct compare", waits=True)
    own.acquire()
    own.release()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and said[0].startswith(f"{tmp_path} is in use: megatron-direct anneal")


def test_a_folder_that_is_removed_is_noticed(tmp_path):
    folder = tmp_path / "run"
    own = _lock(folder)
    own.acquire()
    assert own.is_held() and own.what_is_lost() is None
    shutil.rmtree(folder)
    assert "was removed, or replaced, while megatron-direct select" in own.what_is_lost()
    folder.mkdir()
    other = _lock(folder)
    other.acquire()  # of the same name, and another file
    assert not own.is_held()
    own.release()
    assert other.is_held()
    other.release()
    assert own.what_is_lost() is None  # nobody works in it any more


def test_a_file_system_without_locks_is_worth_a_word(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", refuse)
    own = _lock(tmp_path)
    own.acquire()
    assert "on a file system without locks (No locks available)" in capsys.readouterr().err
    own.release()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/run/.lock cannot be written .Not a directory.*"
                                        "a part of the path is a file"):
        _lock(tmp_path / "file" / "run").acquire()
