"""Damaged files through all readers: each is read, or refused by a message that names it.

    python tests/fuzz/campaign.py --files 100000

Counted as bad: any exception but UserError, a UserError that does not name the file, more than
SECONDS for one file, and Python memory (tracemalloc, which sees numpy's too) of more than twice the
file and OVERHEAD. What is compressed may take twice of what it unpacks to, which is not measured.
"""

from __future__ import annotations

import argparse
import faulthandler
import random
import resource
import sys
import tempfile
import time
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fuzz import mutations, readers  # noqa: E402
from fuzz.readers import Reader  # noqa: E402

from megatron_direct.errors import UserError  # noqa: E402

SECONDS = 10
OVERHEAD = 256 << 10  # of Python's objects, for files of a few hundred bytes
# Memory that tracemalloc does not see (pyarrow's, SentencePiece's) may grow by so much at most.
ADDRESS_SPACE = 4 << 30


@dataclass
class Outcome:
    tried: Counter = field(default_factory=Counter)  # by reader
    read: Counter = field(default_factory=Counter)
    bad: list[tuple[str, str, bytes]] = field(default_factory=list)  # reader, what, file


def try_one(reader: Reader, folder: Path, data: bytes, outcome: Outcome) -> None:
    path = folder / reader.file
    readers.overwrite(path, data)
    outcome.tried[reader.name] += 1
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        reader.read(folder)
        outcome.read[reader.name] += 1
    except UserError as error:
        if not any(name in str(error) for name in (reader.file, str(folder))):
            outcome.bad.append((reader.name, f"does not name the file: {error}", data))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        outcome.bad.append((reader.name, f"{type(error).__name__}: {error}"[:300], data))
    finally:
        faulthandler.cancel_dump_traceback_later()
    used = tracemalloc.get_traced_memory()[1] - before
    size = len(data) + sum(map(len, reader.beside.values()))
    if not reader.unpacks and used > 2 * size + OVERHEAD:
        outcome.bad.append((reader.name, f"{used} bytes of memory for {size}", data))


def run(some: list[Reader], files: int, seed: int, folder: Path) -> Outcome:
    """So many files in all, the readers in turn."""
    outcome = Outcome()
    tracemalloc.start()
    try:
        for reader, share in zip(some, _shares(files, len(some)), strict=True):
            mine = folder / str(some.index(reader))
            mine.mkdir(exist_ok=True)
            readers.place(reader, mine)
            (mine / reader.file).write_bytes(reader.sound[0])
            reader.read(mine)  # what is imported at the first use is no memory of a file
            for data in reader.sound:  # so that damage is all that is refused
                try_one(reader, mine, data, outcome)
            assert outcome.read[reader.name] == len(reader.sound), (reader.name, outcome.bad)
            rng = random.Random(f"{seed} {reader.name}")
            for _ in range(share):
                data = mutations.mutated(rng.choice(reader.sound),
                                         reader.sound + reader.pieces, rng)
                try_one(reader, mine, data, outcome)
    finally:
        tracemalloc.stop()
    return outcome


def _shares(total: int, count: int) -> Iterator[int]:
    return (total // count + (number < total % count) for number in range(count))


def report(outcome: Outcome, seconds: float) -> None:
    for name, count in outcome.tried.items():
        bad = sum(1 for reader, _, _ in outcome.bad if reader == name)
        print(f"{name:25} {count:7} files, {outcome.read[name]:6} read, {bad:5} bad")
    total = sum(outcome.tried.values())
    print(f"{total} files in {seconds:.0f} s ({total / seconds:.0f} a second), "
          f"{len(outcome.bad)} bad")
    seen: set[tuple[str, str]] = set()
    for name, what, data in outcome.bad:
        if (name, what[:50]) not in seen:
            seen.add((name, what[:50]))
            print(f"  {name}: {what}\n    {data[:120]!r}")


def limit_memory() -> None:
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + ADDRESS_SPACE,) * 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--readers", nargs="+", help="names; default: all")
    found = parser.parse_args()
    warnings.simplefilter("ignore")
    some = [reader for reader in readers.all_readers()
            if not found.readers or reader.name in found.readers]
    limit_memory()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        began = time.perf_counter()
        outcome = run(some, found.files, found.seed, Path(folder))
        report(outcome, time.perf_counter() - began)
    sys.exit(bool(outcome.bad))


if __name__ == "__main__":
    main()
