"""Launches for tests: a small selection as a user starts it, under one launcher and another.

The selection is of ``small_folder`` (tests/conftest.py). Its files hold no time, and of paths only
their own: two launches of equal layout that write to one place must write the same bytes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
COMMAND = [sys.executable, "-m", "megatron_direct"]
RANKS = 4
# TP 2 within a node, PP 2 across, where there are two nodes.
LAYOUT = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
# What a launcher above this process would tell the ranks below it.
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK", "MASTER_", "SLURM_", "OMPI_", "PMI",
             "MPI_LOCAL", "PET_")


def environment(**more: str) -> dict[str, str]:
    """This one without variables of a launcher, and with what every rank needs."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
            "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", **more}


def select_flags(folder: Path, run: Path, *more: str) -> list[str]:
    return ["select", "--load", str(folder / "theta"), "--data-path", str(folder / "pool"),
            "--valid-data-path", str(folder / "valid"), "--run-dir", str(run), "--num-select", "12",
            "--sketch-size", "128", "--num-eigenpairs", "4", "--pilot-iters", "0", *more]


def torchrun(ranks: int = RANKS, *more: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
            str(ranks), *more]


def mpich(ranks: int = RANKS) -> list[str] | None:
    """mpirun of the package mpich, where it is installed."""
    found = shutil.which("mpirun", path=str(BIN))
    return found and [found, "-np", str(ranks)]


def open_mpi(ranks: int = RANKS) -> list[str] | None:
    found = shutil.which("mpirun.openmpi")
    return found and [found, "--oversubscribe", "-np", str(ranks)]


def run(command: Sequence[str], variables: Mapping[str, str] | None = None, timeout: float = 240
        ) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout,
                          env=environment() if variables is None else dict(variables))


def run_folder(folder: Path) -> Path:
    """Where all launches of a test write, one after another."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    return folder / "run"


def selected_bytes(run_dir: Path) -> dict[str, bytes]:
    """Every file of a run's selections, by its path."""
    folder = run_dir / "selections"
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file()}
