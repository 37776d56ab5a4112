"""Runs of the launcher, from their beginning to the end, with what is to befall them.

``Bench`` keeps one folder: the data, the launcher, and for each job what a run without a fault
leaves after every command. A case starts from there, meets its fault, runs the command again, and
compares.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from faults import jobs, power
from faults.jobs import Job
from faults.launcher import NOTHING, Outcome, Request

HERE = Path(__file__).parent
# Far above what any run here takes on a busy machine; a run that takes longer hangs.
LIMIT_SECONDS = 150.0


@dataclass(frozen=True)
class Fault:
    """what, at, rank: as in a Request; failing: how the power then fails, or "" if it does not."""

    what: int
    at: int
    rank: int = 0
    failing: str = ""


@dataclass(frozen=True)
class Verdict:
    """result: same, differs, jam or error; note: what a person wants to know of it."""

    result: str
    note: str = ""
    seconds: float = 0.0


class Run:
    """One that was started. ``pids`` of its ranks, in their order."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._pids: list[int] = []

    @property
    def pids(self) -> list[int]:
        path = self.folder / "pids.json"
        while not self._pids:
            with contextlib.suppress(FileNotFoundError, ValueError):
                self._pids = json.loads(path.read_text())
            time.sleep(0.005)
        return self._pids

    @property
    def output(self) -> str:
        path = self.folder / "output.txt"
        return path.read_text(errors="replace") if path.is_file() else ""

    @property
    def operations(self) -> Path:
        return self.folder / "operations.txt"

    def wait(self) -> Outcome | None:
        """None for one that hung; it is killed."""
        limit = time.monotonic() + LIMIT_SECONDS
        while not (self.folder / "outcome.json").is_file():
            if time.monotonic() > limit:
                self.kill()
                return None
            time.sleep(0.01)
        return Outcome(**json.loads((self.folder / "outcome.json").read_text()))

    def kill(self) -> None:
        """All ranks at once, and what they started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pids[0], signal.SIGKILL)

    def left_behind(self) -> list[int]:
        """Processes of its group that are still there, some seconds after it has ended."""
        limit = time.monotonic() + 5.0
        while left := _of_group(self.pids[0]):
            if time.monotonic() > limit:
                return left
            time.sleep(0.1)
        return []


class Bench:
    def __init__(self, folder: Path):
        self.folder, self.data, self.run = folder, folder / "data", folder / "run"
        self._count = 0
        folder.mkdir(parents=True, exist_ok=True)
        library = folder / "interposer.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", str(library),
                        str(HERE / "interposer.c"), "-ldl"], check=True)
        root = str(HERE.parents[1])
        self._launcher = subprocess.Popen(
            [sys.executable, str(HERE / "launcher.py")], text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env={
                **os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])})
        assert self._launcher.stdout is not None
        if self._launcher.stdout.readline() != "ready\n":
            raise RuntimeError("the launcher did not start")
        if not self.data.is_dir():
            self.data.mkdir()
            jobs.prepare(self.data)

    def close(self) -> None:
        assert self._launcher.stdin is not None
        self._launcher.stdin.close()
        self._launcher.wait()

    def start(self, job: Job, command: str, fault: Fault | None = None) -> Run:
        if command in jobs.FROM_CHECKPOINT and not (self.data / "theta").is_dir():
            made = self.start(jobs.JOBS["one rank"], "theta").wait()
            assert made is not None and made.codes == [0], made
        fault = fault or Fault(NOTHING, 0)
        self._count += 1
        folder = self.folder / "runs" / f"{os.getpid()}-{self._count}"
        folder.mkdir(parents=True)
        request = Request(str(folder), job.ranks,
                          jobs.arguments(command, self.data, self.run, job.layout),
                          str(self.run), fault.what, fault.at, fault.rank)
        assert self._launcher.stdin is not None
        print(json.dumps(dataclasses.asdict(request)), file=self._launcher.stdin, flush=True)
        return Run(folder)

    def after(self, job: Job, number: int) -> Path:
        """What a run without a fault leaves after so many commands; made where it is not there."""
        folder = self.folder / "unbroken" / job.name.replace(" ", "-")
        if not (folder / "done").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            self._clear()
            self.run.mkdir()
            shutil.copytree(self.run, folder / "0")
            for index, command in enumerate(job.commands):
                run = self.start(job, command)
                outcome = run.wait()
                if outcome is None or any(outcome.codes):
                    raise RuntimeError(f"{job.name}, {command}: {outcome}\n{run.output}")
                shutil.copytree(self.run, folder / str(index + 1))
                shutil.copy(run.operations, folder / f"operations-{index}.txt")
                (folder / f"seconds-{index}").write_text(str(outcome.seconds))
            (folder / "done").touch()
        return folder / str(number)

    def operations(self, job: Job, number: int) -> list[list[str]]:
        """Of rank 0 in a command without a fault: [number, name, size, path, new path]."""
        text = (self.after(job, number).parent / f"operations-{number}.txt").read_text()
        return [line.split("\t") for line in text.splitlines()]

    def seconds(self, job: Job, number: int) -> float:
        return float((self.after(job, number).parent / f"seconds-{number}").read_text())

    def reset(self, job: Job, number: int) -> None:
        """The run as it is before a command."""
        before = self.after(job, number)
        self._clear()
        shutil.copytree(before, self.run)

    def _clear(self) -> None:
        shutil.rmtree(self.run, ignore_errors=True)

    def meet(self, job: Job, number: int, fault: Fault) -> Verdict:
        """A command with a fault at an operation on a file, and once more without it."""
        self.reset(job, number)
        run = self.start(job, job.commands[number], fault)
        outcome = run.wait()
        if outcome is None:
            return Verdict("jam", f"did not end after the fault: {run.output[-500:]}")
        if "Traceback" in run.output:
            return Verdict("error", run.output[-900:], outcome.seconds)
        lost = power.fail(run.operations, fault.failing) if fault.failing else 0
        verdict = self.again(job, number)
        note = f"codes {outcome.codes}" + (f", {lost} files lost data" if fault.failing else "")
        return dataclasses.replace(verdict, note=f"{note}; {verdict.note}",
                                   seconds=outcome.seconds)

    def again(self, job: Job, number: int) -> Verdict:
        """The command without a fault: whatever happened, it ends, and with the same bytes."""
        again = self.start(job, job.commands[number])
        outcome = again.wait()
        if outcome is None:
            return Verdict("jam", f"the next start did not end: {again.output[-500:]}")
        if any(outcome.codes):
            return Verdict("jam", f"the next start failed: {again.output[-900:]}")
        return self.compare(job, number)

    def compare(self, job: Job, number: int) -> Verdict:
        expected = jobs.contents(self.after(job, number + 1))
        try:
            found = jobs.contents(self.run)
        except Exception as error:  # something cannot be read at all
            return Verdict("differs", repr(error))
        different = sorted(name for name in expected.keys() | found.keys()
                           if expected.get(name) != found.get(name))
        return Verdict("differs", ", ".join(different)) if different else Verdict("same")

    def lose_rank(self, job: Job, number: int, rank: int, sign: signal.Signals,
                  when: Callable[[str], bool]) -> Verdict:
        """A rank is sent a signal once ``when`` holds of the log of operations. Nobody else ends
        the ranks: they have to by themselves. The note also says how far an annealing came, and
        what of it was saved."""
        run = self._start_until(job, number, when)
        with contextlib.suppress(ProcessLookupError):
            os.kill(run.pids[rank], sign)
        began = time.monotonic()
        outcome = run.wait()
        seconds = time.monotonic() - began
        if outcome is None:
            return Verdict("jam", f"not ended: {run.output[-500:]}", seconds)
        left = run.left_behind()
        note = f"codes {outcome.codes}" + (f", left behind: {left}" if left else "")
        if f"rank {rank} (process {run.pids[rank]} on " not in run.output and any(outcome.codes):
            note += f", no word of it: {run.output[-500:]}"
        metrics = self.run / "anneal" / "direct" / "metrics.jsonl"
        if metrics.is_file():
            tracker = metrics.parent / "checkpoints" / "latest_checkpointed_iteration.txt"
            note += f", annealed {len(metrics.read_text().splitlines())}, saved " + (
                tracker.read_text() if tracker.is_file() else "0")
        verdict = self.again(job, number)
        return dataclasses.replace(verdict, note=f"{note}; {verdict.note}", seconds=seconds)


    def lose_launcher(self, job: Job, number: int, when: Callable[[str], bool]) -> Verdict:
        """The launcher is killed, and with it the store: the ranks leave by themselves."""
        run = self._start_until(job, number, when)
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            status = Path(f"/proc/{run.pids[0]}/stat").read_text()
            os.kill(int(status.rpartition(")")[2].split()[1]), signal.SIGKILL)
        began = time.monotonic()
        while left := _of_group(run.pids[0]):
            if time.monotonic() > began + LIMIT_SECONDS:
                run.kill()
                return Verdict("jam", f"left behind: {left}")
            time.sleep(0.05)
        seconds = time.monotonic() - began
        return dataclasses.replace(self.again(job, number), seconds=seconds)

    def _start_until(self, job: Job, number: int, when: Callable[[str], bool]) -> Run:
        """A command, as soon as ``when`` holds of the log of its operations."""
        self.reset(job, number)
        run = self.start(job, job.commands[number])
        run.pids  # noqa: B018
        while not (run.folder / "outcome.json").is_file() and not (
                run.operations.is_file() and when(run.operations.read_text())):
            time.sleep(0.01)
        return run


def _of_group(group: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[2]) == group and fields[0] != "Z":
                    found.append(int(entry.name))
    return found
