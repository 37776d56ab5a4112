"""Checkpoints written by one megatron-core and read by another, in another layout.

    python tests/checkpoint_versions.py .venv .venvs/core-*

Each argument is a virtual environment with a megatron-core of its own. Every pair is tried, in a
process of that environment's Python: what one has trained and saved, with its optimizer, the other
reads and trains on. The weights have to be the same to the last bit and the losses to rounding. A
later version's checkpoint that an earlier one cannot read has to be refused, with the reason.
"""

from __future__ import annotations

import argparse
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
_REFUSED = "was written by megatron-core 0.19 or later"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("venvs", nargs="+", type=Path)
    venvs = parser.parse_args().venvs
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        for writer in venvs:
            _run(writer, "write", Path(folder) / writer.name)
            for reader in venvs:
                outcome = _run(reader, "read", Path(folder) / writer.name)
                failures += "FAILED" in outcome
                print(f"{writer.name} -> {reader.name}: {outcome}", flush=True)
    sys.exit(bool(failures))


def _run(venv: Path, action: str, folder: Path) -> str:
    """Runs one half with another Python; the last line it prints."""
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"}
    done = subprocess.run([venv / "bin/python", __file__, "--" + action, folder],
                          env=environment, text=True, capture_output=True, check=False)
    if done.returncode:
        sys.exit(f"{venv} could not {action} {folder}:\n{done.stdout}{done.stderr}")
    return done.stdout.strip().splitlines()[-1]


def _write(folder: Path) -> None:
    from trained_checkpoint import CASES, save

    for case in CASES:
        (folder / str(case)).mkdir()
        expected = save(case, folder / str(case))
        (folder / f"{case}.pickle").write_bytes(pickle.dumps(expected))
    print("written")


def _read(folder: Path) -> None:
    from ranks import RankError
    from trained_checkpoint import CASES, require_equal, resume

    from megatron_direct.mcore import compat

    is_earlier = tuple(map(int, compat.version().split(".")[:2])) < (0, 19)
    outcomes = set()
    for case in CASES:
        expected = pickle.loads((folder / f"{case}.pickle").read_bytes())
        try:
            require_equal(resume(case, folder / str(case)), expected)
            outcomes.add("same weights, same losses")
        except RankError as error:
            refused = is_earlier and _REFUSED in str(error)
            outcomes.add("refused" if refused else f"FAILED at {case}: {_last_line(error)}")
        except AssertionError as error:
            outcomes.add(f"FAILED at {case}: {_last_line(error)}")
    print("; ".join(sorted(outcomes)))


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]


if __name__ == "__main__":
    halves = {"--write": _write, "--read": _read}
    if sys.argv[1:2] and sys.argv[1] in halves:
        halves[sys.argv[1]](Path(sys.argv[2]))
    else:
        main()
