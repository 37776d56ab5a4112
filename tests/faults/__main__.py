"""Faults at chosen and at random points, and whether the same command then ends as it should.

    python tests/faults [--minutes 25] [--only KIND ...] [--folder build/faults]

Results are kept in ``FOLDER/results.jsonl``: what was interrupted goes on where it was. Cases come
in a random order (of a fixed seed), those of preprocessing first, so that a part of them is a
sample of all. Exits with 1 where a case failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from faults import cases  # noqa: E402
from faults.drive import Bench, Verdict  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("build/faults"))
    parser.add_argument("--minutes", type=float, default=25.0, help="no case begins after these")
    parser.add_argument("--only", nargs="+", choices=cases.KINDS, help="kinds of faults")
    found = parser.parse_args()
    until = time.monotonic() + 60 * found.minutes
    bench = Bench(found.folder.absolute())
    record = bench.folder / "results.jsonl"
    results = _read(record)
    todo = [case for case in cases.all_cases(bench) if not found.only or case.kind in found.only]
    random.Random(0).shuffle(todo)
    todo.sort(key=lambda case: case.job.name != "preprocessing")  # which is quick
    for case in todo:
        if case.name in results or time.monotonic() > until:
            continue
        verdict = results[case.name] = case.run(bench)
        with open(record, "a") as file:
            print(json.dumps({"name": case.name, **dataclasses.asdict(verdict)}), file=file)
        print(f"{verdict.result:8} {verdict.seconds:5.1f} s  {case.name}  {verdict.note[:300]}",
              flush=True)
    bench.close()
    print(_table(todo, results))
    bad = [name for name, verdict in results.items() if verdict.result != "same"]
    sys.exit(f"{len(bad)} bad: {bad}" if bad else 0)


def _read(record: Path) -> dict[str, Verdict]:
    if not record.is_file():
        return {}
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    return {line.pop("name"): Verdict(**line) for line in lines}


def _table(todo: list[cases.Case], results: dict[str, Verdict]) -> str:
    counts: dict[tuple[str, str], Counter] = defaultdict(Counter)
    slowest: dict[tuple[str, str], float] = defaultdict(float)
    for case in todo:
        key = case.kind, case.job.name
        counts[key]["all"] += 1
        if case.name in results:
            counts[key][results[case.name].result] += 1
            slowest[key] = max(slowest[key], results[case.name].seconds)
    lines = ["| fault | work | tried | of | same | differs | jams | errors | longest, s |",
             "|---|---|---|---|---|---|---|---|---|"]
    for (kind, job), of in sorted(counts.items()):
        tried = sum(number for name, number in of.items() if name != "all")
        lines.append(f"| {kind} | {job} | {tried} | {of['all']} | {of['same']} | {of['differs']} | "
                     f"{of['jam']} | {of['error']} | {slowest[kind, job]:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
