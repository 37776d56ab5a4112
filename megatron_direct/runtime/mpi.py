"""What MPI is needed for: to let the ranks that mpirun started find rank 0.

Everything else goes through torch.distributed. MPI is set up at the first question, and shut down
only at the end of a run that went well: launchers end all ranks when one ends without that.
"""

from __future__ import annotations

import functools
import importlib
import os
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from megatron_direct.errors import UserError

# A wheel of mpi4py holds a module for each MPI, and takes the first library that it finds: that of
# the package mpich, if it is installed, which ends the process where Open MPI started it.
_LIBRARIES = {"Open MPI": "openmpi"}


@dataclass(frozen=True)
class World:
    """What MPI says of this process; the communicator of all."""

    size: int
    local_rank: int
    node: int
    num_nodes: int
    communicator: Any


def world(launcher: str) -> World:
    """All ranks that ``launcher`` started call this. Raises UserError where there is no mpi4py."""
    return _world(launcher)


@functools.cache
def _world(launcher: str) -> World:
    if launcher in _LIBRARIES:
        os.environ.setdefault("MPI4PY_MPIABI", _LIBRARIES[launcher])
    module = _mpi(launcher)
    everyone = module.COMM_WORLD
    node = everyone.Split_type(module.COMM_TYPE_SHARED)
    firsts = sorted(set(everyone.allgather(node.bcast(everyone.Get_rank()))))
    return World(everyone.Get_size(), node.Get_rank(),
                 firsts.index(node.bcast(everyone.Get_rank())), len(firsts), everyone)


def _mpi(launcher: str) -> ModuleType:
    try:
        settings = importlib.import_module("mpi4py").rc
        settings.finalize = False
        return importlib.import_module("mpi4py.MPI")
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"{launcher} started this process, and mpi4py, through which ranks find rank 0, "
            f"cannot be imported ({str(error).splitlines()[0]}). Run pip install -e '.[mpi]' "
            "where this MPI is loaded, or give all ranks MASTER_ADDR and MASTER_PORT: the address "
            "of rank 0's node, and a port that is free there.") from error


def shut_down() -> None:
    """Ends MPI where it was set up; all ranks call this."""
    if _world.cache_info().currsize:
        module = importlib.import_module("mpi4py.MPI")
        if not module.Is_finalized():
            module.Finalize()
