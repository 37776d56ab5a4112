"""The files of a run directory that its report shows, read into typed objects.

All that the report knows of the layout of a run directory is in this module.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_direct.curvature.density import Estimate
from megatron_direct.curvature.spectrum import Elbow
from megatron_direct.mcore.training import read_metrics
from megatron_direct.runtime.manifest import Artefact
from megatron_direct.runtime.run_directory import RunDirectory
from megatron_direct.runtime.typed_json import read_record
from megatron_direct.steps import annealed, selected
from megatron_direct.steps.annealed import ArmResult, is_random, random_arm
from megatron_direct.steps.domains import Domains
from megatron_direct.steps.selected import PoolComposition, SelectionSummary


@dataclass(frozen=True)
class Annealing:
    """arm: of the annealing, which may be another one's average; settings: all that it depends on
    but for its masks."""

    arm: str
    settings: dict[str, Any]
    result: ArmResult
    iterations: tuple[int, ...]
    training_losses: tuple[float, ...]


@dataclass(frozen=True)
class Density:
    nodes: tuple[float, ...]
    weights: tuple[float, ...]
    trace: Estimate
    positive_trace: Estimate


@dataclass(frozen=True)
class SpectrumRecord:
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
    selections have one, too. domains: by selection, of those that have them. seconds: by step of
    the selection, empty if they were not measured.
    """

    path: str
    annealings: dict[str, Annealing]
    selections: dict[str, SelectionSummary]
    compositions: dict[str, dict[str, PoolComposition]]
    domains: dict[str, Domains]
    spectrum: SpectrumRecord
    seconds: dict[str, float]
    commands: tuple[CommandRecord, ...]

    def reference_of(self, name: str) -> str:
        """The random arm of as many samples, with which one is compared, an average with its
        average; "" of a random arm."""
        arm = self.annealings[name].arm
        return "" if is_random(arm) else random_arm(arm) + name.removeprefix(arm)

    def is_compared(self, name: str) -> bool:
        """Whether its random arm is there, and was annealed the same way."""
        reference = self.reference_of(name)
        return reference in self.annealings and not self.differences(name, reference)

    def differences(self, first: str, second: str) -> list[str]:
        """Settings in which two annealings differ, beside their masks, and whether it is in how
        many samples were selected: a selection's name may have been another one's."""
        one, other = (self.annealings[name].settings for name in (first, second))
        counts = {sum(pool.selected for pool in self.compositions[arm].values())
                  for arm in (self.annealings[name].arm for name in (first, second))
                  if arm in self.compositions}
        return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key)) \
            + ["number of samples"] * (len(counts) > 1)


def read_report_files(run_dir: str | Path) -> RunReport:
    """Raises UserError if the directory has no finished selection, or a file cannot be read."""
    run = RunDirectory(run_dir)
    run.require()
    names = selected.selection_names(run.path)
    if not names:
        selected.find_selection(run.path, "direct")  # says what is missing
    selections = {name: selected.find_selection(run.path, name)[1] for name in names}
    arms = annealed.arm_names(run.path)
    drawn = {arm: annealed.read_composition(selected.arm_folder(run.path, arm)) for arm in arms}
    seconds = run.path / "seconds.json"
    return RunReport(
        path=str(run.path),
        annealings={annealing.result.arm: annealing for arm in arms
                    for annealing in _annealings(selected.arm_folder(run.path, arm))},
        selections=selections,
        compositions={**{name: found.composition for name, found in selections.items()},
                      **{arm: found for arm, found in drawn.items() if found is not None}},
        domains={name: found for name in names if (found := Domains.read(
            selected.selection_folder(run.path, name))) is not None},
        spectrum=read_record(SpectrumRecord, run.path / "curvature" / "spectrum.json"),
        seconds=read_record(dict[str, float], seconds) if seconds.is_file() else {},
        commands=tuple(CommandRecord(call["command"], call["flags"]["layout"],
                                     call["provenance"]["versions"]) for call in run.record()))


def _annealings(folder: Path) -> list[Annealing]:
    """An arm, and the averages of its last states, which have no training of their own."""
    metrics = read_metrics(folder / "metrics.jsonl")
    found = Artefact(folder, "an annealed arm").read() or {"key": {}}
    settings = {name: value for name, value in found["key"].items() if name != "segments"}
    arm = Annealing(folder.name, settings, ArmResult.read(folder),
                    tuple(line["iteration"] for line in metrics),
                    tuple(line["loss"] for line in metrics))
    return [arm, *(Annealing(folder.name, settings, average, (), ())
                   for average in annealed.read_averages(folder))]
