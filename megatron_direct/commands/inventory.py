"""What is installed on this host, of what the package needs or can use. Runs none of it."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from megatron_direct import __version__
from megatron_direct.runtime.findings import Finding, State, look

# setup.py's requirement.
_CORE_FROM, _CORE_BEFORE = (0, 16, 1), (0, 20)
_NVIDIAS_DEVICE = Path("/dev/nvidiactl")


def inventory() -> list[Finding]:
    return [look(what, check) for what, check in _CHECKS.items()]


def _python() -> Finding:
    return Finding("python", State.GOOD if sys.version_info >= (3, 10) else State.BROKEN,
                   f"{platform.python_version()}, megatron-direct {__version__}",
                   "use Python 3.10 or newer.")


def _torch() -> Finding:
    import torch

    return Finding("torch", State.GOOD, torch.__version__)


def _cuda() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())}
        return Finding("CUDA", State.GOOD, f"{torch.version.cuda}, {torch.cuda.device_count()} x "
                                           f"{', '.join(sorted(names))}")
    if _NVIDIAS_DEVICE.exists():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        return Finding("CUDA", State.BROKEN, f"there is a GPU, and torch ({built}) cannot use it",
                       "install a torch that is built for this driver's CUDA (nvidia-smi names "
                       "it), and look whether CUDA_VISIBLE_DEVICES hides the GPUs.")
    return Finding("CUDA", State.ABSENT, "no GPU: ranks compute on the CPU",
                   "needed for models of more than some millions of parameters. In a container, "
                   "start it with --gpus all.")


def _collectives() -> Finding:
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        return Finding("collectives", State.BROKEN, "torch is built without torch.distributed",
                       "install torch's own wheels, or NVIDIA's image.")
    found = ["gloo"] if dist.is_gloo_available() else []
    if dist.is_nccl_available():
        found.append("NCCL " + ".".join(map(str, torch.cuda.nccl.version())))
    needed = "NCCL" if torch.cuda.is_available() else "gloo"
    if not any(name.startswith(needed) for name in found):
        return Finding("collectives", State.BROKEN, f"torch is built without {needed}",
                       f"install a torch with {needed}.")
    return Finding("collectives", State.GOOD, ", ".join(found))


def _megatron_core() -> Finding:
    from megatron_direct.mcore import compat

    version = compat.imported_version()
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdecimal())
    if not _CORE_FROM <= numbers < _CORE_BEFORE:
        return Finding("megatron-core", State.BROKEN, f"{version}: 0.16.1 to 0.19 are supported",
                       "pip install 'megatron-core>=0.16.1,<0.20'")
    return Finding("megatron-core", State.GOOD, version)


def _transformer_engine() -> Finding:
    return _optional("transformer-engine", "transformer_engine",
                     "Transformer Engine's layers; it comes with NVIDIA's PyTorch image.")


def _apex() -> Finding:
    return _optional("apex", "apex", "Apex's fused optimizer; it comes with NVIDIA's PyTorch "
                                     "image (the package apex of the registry is another one).")


def _mpi4py() -> Finding:
    # Its module MPI is not imported: that would start MPI.
    return _optional("mpi4py", "mpi4py", "ranks that mpirun starts: pip install "
                                         "'megatron-direct[mpi]'")


def _slurm() -> Finding:
    srun = shutil.which("srun")
    if srun is None:
        return Finding("Slurm", State.ABSENT, "no srun here",
                       "only ranks that srun starts need it.")
    job = os.environ.get("SLURM_JOB_ID")
    return Finding("Slurm", State.GOOD, f"{srun}, {f'job {job}' if job else 'outside of a job'}")


def _optional(what: str, module: str, needed_for: str) -> Finding:
    if importlib.util.find_spec(module) is None:
        return Finding(what, State.ABSENT, "not installed", f"needed for {needed_for}")
    importlib.import_module(module)
    try:
        version = importlib.metadata.version(what)
    except importlib.metadata.PackageNotFoundError:
        version = "of unknown version"
    return Finding(what, State.GOOD, version)


_CHECKS: dict[str, Callable[[], Finding]] = {
    "python": _python, "torch": _torch, "CUDA": _cuda, "collectives": _collectives,
    "megatron-core": _megatron_core, "transformer-engine": _transformer_engine, "apex": _apex,
    "mpi4py": _mpi4py, "Slurm": _slurm}
