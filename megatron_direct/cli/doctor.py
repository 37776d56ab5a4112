"""The command ``megatron-direct doctor``: it must also run where torch or Megatron do not."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_direct.cli import flags
from megatron_direct.commands import inventory
from megatron_direct.commands.doctor import (
    DoctorConfig,
    DoctorRequest,
    remedies,
    require_sound,
    trials,
)
from megatron_direct.errors import UserError
from megatron_direct.runtime import ranks
from megatron_direct.runtime.findings import Finding, State

_PROG = "megatron-direct doctor"
_NEEDED = ("torch", "collectives")  # by the trials


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROG, allow_abbrev=False,
        description="Looks at what is installed, and tries what a launch relies on. Start it as "
                    "the launch is to be started.")
    flags.add_flags(parser, DoctorRequest)
    return parser


def main(arguments: list[str] | None = None) -> None:
    found = make_parser().parse_args(arguments)
    try:
        config = flags.request_from(DoctorRequest, found).doctor
        speaks = ranks.discover().rank == 0
    except UserError as error:
        sys.exit(f"{_PROG}: error: {error}")
    sys.exit(_examine(config, speaks))


def _examine(config: DoctorConfig, speaks: bool) -> int:
    findings = inventory.inventory()
    if speaks:
        _show("What is there", findings)
    if any(finding.what in _NEEDED and finding.state is State.BROKEN for finding in findings):
        if speaks:
            _show_remedies(findings)
        return 1
    from megatron_direct.cli import outcome
    from megatron_direct.runtime import parallel

    def work() -> None:
        tried = trials(config)
        if speaks:
            _show("What works", tried)
            _show_remedies([*findings, *tried])
        require_sound([*findings, *tried])

    ranks_of_this_launch = parallel.process_group(config.distributed_timeout_minutes,
                                                   config.distributed_backend)
    return outcome.exit_status(work, ranks_of_this_launch, _PROG)


def _show(title: str, findings: Sequence[Finding]) -> None:
    print("\n".join([title, *map(str, findings)]), flush=True)


def _show_remedies(findings: Sequence[Finding]) -> None:
    lines = remedies(findings)
    if lines:
        print("\n".join(["What to do", *(f"  {line}" for line in lines)]), flush=True)
