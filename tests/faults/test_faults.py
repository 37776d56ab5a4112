"""A short draw of `make test-faults` (tests/faults/__main__.py says how to run all of it)."""

from __future__ import annotations

import shutil
import signal
import sys

import pytest
from faults import power
from faults.drive import Bench, Fault
from faults.jobs import JOBS
from faults.launcher import FULL_FOR_GOOD, KILL_ALL

needs_interposer = pytest.mark.skipif(
    shutil.which("cc") is None or not sys.platform.startswith("linux"),
    reason="the interposer needs a C compiler and Linux")


@needs_interposer
def test_a_draw(tmp_path):
    """Of preprocessing, a kill, a power cut and a full disk; of two ranks, one that is killed."""
    bench = Bench(tmp_path / "faults")
    text = JOBS["preprocessing"]
    operations = bench.operations(text, 0)
    assert len(operations) > 50
    drawn = [Fault(KILL_ALL, len(operations) // 3),
             Fault(KILL_ALL, 2 * len(operations) // 3, failing="zeroed"),
             Fault(FULL_FOR_GOOD, len(operations) // 2)]
    verdicts = [bench.meet(text, 0, fault) for fault in drawn]
    verdicts.append(bench.lose_rank(JOBS["pretraining on two ranks"], 0, 1, signal.SIGKILL,
                                    lambda log: "metrics.jsonl" in log))
    bench.close()
    assert [verdict.result for verdict in verdicts] == ["same"] * 4, verdicts
    assert "codes [-9]" in verdicts[0].note and "codes [1]" in verdicts[2].note
    assert "codes [1, -9]" in verdicts[3].note and "no word" not in verdicts[3].note


def test_what_was_flushed_survives_a_power_cut(tmp_path):
    """The log of a program that wrote 8 bytes, of which 3 were flushed, and then 2 of a new file
    that it renamed."""
    (tmp_path / "a").write_bytes(b"abcdefgh")
    (tmp_path / "b").write_bytes(b"xy")
    log = tmp_path / "log"
    log.write_text("".join(f"{number}\t{name}\t{size}\t{tmp_path / path}\t{to}\n" for
                           number, (name, size, path, to) in enumerate((
                               ("empty", -1, "a", ""), ("write", 0, "a", ""), ("sync", 3, "a", ""),
                               ("write", 3, "a", ""), ("empty", -1, "new", ""),
                               ("write", 0, "new", ""), ("rename", -1, "new", tmp_path / "b")), 1)))
    assert power.unsynced(log) == {tmp_path / "a": 3, tmp_path / "b": 0}
    assert power.fail(log, "zeroed") == 2
    assert (tmp_path / "a").read_bytes() == b"abc\0\0\0\0\0"
    assert (tmp_path / "b").read_bytes() == b"\0\0"
