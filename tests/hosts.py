"""Two hosts on this machine: network namespaces that a virtual cable joins.

Each has an address, a host name and a hosts file of its own, as two nodes would; files are shared,
as on a cluster. Needs root.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Host:
    name: str
    namespace: str
    interface: str
    address: str
    hosts_file: Path

    def command(self, words: Sequence[str]) -> list[str]:
        """The words, as a command that runs on this host."""
        # In a mount and a host name of its own; exec keeps one process, so that signals arrive.
        inside = ('mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"')
        return ["ip", "netns", "exec", self.namespace, "unshare", "--mount", "--uts", "sh", "-c",
                inside, "sh", str(self.hosts_file), self.name, *words]

    def link(self, *what: str) -> None:
        _ip("-n", self.namespace, "link", "set", self.interface, *what)

    def slow_down(self, rate: str = "2mbit", delay: str = "20ms") -> None:
        """What this host sends: by tc's netem, or, in a kernel without it, its rate alone."""
        for how in (("netem", "rate", rate, "delay", delay),
                    ("tbf", "rate", rate, "burst", "16kb", "latency", "400ms")):
            done = subprocess.run(
                ["ip", "netns", "exec", self.namespace, "tc", "qdisc", "replace", "dev",
                 self.interface, "root", *how], capture_output=True, text=True)
            if done.returncode == 0:
                return
        raise OSError(f"tc knows no way to slow down a link: {done.stderr}")

    def free(self) -> None:
        subprocess.run(["ip", "netns", "exec", self.namespace, "tc", "qdisc", "del", "dev",
                        self.interface, "root"], check=True)


def obstacle() -> str:
    """Why there can be no such hosts here; "" if there can."""
    missing = [name for name in ("ip", "tc", "unshare") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"md-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"no network namespace can be made: {made.stderr.strip()}"
    _ip("netns", "del", name)
    return ""


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    tag = os.getpid()
    names = ("node-a", "node-b")
    known = "127.0.0.1 localhost\n" + "".join(
        f"10.77.0.{number + 1} {name}\n" for number, name in enumerate(names))
    made = [Host(name, f"md{tag}-{name}", f"md{tag}{name[-1]}", f"10.77.0.{number + 1}",
                 folder / f"hosts-of-{name}") for number, name in enumerate(names)]
    for host in made:
        host.hosts_file.write_text(known)
    try:
        for host in made:
            _ip("netns", "add", host.namespace)
        _ip("link", "add", made[0].interface, "netns", made[0].namespace, "type", "veth", "peer",
            "name", made[1].interface, "netns", made[1].namespace)
        for host in made:
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", host.interface)
            _ip("-n", host.namespace, "link", "set", "lo", "up")
            host.link("up")
        yield made[0], made[1]
    finally:
        for host in made:
            subprocess.run(["ip", "netns", "del", host.namespace], capture_output=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
