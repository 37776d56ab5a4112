"""As campaign.py, guided by coverage: atheris keeps what reaches new code, and changes it further.

    python tests/fuzz/guided.py --seconds 20                     # for each reader
    python tests/fuzz/guided.py --seconds 600 --reader index
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import tracemalloc
import warnings
from pathlib import Path

import atheris

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# Of this package and of what it reads with; all that is imported would take minutes.
with atheris.instrument_imports(include=["megatron_direct", "json", "zipfile", "numpy.lib.format"]):
    from fuzz import campaign, readers


def until_bad(reader: readers.Reader, seconds: int, folder: Path) -> None:
    """Until a file is bad, which ends the process with an error, or for so many seconds."""
    outcome = campaign.Outcome()
    readers.place(reader, folder)
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, data in enumerate(reader.sound):
        (corpus / str(number)).write_bytes(data)
    (folder / reader.file).write_bytes(reader.sound[0])
    reader.read(folder)
    tracemalloc.start()

    def one(data: bytes) -> None:
        campaign.try_one(reader, folder, data, outcome)
        if outcome.bad:
            campaign.report(outcome, 1)
            raise RuntimeError(outcome.bad[0][1])

    atheris.Setup([sys.argv[0], str(corpus), f"-max_total_time={seconds}", "-max_len=4096",
                   "-rss_limit_mb=8192", f"-artifact_prefix={folder}/"], one)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=60, help="for each reader")
    parser.add_argument("--reader", help="its name; default: all, in a process each")
    found = parser.parse_args()
    warnings.simplefilter("ignore")
    every = readers.all_readers()
    if found.reader is None:
        bad = [reader.name for reader in every if subprocess.run([
            sys.executable, __file__, "--seconds", str(found.seconds), "--reader", reader.name
            ]).returncode != 0]
        sys.exit(f"bad: {', '.join(bad)}" if bad else 0)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        until_bad(next(r for r in every if r.name == found.reader), found.seconds, Path(folder))


if __name__ == "__main__":
    main()
