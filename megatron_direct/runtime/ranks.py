"""Who am I among the processes of this launch? The one place that reads a launcher's variables.

torchrun, Open MPI, MPICH and other launchers with Hydra's variables (Intel MPI), Slurm's ``srun``,
and PMIx without any of them. Each is a reader in ``_LAUNCHERS``; the first that finds its variables
answers, so that a launcher which another one started (torchrun under srun, mpirun in a Slurm job)
comes before that one. Nothing here needs torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_direct.errors import UserError
from megatron_direct.runtime import mpi

_LOCALHOST = "127.0.0.1"
_TORCHS_PORT = 29500  # torch.distributed's own default
# Of a Slurm step, from its number: below the ports that Linux gives out by itself (32768 to 60999).
_SLURMS_PORTS = range(20000, 32000)


@dataclass(frozen=True)
class Rank:
    """This process among ``world_size``; ``local_rank`` among those of its node.

    node: number of its node in this launch. launcher: what started it; "" for a process that was
    started alone. master_addr, master_port: where rank 0 listens; "" and 0 where MPI has to carry
    that to the others.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    node: int = 0
    launcher: str = ""
    master_addr: str = ""
    master_port: int = 0

    @property
    def is_launched(self) -> bool:
        return bool(self.launcher)


class _Variables:
    """A launcher's variables, as numbers; one that is missing or no number is named."""

    def __init__(self, environment: Mapping[str, str], launcher: str):
        self._environment, self._launcher = environment, launcher

    def number(self, *names: str, default: int | None = None) -> int:
        """The first of these variables that is set."""
        found = next((name for name in names if self._environment.get(name)), None)
        if found is None and default is not None:
            return default
        if found is None:
            raise UserError(f"{self._launcher} has set a rank, but not {' or '.join(names)}. "
                            "Start all ranks with torchrun, mpirun or srun, which set both, or set "
                            "it.")
        text = self._environment[found]
        if not text.isdecimal():
            raise UserError(f"{found} is {text!r}: expected a whole number of 0 or more, as "
                            f"{self._launcher} sets it.")
        return int(text)

    def master(self, host: str = "", port: int = _TORCHS_PORT) -> tuple[str, int]:
        """Rank 0's address: that of the environment before that of the launcher."""
        host = self._environment.get("MASTER_ADDR") or host
        return (host, self.number("MASTER_PORT", default=port)) if host else ("", 0)


def _torchrun(environment: Mapping[str, str]) -> Rank | None:
    if "RANK" not in environment:
        return None
    read = _Variables(environment, "torchrun")
    return Rank(read.number("RANK"), read.number("WORLD_SIZE"),
                read.number("LOCAL_RANK", default=0), read.number("GROUP_RANK", default=0),
                "torchrun", *read.master(_LOCALHOST))


def _open_mpi(environment: Mapping[str, str]) -> Rank | None:
    if "OMPI_COMM_WORLD_RANK" not in environment:
        return None
    read = _Variables(environment, "Open MPI")
    rank, size = read.number("OMPI_COMM_WORLD_RANK"), read.number("OMPI_COMM_WORLD_SIZE")
    # No variable numbers the nodes; mpirun fills one after the other unless asked otherwise.
    node = rank // max(1, read.number("OMPI_COMM_WORLD_LOCAL_SIZE", default=size))
    return Rank(rank, size, read.number("OMPI_COMM_WORLD_LOCAL_RANK"), node, "Open MPI",
                *read.master())


def _hydra(environment: Mapping[str, str]) -> Rank | None:
    local = next((name for name in ("MPI_LOCALRANKID", "PMI_LOCAL_RANK") if name in environment),
                 None)
    if "PMI_RANK" not in environment or local is None:
        return None
    read = _Variables(environment, "MPICH")
    rank, size = read.number("PMI_RANK"), read.number("PMI_SIZE")
    node = rank // max(1, read.number("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE", default=size))
    return Rank(rank, size, read.number(local), node, "MPICH", *read.master())


def _slurm(environment: Mapping[str, str]) -> Rank | None:
    # A batch script has SLURM_PROCID too, but is no task of a step.
    if "SLURM_PROCID" not in environment or "SLURM_STEP_ID" not in environment:
        return None
    read = _Variables(environment, "srun")
    nodes = read.number("SLURM_STEP_NUM_NODES", "SLURM_NNODES", default=1)
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    master = first_host(hosts) if nodes > 1 else _LOCALHOST
    job = read.number("SLURM_JOB_ID", "SLURM_JOBID", default=0)
    step = read.number("SLURM_STEP_ID", default=0)
    port = _SLURMS_PORTS[(job * 31 + step) % len(_SLURMS_PORTS)]
    return Rank(read.number("SLURM_PROCID"), read.number("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
                read.number("SLURM_LOCALID"), read.number("SLURM_NODEID", default=0), "srun",
                *read.master(master, port))


def _pmix(environment: Mapping[str, str]) -> Rank | None:
    """PMIx numbers its processes and does not count them: MPI is asked."""
    if "PMIX_RANK" not in environment:
        return None
    read = _Variables(environment, "PMIx")
    world = mpi.world("PMIx")
    return Rank(read.number("PMIX_RANK"), world.size, world.local_rank, world.node, "PMIx",
                *read.master())


_LAUNCHERS: tuple[Callable[[Mapping[str, str]], Rank | None], ...] = (
    _torchrun, _open_mpi, _hydra, _slurm, _pmix)

# How many processes were started, by launchers that should have said as well which one this is.
# WORLD_SIZE is none of them: Megatron-LM reads it where a single process plans for many.
_COUNTS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE",
           "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS")


def discover(environment: Mapping[str, str] | None = None) -> Rank:
    """This process's rank, by the first launcher whose variables are set.

    Raises UserError where variables say that there are several processes, but not which one this
    is: each would take itself for the only one, and all would write into one run directory.
    """
    variables = os.environ if environment is None else environment
    found = (launcher(variables) for launcher in _LAUNCHERS)
    rank = next((rank for rank in found if rank is not None), None)
    if rank is None:
        _require_alone(variables)
        return Rank()
    if rank.rank >= rank.world_size:
        raise UserError(f"{rank.launcher} says that this is rank {rank.rank} of "
                        f"{rank.world_size}, which counts from 0. Look for variables of another "
                        "launch that were exported into this one.")
    return rank


def _require_alone(variables: Mapping[str, str]) -> None:
    for name in _COUNTS:
        count = variables.get(name, "")
        if count.isdecimal() and int(count) > 1:
            raise UserError(
                f"{name} is {count}, but nothing says which of {count} ranks this process is, so "
                "that each would run alone, in one run directory. Start the ranks with srun, "
                "torchrun or mpirun; for a single process in a Slurm job, put `srun --ntasks 1` "
                f"in front of the command; in a shell, `env -u {name}`.")


def first_host(hosts: str) -> str:
    """Of a Slurm list of hosts: ``rack[2-3]node[010-019,7],login`` begins with rack2node010."""
    # The first comma outside of brackets ends the first entry.
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", hosts)
    assert first is not None
    return re.sub(r"\[([^-,\]]*)[^\]]*\]", r"\1", first[0])
