"""The same ranks under torchrun, under mpirun of two kinds, and under what PMIx alone tells.

Slurm's srun is in test_slurm.py, several nodes in test_nodes.py.
"""

from __future__ import annotations

import launching
import pytest
from launching import LAYOUT


@pytest.fixture(scope="module")
def expected(small_folder) -> dict[str, bytes]:
    return _selected(small_folder, "torchrun", launching.torchrun())


def _selected(folder, name: str, launcher: list[str] | None, *before: str) -> dict[str, bytes]:
    if launcher is None:
        pytest.skip("it is not installed")
    command = launching.COMMAND
    if launcher[1:3] == ["-m", "torch.distributed.run"]:
        command = command[1:]
    done = launching.run([*launcher, *before, *command,
                          *launching.select_flags(folder, folder / name, *LAYOUT)])
    assert done.returncode == 0, done.stderr
    return launching.selected_bytes(folder / name)


@pytest.mark.parametrize("launcher", ["mpich", "open_mpi"])
def test_mpirun_selects_what_torchrun_selects(small_folder, expected, launcher):
    if launcher == "mpich":
        pytest.importorskip("mpi4py")
    found = _selected(small_folder, launcher, getattr(launching, launcher)())
    assert found == expected and any(name.endswith(".npz") for name in found)
