"""What cannot be written is named with a remedy; what dead processes left is cleared away."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time

import pytest

from megatron_direct.errors import UserError
from megatron_direct.runtime import files


@pytest.mark.parametrize(("number", "remedy"), [
    (errno.ENOSPC, "Free some space"), (errno.EDQUOT, "quota"), (errno.EROFS, "Mount"),
    (errno.EACCES, "permission"), (errno.EIO, "Check the disk"), (errno.ESTALE, "removed")])
def test_a_file_that_cannot_be_written_is_named(tmp_path, monkeypatch, number, remedy):
    def fail(_):
        raise OSError(number, os.strerror(number))

    files.write_json(tmp_path / "x.json", "old")
    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(UserError, match=rf"x.json cannot be written .*{remedy}.*run the command "
                                        "again"):
        files.write_json(tmp_path / "x.json", "new")
    assert files.read_json(tmp_path / "x.json") == "old"
    assert os.listdir(tmp_path) == ["x.json"]


def test_an_error_of_another_file_passes(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"), \
            files.written_whole(tmp_path / "out" / "x"):
        open("/missing/file").close()


def test_an_append_is_whole_or_an_error(tmp_path):
    """A raw file may take a part of what it is given."""
    class Slow:
        name, taken = "rows", b""

        def write(self, view):
            self.taken += bytes(view[:2])
            return min(2, len(view))

        def fileno(self):
            return os.open(tmp_path, os.O_RDONLY)

    file = Slow()
    files.append(file, b"abcde")
    assert file.taken == b"abcde"


def test_what_dead_processes_left_is_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = files._host()
    left = {
        "dead": tmp_path / "a" / f".x.json.{host}.{dead.pid}.partial",
        "alive": tmp_path / f".x.json.{host}.{os.getppid()}.partial",
        "elsewhere": tmp_path / f".x.json.00000000.{dead.pid}.partial",
        "elsewhere, old": tmp_path / f".y.json.00000000.{dead.pid}.partial",
        "a user's": tmp_path / ".notes.partial",
    }
    (tmp_path / "a").mkdir()
    for path in left.values():
        path.touch()
    old = time.time() - 2 * files._ABANDONED_SECONDS
    os.utime(left["elsewhere, old"], (old, old))
    files.remove_partial(tmp_path)
    assert {name for name, path in left.items() if path.exists()} == {
        "alive", "elsewhere", "a user's"}
