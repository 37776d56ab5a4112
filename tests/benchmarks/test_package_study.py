"""The study's plan: what is run first; and that no arm is lost, whenever it is killed."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_direct.comparison import measurements  # noqa: F401  (registers all arms)
from megatron_direct.comparison.arms import REGISTRY

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import package_study as study


def test_arms_and_settings_are_what_there_is():
    for stage in study.STAGES:
        assert set(stage.arms) <= set(REGISTRY) and set(stage.settings) <= set(study.SETTINGS)


def test_every_setting_has_every_arm_and_seed_once():
    runs = [(arm, setting, seeds) for stage, seeds, setting in study.order(
        study.STAGES, 3, list(study.SETTINGS)) for arm in stage.arms]
    assert len(runs) == len(set(runs))
    for setting in study.MOST_IMPORTANT:
        assert {arm for arm, name, _ in runs if name == setting} == {
            *study.FIRST, *study.DECISIONS, *study.RIVALS, *study.CEILING}


@pytest.mark.parametrize("scale", study.SCALES)
def test_an_annealing_is_at_least_a_tenth_of_the_stable_phase(scale):
    """In tokens, of which a document of the studies that were run has 357 or more: 2.5 M in 7,000,
    with the larger vocabulary (docs/results.md)."""
    size = study.SCALES[scale]
    stable = size.stable * size.global_batch * size.seq_length
    for setting in study.SETTINGS.values():
        assert setting.length * size.pool * 357 >= 0.1 * stable


@pytest.mark.parametrize("settings", [list(study.SETTINGS), ["other", "noisy"]])
def test_the_first_stage_has_all_seeds_before_the_next_begins(settings):
    plan = list(study.order(study.STAGES, 3, settings))
    first = [(seeds, name) for stage, seeds, name in plan if stage == study.STAGES[0]]
    wanted = [name for name in study.MOST_IMPORTANT if name in settings]
    assert first == [(seeds, name) for seeds in (1, 2, 3) for name in wanted]
    assert [stage for stage, _, _ in plan[: len(first)]] == [study.STAGES[0]] * len(first)


class _Recorded:
    """In the place of a study: a call waits for another of the same seed, unless it is alone."""

    def __init__(self, folder: Path, at_once: int):
        self.folder, self.calls = folder, []
        self._together = threading.Barrier(at_once)

    def compare(self, name: str, num_seeds: int, _flags) -> None:
        self._together.wait(timeout=30)
        self.calls.append((num_seeds, name))
        if (num_seeds, name) == (2, "clean"):
            raise subprocess.CalledProcessError(1, "compare")


@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_settings_are_run_at_once_and_seeds_one_after_the_other(at_once, tmp_path):
    recorded = _Recorded(tmp_path, at_once)
    stage = study.Stage(("random",), study.MOST_IMPORTANT)
    work = study.Work(recorded, (), float("inf"), None, study.MOST_IMPORTANT, at_once)
    outcomes = work.run(study.order([stage], 3, study.MOST_IMPORTANT))
    assert [piece for piece, outcome in outcomes.items() if outcome is study.Outcome.FAILED] == [
        (stage, 2, "clean")]
    assert len(outcomes) == 12
    assert [seeds for seeds, _ in recorded.calls] == [1] * 4 + [2] * 4 + [3] * 4
    assert len(set(recorded.calls)) == 12


def test_nothing_begins_when_the_time_is_over(tmp_path):
    recorded = _Recorded(tmp_path, 1)
    work = study.Work(recorded, (), 0.0, None, study.MOST_IMPORTANT)
    assert not work.failing(study.order(study.STAGES[:1], 3, study.MOST_IMPORTANT))
    assert not recorded.calls


class _Calls:
    """In the place of a study whose comparisons fail after something was done."""

    def __init__(self, folder: Path, do: Callable[[], None]):
        self.folder, self.calls, self._do = folder, [], do

    def compare(self, name: str, num_seeds: int, _flags) -> None:
        self.calls.append((num_seeds, name))
        self._do()
        raise subprocess.CalledProcessError(1, "compare")


def test_what_failed_has_failed_where_no_time_is_left_to_try_again(tmp_path, monkeypatch):
    clock = iter([0.0, 2.0])
    monkeypatch.setattr(study.time, "monotonic", lambda: next(clock))
    failing = _Calls(tmp_path, lambda: None)
    piece = (study.Stage(("random",), ("clean",)), 1, "clean")
    work = study.Work(failing, (), ends=1.0, results=None, settings=("clean",))
    assert work.failing([piece]) == [piece] and failing.calls == [(1, "clean")]


def test_after_ctrl_c_nothing_else_is_begun(tmp_path):
    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)  # the piece that runs takes a while to end

    interrupted = _Calls(tmp_path, interrupt)
    work = study.Work(interrupted, (), float("inf"), None, study.MOST_IMPORTANT)
    # A shell that has put the tests into the background has them ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            work.failing(study.order(study.STAGES[:1], 3, study.MOST_IMPORTANT))
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(interrupted.calls) == 1


# --- a run ------------------------------------------------------------------------------------


def _write_text(folder: Path) -> Path:
    """Made-up text, laid out as by tools/pypi_text.py; other words are frequent in each domain."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghijklmnop"), rng.integers(2, 9)))
             for _ in range(1200)]
    for part, count in (("pretrain", 120), ("pool", 120), ("valid", 24), ("test", 24)):
        (folder / part).mkdir(parents=True)
        for number, domain in enumerate((*study.MAIN, *study.OTHERS)):
            with gzip.open(folder / part / f"{domain}.jsonl.gz", "wt") as file:
                for passage in range(count):
                    ranks = (rng.zipf(1.3, 150) - 1 + 150 * number) % len(words)
                    file.write(json.dumps({"text": " ".join(words[rank] for rank in ranks),
                                           "file": f"{part}-{domain}-{passage}",
                                           "package": part}) + "\n")
    return folder


_ARMS = ("random", "perplexity-high", "influence-select", "direct")


@pytest.fixture
def begin():
    """Begins a study of the text in a folder, in a process group of its own; none outlives the
    test."""
    begun = []

    def begin(text: Path, folder: Path) -> subprocess.Popen:
        folder.mkdir(exist_ok=True)
        command = [sys.executable, study.__file__, "--scale", "tiny", "--settings", "clean",
                   "--arms", *_ARMS, "--num-seeds", "1", "--text", text, "--folder",
                   folder / "runs", "--results", folder / "results.md"]
        with open(folder / "log", "a") as log:
            begun.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))
        return begun[-1]

    yield begin
    for process in begun:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _finished(folder: Path) -> int:
    return len(list(folder.glob("runs/clean/arms/*/1/result.json")))


def _table_of_losses(folder: Path) -> list[str]:
    text = (folder / "results.md").read_text()
    start = text.index("mean test loss |")
    return text[start:text.index("\n\n", start)].splitlines()


@pytest.mark.slow
def test_a_study_that_is_killed_carries_on_to_the_same_table(tmp_path, begin):
    text = _write_text(tmp_path / "text")
    assert begin(text, tmp_path / "whole").wait(600) == 0
    killed = begin(text, tmp_path / "killed")
    while not _finished(tmp_path / "killed"):
        assert killed.poll() is None, (tmp_path / "killed" / "log").read_text()[-3000:]
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert 1 <= _finished(tmp_path / "killed") < len(_ARMS)
    assert not (tmp_path / "killed" / "results.md").exists()
    assert begin(text, tmp_path / "killed").wait(600) == 0
    table = _table_of_losses(tmp_path / "killed")
    assert table == _table_of_losses(tmp_path / "whole")
    assert all(any(f"`{arm}` " in line for line in table) for arm in _ARMS)
