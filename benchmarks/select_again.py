"""What it costs to select again: another K in a run directory that has its sketches and spectrum.

    python benchmarks/select_again.py --ranks 2 -- <flags of megatron-direct select>

The flags are without --run-dir and --num-select. Times two whole commands, start-up included, and
prints their ratio. ``make bench-select`` runs it on the embedded datasets.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    own, flags = sys.argv[1:], []
    if "--" in own:
        place = own.index("--")
        own, flags = own[:place], own[place + 1:]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--num-select", type=int, nargs=2, default=[782, 400], metavar="K")
    arguments = parser.parse_args(own)
    with tempfile.TemporaryDirectory() as folder:
        seconds = [_seconds(arguments.ranks, [*flags, "--run-dir", str(Path(folder) / "run"),
                                              "--num-select", str(count)])
                   for count in arguments.num_select]
    print(f"first selection {seconds[0]:.1f} s, another K in the same run {seconds[1]:.1f} s: "
          f"{seconds[1] / seconds[0]:.3f} of the first (bar 0.1)")


def _seconds(ranks: int, flags: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc-per-node", str(ranks), "-m", "megatron_direct", "select", *flags],
                   check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
