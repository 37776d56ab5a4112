"""The command ``megatron-direct``: one sub-command a stage, alone or under torchrun."""

from __future__ import annotations

import argparse
import sys
import traceback
import warnings
from collections.abc import Callable

from megatron_direct import __version__
from megatron_direct.config import (
    BatchConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    add_flags,
    from_flags,
    given_flags,
)


def main(arguments: list[str] | None = None) -> None:
    """Runs one sub-command and exits: 0 if it ended well, 1 on every rank if it did not."""
    quiet_imports()
    flags = make_parser().parse_args(arguments)
    sys.exit(run(lambda: _dispatch(flags), from_flags(ParallelConfig, flags)))


def quiet_imports() -> None:
    """Silences what megatron-core says of parts that are not installed, and torch of Megatron."""
    warnings.filterwarnings("ignore", module="megatron.core")
    warnings.filterwarnings("ignore", message="Please use DTensor instead")


def make_parser() -> argparse.ArgumentParser:
    from megatron_direct.commands.anneal import AnnealConfig
    from megatron_direct.commands.compare import CompareConfig
    from megatron_direct.commands.evaluate import EvaluateConfig
    from megatron_direct.commands.inspect import InspectConfig
    from megatron_direct.commands.pretrain import PretrainConfig
    from megatron_direct.commands.report import ReportConfig
    from megatron_direct.commands.select import SelectConfig
    from megatron_direct.steps.curvature import CurvatureConfig
    from megatron_direct.steps.pilot import PilotConfig
    from megatron_direct.steps.solve import SelectionConfig

    parser = argparse.ArgumentParser(prog="megatron-direct", description=sys.modules[
        "megatron_direct"].__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help_text, groups in (
        ("pretrain", "the stable phase of a WSD schedule, up to the onset of annealing",
         (PretrainConfig, ModelConfig, ParallelConfig, OptimizerConfig, BatchConfig)),
        ("select", "pilot, sketches, curvature and the selection problem, in one launch",
         (SelectConfig, PilotConfig, CurvatureConfig, SelectionConfig, ModelConfig, ParallelConfig,
          OptimizerConfig, BatchConfig)),
        ("anneal", "the decay phase over the selected samples, or over random ones",
         (AnnealConfig, ParallelConfig, OptimizerConfig, BatchConfig)),
        ("evaluate", "multiple-choice questions, answered by likelihood",
         (EvaluateConfig, ModelConfig, ParallelConfig)),
        ("compare", "arms of selection, annealed from one checkpoint and compared over seeds",
         (CompareConfig, SelectConfig, PilotConfig, CurvatureConfig, SelectionConfig, ModelConfig,
          ParallelConfig, OptimizerConfig, BatchConfig)),
        ("report", "the table of a run, and its report.html", (ReportConfig,)),
        ("inspect", "what masks hold; masks combined, or made datasets", (InspectConfig,)),
    ):
        command = commands.add_parser(name, help=help_text, allow_abbrev=False)
        add_flags(command, *groups)
    return parser


def _dispatch(flags: argparse.Namespace) -> None:
    layout = from_flags(ParallelConfig, flags)
    if flags.command == "pretrain":
        from megatron_direct.commands.pretrain import PretrainConfig, pretrain

        pretrain(from_flags(PretrainConfig, flags), from_flags(ModelConfig, flags), layout,
                 from_flags(OptimizerConfig, flags), from_flags(BatchConfig, flags))
    elif flags.command == "select":
        from megatron_direct.commands.select import SelectConfig, select
        from megatron_direct.steps.curvature import CurvatureConfig
        from megatron_direct.steps.pilot import PilotConfig
        from megatron_direct.steps.solve import SelectionConfig

        select(from_flags(SelectConfig, flags), given_flags(ModelConfig, flags), layout,
               from_flags(CurvatureConfig, flags), from_flags(SelectionConfig, flags),
               from_flags(PilotConfig, flags), _given_training(flags))
    elif flags.command == "anneal":
        from megatron_direct.commands.anneal import AnnealConfig, anneal

        anneal(from_flags(AnnealConfig, flags), _given_training(flags), layout)
    elif flags.command == "evaluate":
        from megatron_direct.commands.evaluate import EvaluateConfig, evaluate

        evaluate(from_flags(EvaluateConfig, flags), given_flags(ModelConfig, flags), layout)
    elif flags.command == "compare":
        from megatron_direct.commands.compare import CompareConfig, compare
        from megatron_direct.commands.select import SelectConfig
        from megatron_direct.steps.curvature import CurvatureConfig
        from megatron_direct.steps.pilot import PilotConfig
        from megatron_direct.steps.solve import SelectionConfig

        compare(from_flags(CompareConfig, flags), from_flags(SelectConfig, flags),
                from_flags(CurvatureConfig, flags), from_flags(SelectionConfig, flags),
                from_flags(PilotConfig, flags), given_flags(ModelConfig, flags), layout,
                _given_training(flags))
    elif flags.command == "report":
        from megatron_direct.commands.report import ReportConfig, report
        from megatron_direct.runtime import parallel

        config = from_flags(ReportConfig, flags)
        parallel.on_rank_zero(lambda: report(config))
    elif flags.command == "inspect":
        from megatron_direct.commands.inspect import InspectConfig, inspect
        from megatron_direct.runtime import parallel

        masks = from_flags(InspectConfig, flags)
        parallel.on_rank_zero(lambda: inspect(masks))


def _given_training(flags: argparse.Namespace) -> dict[type, dict]:
    """The flags of optimizer and batches that were given; the rest is the checkpoint's."""
    return {kind: given_flags(kind, flags) for kind in (OptimizerConfig, BatchConfig)}


def run(work: Callable[[], None], layout: ParallelConfig) -> int:
    """``work()`` on all ranks, inside host() and a process group; returns the exit status.

    An error is told once: by rank 0 if it met it, else by the first rank that did.
    """
    from megatron_direct.errors import UserError
    from megatron_direct.mcore.without_gpu import megatron_runtime
    from megatron_direct.runtime import parallel

    with megatron_runtime(), parallel.process_group(
            layout.distributed_timeout_minutes):
        try:
            work()
        except UserError as error:
            if parallel.first_to_speak():
                print(f"megatron-direct: error: {error}", file=sys.stderr, flush=True)
            return 1
        except Exception:
            if parallel.first_to_speak():
                traceback.print_exc()
            return 1
    return 0
