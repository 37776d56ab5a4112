"""The Python half of launch/anneal_gpt.sh: select, anneal each arm and report, in one launch."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys

from megatron_direct.config import (
    BatchConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    add_flags,
    from_flags,
    given_flags,
)
from megatron_direct.errors import UserError

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


def main(arguments: list[str] | None = None) -> None:
    from megatron_direct.cli import main as cli

    cli.quiet_imports()
    flags = _parser().parse_args(arguments)
    sys.exit(cli.run(lambda: _run(flags), from_flags(ParallelConfig, flags)))


def _parser() -> argparse.ArgumentParser:
    from megatron_direct.commands.anneal import AnnealConfig
    from megatron_direct.commands.select import SelectConfig
    from megatron_direct.steps.curvature import CurvatureConfig
    from megatron_direct.steps.pilot import PilotConfig
    from megatron_direct.steps.solve import SelectionConfig

    parser = argparse.ArgumentParser(
        prog="anneal_gpt.sh", allow_abbrev=False,
        description="select, anneal on the selection and on a random one, report")
    add_flags(parser, SelectConfig, PilotConfig, CurvatureConfig, SelectionConfig, AnnealConfig,
              ModelConfig, ParallelConfig, OptimizerConfig, BatchConfig)
    for action in parser._actions:  # what is required may come from the environment
        if action.dest in _ENVIRONMENT:
            action.required = False
            action.help += f" [{_ENVIRONMENT[action.dest]}]"
    return parser


def _run(flags: argparse.Namespace) -> None:
    from megatron_direct.commands.anneal import AnnealConfig, anneal
    from megatron_direct.commands.report import ReportConfig, report
    from megatron_direct.commands.select import SelectConfig, select
    from megatron_direct.runtime import parallel
    from megatron_direct.steps.curvature import CurvatureConfig
    from megatron_direct.steps.pilot import PilotConfig
    from megatron_direct.steps.solve import SelectionConfig

    _read_environment(flags, (SelectConfig, SelectionConfig, AnnealConfig, ParallelConfig))
    layout = from_flags(ParallelConfig, flags)
    given = {kind: given_flags(kind, flags) for kind in (OptimizerConfig, BatchConfig)}
    select(from_flags(SelectConfig, flags), given_flags(ModelConfig, flags), layout,
           from_flags(CurvatureConfig, flags), from_flags(SelectionConfig, flags),
           from_flags(PilotConfig, flags), given)
    for arm in os.environ.get("ARMS", "direct random").split():
        anneal(dataclasses.replace(from_flags(AnnealConfig, flags), selection=arm), given, layout)
    parallel.on_rank_zero(lambda: report(ReportConfig(flags.run_dir)))


def _read_environment(flags: argparse.Namespace, configs: tuple[type, ...]) -> None:
    """Fills in the flags that were left out. Raises UserError for one that is nowhere."""
    fields = {f.name: f for config in configs for f in dataclasses.fields(config)}
    for name, variable in _ENVIRONMENT.items():
        text = os.environ.get(variable)
        if hasattr(flags, name) or not text:
            continue
        meta = fields[name].metadata
        try:
            setattr(flags, name, text.split() if meta["nargs"] else
                    (meta["type"] or type(fields[name].default))(text))
        except ValueError as error:
            raise UserError(f"{variable}={text} is no value for it: {error}.") from error
    for name, field in fields.items():
        if field.metadata["required"] and not hasattr(flags, name):
            raise UserError(f"--{name.replace('_', '-')} is missing. Give it, or set "
                            f"{_ENVIRONMENT[name]}. `make data theta` prepares the embedded ones.")
