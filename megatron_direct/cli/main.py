"""The command ``megatron-direct``: one sub-command per stage, alone or under torchrun."""

from __future__ import annotations

import argparse
import sys
import traceback
import warnings
from collections.abc import Callable

import megatron_direct
from megatron_direct.cli import flags
from megatron_direct.cli.registry import COMMANDS
from megatron_direct.errors import UserError

# Entries of their own, with flags of their own: name -> (help, module with a main()).
_ENTRIES = {
    "preprocess": ("text into Megatron indexed datasets", "megatron_direct.cli.preprocess"),
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
    sys.exit(run(lambda: call(found), getattr(found, "distributed_timeout_minutes", None)))


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
    for name, (help_text, _) in _ENTRIES.items():
        commands.add_parser(name, help=help_text, add_help=False)
    return parser


def call(found: argparse.Namespace) -> None:
    """The command of parsed flags; all ranks call this."""
    request, function = COMMANDS[found.command].load()
    function(flags.request_from(request, found))


def run(work: Callable[[], None], timeout_minutes: int | None = None) -> int:
    """``work()`` on all ranks, in Megatron's runtime and a process group; returns the exit status:
    0, 1 after an error, or that of a process that a signal ended.

    An error is reported once: by rank 0 if it met it, else by the first rank that did.
    """
    from megatron_direct.mcore.without_gpu import megatron_runtime
    from megatron_direct.runtime import attendance, files, parallel, stopping

    with megatron_runtime(), parallel.process_group(max(1, timeout_minutes or 10)):
        try:
            work()
            parallel.barrier()  # nobody takes one that is done for one that is lost
            return 0
        except stopping.Stopped as stopped:
            parallel.say(f"megatron-direct: {stopped}")
            attendance.leave_early()
            return stopped.exit_code
        except UserError as error:
            message = f"megatron-direct: error: {error}\n"
        except Exception as error:
            attendance.await_verdict()
            if (number := stopping.requested()) is not None:  # others have left: this is why
                attendance.leave_early()
                return stopping.Stopped(number).exit_code
            message = traceback.format_exc()
            if isinstance(error, OSError) and error.filename and files.is_of_disk(error):
                message = f"megatron-direct: error: {files.cannot_use(error.filename, error)}\n"
        if parallel.first_to_speak():
            print(message, end="", file=sys.stderr, flush=True)
        attendance.leave_early("another rank ended with an error")
        return 1
