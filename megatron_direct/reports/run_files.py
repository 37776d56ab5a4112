"""The files of a run directory that its report shows, read into typed objects.

All that the report knows of the layout of a run directory is in this module.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_direct.comparison.run_results import PoolCounts
from megatron_direct.curvature.density import Estimate
from megatron_direct.curvature.spectrum import Elbow
from megatron_direct.mcore.training import read_metrics
from megatron_direct.runtime.run_directory import RunDirectory
from megatron_direct.runtime.typed_json import from_json, read_record

_STAGE_OF_ARM = "anneal "  # what the record calls the annealing of an arm, before its name


@dataclass(frozen=True)
class Losses:
    """Mean loss per token by dataset; ``all``: over the tokens of all of them."""

    valid: dict[str, float]
    test: dict[str, float]


@dataclass(frozen=True)
class AnnealingResult:
    """``result.json`` of an arm."""

    before: Losses
    after: Losses
    tokens: int


@dataclass(frozen=True)
class Annealing:
    result: AnnealingResult
    iterations: tuple[int, ...]
    training_losses: tuple[float, ...]


@dataclass(frozen=True)
class SampleCounts:
    """What the sequence length and the gradients left of the pools."""

    in_pools: int
    too_short: int
    cut: int
    cut_tokens: int
    not_finite: int


@dataclass(frozen=True)
class MeanLoss:
    """Before annealing."""

    pool: float
    selected: float


@dataclass(frozen=True)
class SelectionRecord:
    """``selection.json``."""

    objective: str
    num_select: int
    objective_value: float | None
    upper_bound: float | None
    status: str
    stiff_cost: float | None
    stiff_budget: float | None
    least_stiff_cost: float
    average_stiff_cost: float
    samples: SampleCounts
    mean_loss: MeanLoss
    composition: dict[str, PoolCounts]


@dataclass(frozen=True)
class Density:
    nodes: tuple[float, ...]
    weights: tuple[float, ...]
    trace: Estimate
    positive_trace: Estimate


@dataclass(frozen=True)
class Spectrum:
    """``curvature/spectrum.json``."""

    operator: str
    dimension: int
    eigenvalues: tuple[float, ...]
    elbow: Elbow
    notes: tuple[str, ...]
    density: Density | None


@dataclass(frozen=True)
class CommandRecord:
    """One command that worked on the run."""

    name: str
    layout: dict[str, Any]
    versions: dict[str, str]


@dataclass(frozen=True)
class RunReport:
    """A run with a finished selection.

    annealings: by arm, of those that are finished. compositions: by selection and pool; random
    selections have one, too. seconds: by step of the selection, empty if they were not measured.
    """

    path: str
    annealings: dict[str, Annealing]
    selections: dict[str, SelectionRecord]
    compositions: dict[str, dict[str, PoolCounts]]
    spectrum: Spectrum
    seconds: dict[str, float]
    commands: tuple[CommandRecord, ...]


def read_run(run_dir: str | Path) -> RunReport:
    """Raises UserError if the directory has no finished selection, or a file cannot be read."""
    run = RunDirectory(run_dir)
    run.stage("select")
    record = run.record()
    arms = [stage.removeprefix(_STAGE_OF_ARM) for stage, found in record.items()
            if stage.startswith(_STAGE_OF_ARM) and found["finished"]]
    selection = read_record(SelectionRecord, run.path / "selection.json")
    compositions = {"direct": selection.composition}
    for arm in arms:
        path = run.path / "anneal" / arm / "composition.json"
        if path.is_file():
            compositions[arm] = read_record(dict[str, PoolCounts], path)
    seconds = run.path / "seconds.json"
    return RunReport(
        path=str(run.path), annealings={arm: _annealing(run.path / "anneal" / arm) for arm in arms},
        selections={"direct": selection}, compositions=compositions,
        spectrum=read_record(Spectrum, run.path / "curvature" / "spectrum.json"),
        seconds=read_record(dict[str, float], seconds) if seconds.is_file() else {},
        commands=tuple(from_json(CommandRecord, {"name": stage, **found})
                       for stage, found in record.items()))


def _annealing(folder: Path) -> Annealing:
    metrics = read_metrics(folder / "metrics.jsonl")
    return Annealing(read_record(AnnealingResult, folder / "result.json"),
                     tuple(line["iteration"] for line in metrics),
                     tuple(line["loss"] for line in metrics))
