"""The Python half of launch/anneal_gpt.sh: select, anneal each arm and report, in one launch."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron_direct.cli import dry_run, flags
from megatron_direct.cli import main as cli
from megatron_direct.commands.anneal import anneal
from megatron_direct.commands.arm import RANDOM, AnnealConfig, AnnealRequest
from megatron_direct.commands.report import ReportConfig, ReportRequest, report
from megatron_direct.commands.select import SelectRequest, select
from megatron_direct.config import Execution
from megatron_direct.errors import UserError
from megatron_direct.settings import flag_name, flag_type


@dataclass(frozen=True)
class LaunchRequest(SelectRequest):
    """Everything that select and anneal are asked."""

    anneal: AnnealConfig = field(kw_only=True)
    execution: Execution = field(default_factory=Execution)


# flag -> environment variable that is read where the flag is left out
_ENVIRONMENT = {
    "tensor_model_parallel_size": "TENSOR_MODEL_PARALLEL_SIZE",
    "pipeline_model_parallel_size": "PIPELINE_MODEL_PARALLEL_SIZE",
    "load": "CHECKPOINT_PATH",
    "run_dir": "RUN_DIR",
    "data_path": "DATA_PATH",
    "valid_data_path": "VALID_DATA_PATH",
    "test_data_path": "TEST_DATA_PATH",
    "num_select": "NUM_SELECT",
    "lr_wsd_decay_iters": "LR_WSD_DECAY_ITERS",
}
_ARMS = "ARMS"  # those to anneal, parted by spaces


def main(arguments: list[str] | None = None) -> None:
    cli.quiet_imports()
    found = make_parser().parse_args(arguments)
    sys.exit(cli.run(lambda: _run(found), found))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="anneal_gpt.sh", allow_abbrev=False,
        description="select, anneal on the selection and on a random one, report")
    flags.add_flags(parser, LaunchRequest)
    cli.add_dry_run(parser)
    for action in parser._actions:  # what is required may come from the environment
        if action.dest in _ENVIRONMENT:
            action.required = False
            action.help = f"{action.help} [{_ENVIRONMENT[action.dest]}]"
    return parser


def _run(found: argparse.Namespace) -> None:
    _read_environment(found)
    request = flags.request_from(LaunchRequest, found)
    if (request.anneal.selection, request.anneal.size_of) != (
            AnnealConfig.selection, AnnealConfig.size_of):
        raise UserError(f"--selection and --size-of are for `anneal` alone: {_ARMS} says here what "
                        "is annealed. Leave them out.")
    arms = os.environ.get(_ARMS, f"{request.name.selection_name} {RANDOM}").split()
    _require_arms(arms, request.name.selection_name)
    calls = _calls(request, arms)
    if found.dry_run:
        (name, selection), *others = calls
        selection = dry_run.with_anneal_tokens(selection, request.anneal.lr_wsd_decay_iters)
        dry_run.show([(name, selection), *others], request)
        return
    functions: dict[str, Callable[[Any], None]] = {
        "select": functools.partial(select, annealing_iters=request.anneal.lr_wsd_decay_iters),
        "anneal": anneal, "report": report}
    for name, of_stage in calls:
        functions[name](of_stage)


def _calls(request: LaunchRequest, arms: list[str]) -> list[tuple[str, Any]]:
    """The commands in order, with what each is asked."""
    selection = SelectRequest(**{f.name: getattr(request, f.name)
                                 for f in dataclasses.fields(SelectRequest)})
    # Of what a checkpoint supplies, an annealing takes its own groups alone, and the model's run.
    annealings = [AnnealRequest(
        dataclasses.replace(request.anneal, run_dir=request.onset.run_dir, selection=arm,
                            size_of=request.name.selection_name if arm == RANDOM else "direct"),
        request.layout, request.given, request.execution) for arm in arms]
    return [("select", selection), *(("anneal", annealing) for annealing in annealings),
            ("report", ReportRequest(ReportConfig(request.onset.run_dir)))]


def _require_arms(arms: list[str], selection_name: str) -> None:
    wrong = [arm for arm in arms if arm not in (selection_name, RANDOM)]
    if wrong or not arms:
        raise UserError(f"{_ARMS} is {' '.join(arms)!r}: expected {selection_name}, {RANDOM} or "
                        "both.")


def _read_environment(found: argparse.Namespace) -> None:
    """Fills in the flags that were left out. Raises UserError for one that is nowhere."""
    known = {f.name: f for group in flags.groups(LaunchRequest) for f in dataclasses.fields(group)}
    for name, variable in _ENVIRONMENT.items():
        text = os.environ.get(variable)
        if hasattr(found, name) or not text:
            continue
        f = known[name]
        try:
            setattr(found, name, text.split() if f.metadata["nargs"] else flag_type(f)(text))
        except ValueError as error:
            raise UserError(f"{variable} is {text!r}: it is not a valid value of {flag_name(name)} "
                            f"({error}).") from error
    for name, f in known.items():
        if f.metadata["required"] and not hasattr(found, name):
            raise UserError(f"{flag_name(name)} is missing. Give it, or set {_ENVIRONMENT[name]}. "
                            "`make data theta` prepares those of the embedded run.")
