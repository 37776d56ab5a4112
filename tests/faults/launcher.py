"""Starts ranks by forking: a process that has imported torch and megatron once, for many runs.

As a program (with the interposer preloaded) it reads requests, one JSON object a line, and forks a
launcher for each, which forks the ranks, waits for them, and writes what became of them into
``FOLDER/outcome.json``. The launcher does as little as a launcher can: it keeps the store, and does
not end the other ranks when one has died.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

KILL_ALL, KILL_ONE, FULL_ONCE, FULL_FOR_GOOD = 1, 2, 3, 4
NOTHING = 0


@dataclass(frozen=True)
class Request:
    """One run. folder: of its own, for output and outcome; root: where operations on files are
    counted; what: happens at operation ``at`` of rank ``rank``."""

    folder: str
    ranks: int
    arguments: list[str]
    root: str
    what: int = NOTHING
    at: int = 0
    rank: int = 0


@dataclass(frozen=True)
class Outcome:
    """codes: exit status of each rank, negative where a signal ended it. seconds: until the last
    had ended; cpu: seconds of all ranks and what they waited for."""

    codes: list[int]
    seconds: float
    cpu: float = 0.0


def serve() -> None:
    import torch

    import megatron_direct.cli.registry  # noqa: F401
    from megatron_direct.cli import main as cli
    from megatron_direct.mcore import compat, masked_dataset  # noqa: F401

    torch.set_num_threads(1)
    cli.quiet_imports()
    for command in cli.COMMANDS.values():
        command.load()
    import matplotlib.figure  # noqa: F401
    import megatron.core.distributed
    import megatron.core.models.gpt
    import megatron.core.optimizer  # noqa: F401
    from megatron.core import dist_checkpointing, parallel_state  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # launchers are not waited for
    print("ready", flush=True)
    for line in sys.stdin:
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _launch(Request(**json.loads(line)))
            os._exit(0)


def _launch(request: Request) -> None:
    """In a process, and a group of processes, of its own."""
    import torch.distributed as dist

    folder = Path(request.folder)
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    began = time.monotonic()
    ranks: list[int] = []
    for rank in range(request.ranks):
        ranks.append(_fork_rank(request, rank, store.port))
        os.setpgid(ranks[rank], ranks[0])  # one group, so that all can be killed at once
    (folder / "pids.json").write_text(json.dumps(ranks))
    codes: dict[int, int] = {}
    cpu = 0.0
    while len(codes) < len(ranks):
        pid, status, used = os.wait4(-1, 0)
        cpu += used.ru_utime + used.ru_stime
        codes[ranks.index(pid)] = os.waitstatus_to_exitcode(status)
    outcome = Outcome([codes[rank] for rank in range(len(ranks))], time.monotonic() - began, cpu)
    partial = folder / "outcome.partial"
    partial.write_text(json.dumps(dataclasses.asdict(outcome)))
    partial.rename(folder / "outcome.json")


def _fork_rank(request: Request, rank: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(request.ranks), LOCAL_RANK=str(rank),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                      TORCHELASTIC_USE_AGENT_STORE="True")
    code = 1
    try:
        _arm(request, rank)
        from megatron_direct.cli.main import main

        sys.argv = ["megatron-direct", *request.arguments]
        main(request.arguments)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        from multiprocessing import util

        sys.stdout.flush()
        sys.stderr.flush()
        util._exit_function()
        os._exit(code)


def _arm(request: Request, rank: int) -> None:
    library = os.environ.get("LD_PRELOAD")
    if library and rank == request.rank:
        log = os.open(Path(request.folder) / "operations.txt",
                      os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        ctypes.CDLL(library).faults_arm(request.root.encode(), log, request.what,
                                        ctypes.c_long(request.at), os.getpid())


if __name__ == "__main__":
    serve()
