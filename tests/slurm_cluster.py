"""A Slurm of two virtual nodes on this machine: munged, slurmctld and two slurmd of Debian's.

Keys, sockets, ports and state are its own, in a temporary folder, and so are the node names, which
resolve in its daemons' own mount namespace alone. Needs root.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

NODES = ("virtual-1", "virtual-2")
_DAEMONS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "unshare")
_SECONDS_TO_START = 30

_CONFIGURATION = """\
ClusterName=virtual
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
SwitchType=switch/none
JobRequeue=1
KillWait=5
ReturnToService=2
"""


@dataclass(frozen=True)
class Cluster:
    folder: Path

    @property
    def variables(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def call(self, *words: str) -> str:
        done = subprocess.run(words, capture_output=True, text=True,
                              env={**os.environ, **self.variables})
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout.strip()

    def state(self, job: str) -> str:
        shown = self.call("scontrol", "--oneliner", "show", "job", job)
        return shown.split("JobState=")[1].split()[0]

    def wait(self, job: str, states: Sequence[str], seconds: float) -> str:
        """The state of a job, once it is one of these."""
        end = time.monotonic() + seconds
        while (state := self.state(job)) not in states:
            assert time.monotonic() < end, f"job {job} is {state}, not {' or '.join(states)}"
            time.sleep(0.3)
        return state


def obstacle() -> str:
    """Why there can be no such cluster here; "" if there can."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [name for name in _DAEMONS if shutil.which(name, path=path) is None]
    if missing:
        return (f"{', '.join(missing)} not installed (Debian's packages: slurmctld, slurmd, "
                "slurm-client, munge)")
    return "" if os.geteuid() == 0 else "the daemons of a virtual cluster need root"


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    made = Cluster(folder)
    pid_files = []
    try:
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (folder / name).mkdir()
        (folder / "slurm.conf").write_text(_configuration(folder))
        (folder / "hosts").write_text("127.0.0.1 localhost " + " ".join(
            [socket.gethostname(), *NODES]) + "\n")
        pid_files.append(folder / "munge.pid")
        made.call("munged", "--force", *(f"--{what}-file={folder}/munge.{what}" for what in (
            "key", "pid", "log", "seed")), f"--socket={folder}/munge.socket")
        pid_files.append(folder / "slurmctld.pid")
        made.call("slurmctld", "-i")
        for node in NODES:
            pid_files.append(folder / f"{node}.pid")
            # A file of hosts in which the nodes are known, for the tasks that it will start.
            made.call("unshare", "--mount", "sh", "-c",
                      f'mount --bind "{folder}/hosts" /etc/hosts && exec slurmd -N {node}')
        end = time.monotonic() + _SECONDS_TO_START
        while made.call("sinfo", "--noheader", "--format=%T") != "idle":
            assert time.monotonic() < end, made.call("sinfo")
            time.sleep(0.3)
        yield made
    finally:
        with contextlib.suppress(AssertionError):
            made.call("scancel", "--user", "root")
            for _ in range(20):  # their steps end only as long as there is a slurmd
                if not made.call("squeue", "--noheader"):
                    break
                time.sleep(0.5)
            time.sleep(1)
        for pid_file in reversed(pid_files):
            _stop(pid_file)


def _stop(pid_file: Path) -> None:
    with contextlib.suppress(OSError, ValueError):  # it has removed the file, and is gone
        pid = int(pid_file.read_text())
        os.kill(pid, signal.SIGTERM)
        for _ in range(100):
            os.kill(pid, 0)
            time.sleep(0.1)
        os.kill(pid, signal.SIGKILL)


def _configuration(folder: Path) -> str:
    ports = [_free_port() for _ in range(1 + len(NODES))]
    text = _CONFIGURATION.format(host=socket.gethostname(), port=ports[0], folder=folder)
    for node, port in zip(NODES, ports[1:], strict=True):
        text += (f"NodeName={node} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 "
                 f"Port={port} CPUs=4 State=UNKNOWN\n")
    return text + f"PartitionName=all Nodes={','.join(NODES)} Default=YES State=UP\n"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
