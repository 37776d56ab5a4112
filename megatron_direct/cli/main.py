"""The command ``megatron-direct``: one sub-command per stage, on one rank or many."""

from __future__ import annotations

import argparse
import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator

import megatron_direct
from megatron_direct.cli import flags
from megatron_direct.cli.registry import COMMANDS

# Entries of their own, with flags of their own: name -> (help, module with a main()).
_ENTRIES = {
    "preprocess": ("text into Megatron indexed datasets", "megatron_direct.cli.preprocess"),
    "doctor": ("what is there, what works and what to do, on the ranks of this launch",
               "megatron_direct.cli.doctor"),
    "anneal-gpt": ("select, anneal and report: the Python half of launch/anneal_gpt.sh",
                   "megatron_direct.cli.anneal_gpt"),
}


def main(arguments: list[str] | None = None) -> None:
    """Runs one sub-command and exits: 0 if it ended well, 1 on every rank if it did not."""
    quiet_imports()
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in _ENTRIES:
        import importlib

        importlib.import_module(_ENTRIES[arguments[0]][1]).main(arguments[1:])
        return
    found = make_parser(arguments[:1]).parse_args(arguments)
    sys.exit(run(lambda: call(found), found))


def quiet_imports() -> None:
    """Silences warnings about packages that megatron-core misses, and torch's about Megatron."""
    warnings.filterwarnings("ignore", module="megatron.core")
    warnings.filterwarnings("ignore", message="Please use DTensor instead")


def make_parser(wanted: list[str] | None = None) -> argparse.ArgumentParser:
    """wanted: the commands whose flags are needed; left out: all (they import torch)."""
    parser = argparse.ArgumentParser(prog="megatron-direct", description=megatron_direct.__doc__,
                                     allow_abbrev=False)
    parser.add_argument("--version", action="version", version=megatron_direct.__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        of_command = commands.add_parser(name, help=command.help, allow_abbrev=False)
        if wanted is None or name in wanted:
            flags.add_flags(of_command, command.load()[0])
            add_dry_run(of_command)
    for name, (help_text, _) in _ENTRIES.items():
        commands.add_parser(name, help=help_text, add_help=False)
    return parser


def call(found: argparse.Namespace) -> None:
    """The command of parsed flags; all ranks call this."""
    kind, function = COMMANDS[found.command].load()
    request = flags.request_from(kind, found)
    if found.dry_run:
        from megatron_direct.cli import dry_run

        dry_run.show([(found.command, request)], request)
        return
    function(request)


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true",
                        help="print the exact command, which rank would hold what, and what a "
                             "selection would take; write nothing into the run directory")


def run(work: Callable[[], None], found: argparse.Namespace | None = None) -> int:
    """``work()`` on all ranks, in Megatron's runtime and a process group; returns the exit status:
    0, 1 after an error, or that of a process that a signal ended.

    found: parsed flags, of which those of the process group count. An error is reported once: by
    rank 0 if it met it, else by the first rank that did.
    """
    from megatron_direct.cli import outcome

    minutes = max(1, getattr(found, "distributed_timeout_minutes", 10))  # it is checked later
    backend = getattr(found, "distributed_backend", None)
    return outcome.exit_status(work, _connected(minutes, backend), "megatron-direct")


@contextlib.contextmanager
def _connected(timeout_minutes: int, backend: str | None) -> Iterator[None]:
    from megatron_direct.mcore.without_gpu import megatron_runtime
    from megatron_direct.runtime import parallel

    with megatron_runtime(), parallel.process_group(timeout_minutes, backend):
        yield
