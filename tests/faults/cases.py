"""All the faults that are tried, each a case with a name of its own."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from faults import jobs
from faults.drive import LIMIT_SECONDS, Bench, Fault, Verdict
from faults.jobs import JOBS, Job
from faults.launcher import FULL_FOR_GOOD, FULL_ONCE, KILL_ALL

KINDS = ("killed at an operation", "killed at random", "disk full once", "disk full for good",
         "two runs", "rank killed", "rank stopped", "launcher killed", "restarted by torchrun",
         "asked to stop")
# What the log of operations shows once a stage has begun.
STAGES = {"pilot": (0, "pilot/metrics.jsonl"), "sketches": (0, "sketches/entries-"),
          "curvature": (0, "curvature/lanczos/rank-"), "selection": (0, "selections/direct"),
          "annealing": (1, "anneal/direct/metrics.jsonl"),
          "checkpoint": (1, "checkpoints/iter_0000002")}
_WITH_SPACE = ("open", "write", "folder")


@dataclass(frozen=True)
class Case:
    kind: str
    job: Job
    detail: str
    run: Callable[[Bench], Verdict]

    @property
    def name(self) -> str:
        return f"{self.kind}: {self.job.name}, {self.detail}"


def all_cases(bench: Bench) -> Iterator[Case]:
    for name in ("one rank", "comparison", "pretraining", "preprocessing"):
        for number in range(len(JOBS[name].commands)):
            yield from at_operations(bench, JOBS[name], number)
    yield from at_random("one rank", 60)
    yield from at_random("two ranks", 40)
    yield from at_random("four ranks", 20)
    yield from (_two_runs(attempt) for attempt in range(20))
    four = JOBS["four ranks"]
    for stage in STAGES:
        for number, rank in enumerate((3, 0)):
            yield lost(four, stage, rank, signal.SIGKILL)
            if number == len(stage) % 2:  # for half a minute nothing happens
                yield lost(four, stage, rank, signal.SIGSTOP)
        yield _stopped(JOBS["two ranks"], stage, signal.SIGTERM)
        yield _orphaned(JOBS["two ranks"], stage)
    yield _stopped(JOBS["two ranks"], "annealing", signal.SIGINT)
    yield from (_restarted(attempt) for attempt in range(4))


def at_operations(bench: Bench, job: Job, number: int) -> Iterator[Case]:
    """At every operation of every writer: the first and the last of each kind on each kind of
    file."""
    kinds: dict[str, list[int]] = {}
    for at, name, _, path, _ in bench.operations(job, number):
        place = re.sub(r"[0-9a-f]{16,}|\d+", "N", path[len(str(bench.run)) + 1:])
        kinds.setdefault(f"{name} {place}", []).append(int(at))
    for turn, (kind, places) in enumerate(sorted(kinds.items())):
        for at in sorted({places[0], places[-1]}):
            failing = ("", "dropped", "zeroed")[(turn + at) % 3]
            yield _meets("killed at an operation", job, number, Fault(KILL_ALL, at,
                                                                      failing=failing), kind)
        if kind.startswith(_WITH_SPACE):
            yield _meets("disk full once", job, number, Fault(FULL_ONCE, places[0]), kind)
            yield _meets("disk full for good", job, number, Fault(FULL_FOR_GOOD, places[0]), kind)


def _meets(kind: str, job: Job, number: int, fault: Fault, operation: str) -> Case:
    power = f", power fails ({fault.failing})" if fault.failing else ""
    return Case(kind, job, f"{job.commands[number]} {fault.at} ({operation}){power}",
                lambda bench: bench.meet(job, number, fault))


def at_random(name: str, count: int) -> Iterator[Case]:
    for attempt in range(count):
        def run(bench: Bench, job=JOBS[name], attempt=attempt) -> Verdict:
            draw = random.Random(f"{job.name} {attempt}")
            number = draw.choices(range(len(job.commands)), [
                bench.seconds(job, n) for n in range(len(job.commands))])[0]
            bench.reset(job, number)
            started = bench.start(job, job.commands[number])
            started.pids  # noqa: B018
            time.sleep(draw.random() * bench.seconds(job, number))
            started.kill()
            outcome = started.wait()
            verdict = bench.again(job, number)
            return Verdict(verdict.result, f"{job.commands[number]}, codes "
                           f"{outcome and outcome.codes}; {verdict.note}")

        yield Case("killed at random", JOBS[name], f"attempt {attempt}", run)


def _two_runs(attempt: int) -> Case:
    """The second says so and leaves; the first does not notice."""
    job = JOBS["one rank"]

    def run(bench: Bench) -> Verdict:
        number = attempt % 2
        bench.reset(job, number)
        first = bench.start(job, job.commands[number])
        while not (bench.run / ".lock").is_file():
            time.sleep(0.005)
        second = bench.start(job, job.commands[number])
        refused, done = second.wait(), first.wait()
        if refused is None or done is None or done.codes != [0]:
            return Verdict("jam", f"{refused} {done} {first.output[-300:]} {second.output[-300:]}")
        if refused.codes != [1] and "already" not in second.output:
            return Verdict("error", f"{refused.codes}: {second.output[-500:]}")
        if refused.codes == [1] and "is in use: megatron-direct " not in second.output:
            return Verdict("error", second.output[-500:])
        verdict = bench.compare(job, number)
        return Verdict(verdict.result, f"codes {refused.codes}; {verdict.note}", refused.seconds)

    return Case("two runs", job, f"attempt {attempt}", run)


def lost(job: Job, stage: str, rank: int, sign: signal.Signals) -> Case:
    number, place = STAGES[stage]
    limit = 10.0 if sign == signal.SIGKILL else 60.0

    def run(bench: Bench) -> Verdict:
        verdict = bench.lose_rank(job, number, rank, sign, lambda log: place in log)
        if verdict.result == "same" and (verdict.seconds > limit or "left behind" in verdict.note
                                         or "no word" in verdict.note):
            return Verdict("error", verdict.note, verdict.seconds)
        return verdict

    return Case("rank killed" if sign == signal.SIGKILL else "rank stopped", job,
                f"{stage}, rank {rank}", run)


def _orphaned(job: Job, stage: str) -> Case:
    number, place = STAGES[stage]

    def run(bench: Bench) -> Verdict:
        verdict = bench.lose_launcher(job, number, lambda log: place in log)
        if verdict.result == "same" and verdict.seconds > 10.0:
            return Verdict("error", f"took long; {verdict.note}", verdict.seconds)
        return verdict

    return Case("launcher killed", job, stage, run)


def _stopped(job: Job, stage: str, sign: signal.Signals) -> Case:
    """All ranks leave with the same code, and what was done is not done again."""
    number, place = STAGES[stage]

    def run(bench: Bench) -> Verdict:
        verdict = bench.lose_rank(job, number, 1, sign, lambda log: place in log)
        codes = f"codes {[128 + sign] * job.ranks}"
        if verdict.result == "same" and not verdict.note.startswith((codes, "codes [0, 0]")):
            return Verdict("error", verdict.note, verdict.seconds)
        annealed = re.search(r"annealed (\d+), saved (\d+)", verdict.note)
        if annealed and annealed[1] != annealed[2]:
            return Verdict("error", f"steps were lost: {verdict.note}", verdict.seconds)
        return verdict

    return Case("asked to stop", job, f"{stage}, {sign.name}", run)


def _restarted(attempt: int) -> Case:
    """By torchrun itself: each of two ranks is killed once, at a random time."""
    job = JOBS["two ranks"]

    def run(bench: Bench) -> Verdict:
        number = attempt % 2
        bench.reset(job, number)
        draw, began = random.Random(attempt), time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
             "2", "--max-restarts", "2", "-m", "megatron_direct",
             *jobs.arguments(job.commands[number], bench.data, bench.run)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"})
        for rank in (0, 1):
            while not (bench.run / ".lock").is_file() and process.poll() is None:
                time.sleep(0.01)
            time.sleep(draw.random() * bench.seconds(job, number) / 2)
            with contextlib.suppress(IndexError, ProcessLookupError):
                os.kill(_children(process.pid)[rank], signal.SIGKILL)
            time.sleep(3.0)  # until torchrun has noticed
        try:
            output, _ = process.communicate(timeout=2 * LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            return Verdict("jam", f"torchrun did not end: {process.communicate()[0][-900:]}")
        if process.returncode:
            return Verdict("jam", output[-900:])
        verdict = bench.compare(job, number)
        return Verdict(verdict.result, verdict.note, time.monotonic() - began)

    return Case("restarted by torchrun", job, f"attempt {attempt}", run)


def _children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]
