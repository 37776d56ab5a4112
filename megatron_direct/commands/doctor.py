"""``megatron-direct doctor``: what is there, what works, and what to do.

Started like any other command, it tries what that launch would rely on: that its ranks find each
other, that a collective reaches all of them, and that they share a file system.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_direct.errors import UserError
from megatron_direct.runtime.findings import Finding, State, look
from megatron_direct.settings import Settings, flag

_SECONDS_OF_COLLECTIVES = 1.0
_NUMBERS = 1 << 18  # 1 MiB of float32 in each
# Clients of a network file system look again after some seconds (NFS: 3 to 60 for a folder).
_SECONDS_TO_SEE_A_FILE = 65.0


@dataclass(frozen=True)
class DoctorConfig(Settings):
    """Doctor."""

    shared_folder: str = flag(".", "folder on the file system that all nodes are to share; a file "
                              "is written there and removed")
    distributed_timeout_minutes: int = flag(
        1, "minutes that a rank waits for the others", at_least=1)
    distributed_backend: str | None = flag(
        None, "what carries collectives; default: nccl where there is a GPU, else gloo",
        type=str, choices=("nccl", "gloo"))


@dataclass(frozen=True)
class DoctorRequest:
    doctor: DoctorConfig


def trials(config: DoctorConfig) -> list[Finding]:
    """What works, on this launch's ranks; all of them call this, and rank 0's findings count."""
    return [look("ranks", _ranks), look("collectives", _collectives),
            look("shared folder", lambda: _shared_folder(Path(config.shared_folder)))]


def remedies(findings: Sequence[Finding]) -> list[str]:
    """Of what is broken; then, of what is absent, when it is needed."""
    by_urgency = sorted((f for f in findings if f.remedy and f.state is not State.GOOD),
                        key=lambda finding: finding.state is State.ABSENT)
    return [f"{finding.what}: {finding.remedy}" for finding in by_urgency]


def _ranks() -> Finding:
    from megatron_direct.runtime import parallel, ranks

    here = ranks.discover()
    hosts = parallel.gather_objects(socket.gethostname())
    names = list(dict.fromkeys(hosts))
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    how = f"started by {here.launcher}" if here.is_launched else "no launcher"
    return Finding("ranks", State.GOOD, f"{len(hosts)} on {shown} ({how})")


def _collectives() -> Finding:
    """All-reduces for a second, and their sum."""
    import torch
    import torch.distributed as dist

    from megatron_direct.runtime import host, parallel

    rank, size = parallel.rank_and_size()
    count, done = 0, False
    parallel.barrier()
    start = time.monotonic()
    while not done:
        numbers = torch.full((_NUMBERS,), float(rank + 1), device=host.device())
        # The last number is the ranks' vote on whether the second is over.
        numbers[-1] = float(time.monotonic() - start > _SECONDS_OF_COLLECTIVES)
        parallel.all_reduce(numbers, dist.group.WORLD)
        count, done = count + 1, bool(numbers[-1] > 0)
    seconds = time.monotonic() - start
    if not bool((numbers[:-1] == size * (size + 1) / 2).all()):
        return Finding("collectives", State.BROKEN, "a sum over all ranks is wrong",
                       "test the network between the nodes with nccl-tests.")
    return Finding("collectives", State.GOOD,
                   f"{dist.get_backend()}, {count} sums of 1 MiB in {seconds:.1f} s")


def _shared_folder(folder: Path) -> Finding:
    """A file that rank 0 writes, and then renames, is seen by every rank."""
    from megatron_direct.runtime import parallel

    def written() -> tuple[Path, str]:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".megatron-direct-probe-{socket.gethostname()}-{os.getpid()}"
        probe.write_text(str(time.time_ns()))
        return probe, probe.read_text()

    probe, text = parallel.on_rank_zero(written)
    renamed = probe.with_suffix(".renamed")
    try:
        blind = _blind_ranks(probe, text)
        if not blind:
            parallel.on_rank_zero(lambda: os.replace(probe, renamed))
            blind = _blind_ranks(renamed, text)
    finally:
        parallel.barrier()
        if parallel.is_rank_zero():
            for path in (probe, renamed):
                path.unlink(missing_ok=True)
    if blind:
        return Finding("shared folder", State.BROKEN,
                       f"{folder.resolve()}: a file of rank 0 is not seen by {', '.join(blind)}",
                       "give a --run-dir on a file system that all nodes mount at one path.")
    return Finding("shared folder", State.GOOD,
                   f"{folder.resolve()}: a file and its renaming are seen by all ranks")


def _blind_ranks(path: Path, text: str) -> list[str]:
    from megatron_direct.runtime import parallel

    end = time.monotonic() + _SECONDS_TO_SEE_A_FILE
    seen = False
    while not seen and time.monotonic() < end:
        seen = path.is_file() and path.read_text() == text
        if not seen:
            time.sleep(0.1)
            os.stat(path.parent)
    name = f"rank {parallel.rank_and_size()[0]} on {socket.gethostname()}"
    return [name for name, sees in parallel.gather_objects((name, seen)) if not sees]


def require_sound(findings: Sequence[Finding]) -> None:
    """Raises UserError where something that is needed is broken."""
    broken = [finding.what for finding in findings if finding.state is State.BROKEN]
    if broken:
        raise UserError(f"not sound: {', '.join(broken)}. What to do is said above.")
