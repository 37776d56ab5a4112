"""The files of a run directory of ``compare``, read: candidates, results, spectra."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_direct.comparison.repeats import Repeats
from megatron_direct.comparison.summary import SampleTexts, SettingSummary, SpectrumSummary
from megatron_direct.data.checks import ALL_DATASETS
from megatron_direct.mcore.training import read_metrics
from megatron_direct.runtime import arrays, files, typed_json
from megatron_direct.runtime.manifest import Artefact
from megatron_direct.runtime.run_directory import RunDirectory
from megatron_direct.steps.selected import PoolComposition


@dataclass(frozen=True)
class Candidates:
    """``samples.npz`` of one seed: arrays [N]."""

    numbers: np.ndarray  # of the samples, in their pools' order
    loss: np.ndarray
    labels: np.ndarray
    domain: np.ndarray
    corrupted: np.ndarray
    stiff_cost: np.ndarray
    uncut_labels: np.ndarray  # of whole documents

    def positions(self, numbers: np.ndarray) -> np.ndarray:
        order = np.argsort(self.numbers)
        found = order[np.searchsorted(self.numbers, numbers, sorter=order).clip(
            max=len(order) - 1)]
        if not np.array_equal(self.numbers[found], numbers):
            raise ValueError("a selected sample is not among the seed's candidates: chosen.npy and "
                             "samples.npz come from different runs")
        return found


@dataclass(frozen=True)
class SolvedProblem:
    """What the solver reported, in units of the arm's own directions; the budget is infinite where
    there is none."""

    stiff_cost: float | None = None
    stiff_budget: float | None = None
    objective_value: float | None = None


@dataclass(frozen=True)
class LossesOnTestSets:
    test: dict[str, float]  # test set, or `all` -> loss

    @property
    def mean(self) -> float:
        return mean_test_loss(self.test)


@dataclass(frozen=True)
class ResultFile:
    """``result.json`` of one annealing."""

    before: LossesOnTestSets
    after: LossesOnTestSets
    composition: dict[str, PoolComposition]
    problem: SolvedProblem | None = None
    repeats: Repeats | None = None
    version: str | None = None  # of this package; None in one of an older version


@dataclass(frozen=True)
class Result:
    """One annealing. chosen: [K] positions among the seed's candidates."""

    file: ResultFile
    chosen: np.ndarray
    training_losses: np.ndarray  # [iterations]


@dataclass(frozen=True)
class RunResults:
    """All that a run directory holds; seeds and arms without a result are left out."""

    setting: SettingSummary
    identity: dict[str, Any]
    candidates: dict[int, Candidates]  # by seed
    results: dict[str, dict[int, Result]]  # arm -> seed -> result; every arm has an entry
    failures: dict[str, dict[int, str]]  # arm -> seed -> why; every arm has an entry
    spectra: dict[int, SpectrumSummary]
    texts: SampleTexts | None


def mean_test_loss(losses: dict[str, float]) -> float:
    """The mean over test sets; ``all`` is not one of them."""
    return float(np.mean([loss for name, loss in losses.items() if name != ALL_DATASETS]))


def read_run(run_dir: str | Path) -> RunResults:
    run = RunDirectory(run_dir)
    setting = typed_json.read_record(SettingSummary, run.path / "setting.json")
    seeds = {seed: run.path / "seeds" / str(seed) for seed in setting.seeds}
    candidates = {seed: _candidates(folder / "samples.npz") for seed, folder in seeds.items()
                  if (folder / "samples.npz").is_file()}
    results = {name: _results(run.path / "arms" / name, candidates) for name in setting.arms}
    texts = run.path / "texts.json"
    return RunResults(
        setting, _identity(run.path), candidates, results,
        {name: _failures(run.path / "arms" / name, setting.seeds) for name in setting.arms},
        _spectra(list(seeds.items())),
        typed_json.read_record(SampleTexts, texts) if texts.is_file() else None)


def _identity(folder: Path) -> dict[str, Any]:
    """The flags that the run depends on, digests left out."""
    found = Artefact(folder, "a comparison").read()
    if found is None:
        return {}
    key = {name: value for name, value in found["key"].items()
           if not name.endswith(("_digest", "_digests"))}
    seed = key.pop("first_seed")  # the key's own seed is the default of a group of settings
    return {**key, **found["details"], "seed": seed}


def _candidates(path: Path) -> Candidates:
    there = arrays.read_npz(path, arrays.MAKE_AGAIN)
    uncut = "uncut_labels" if "uncut_labels" in there else "labels"  # of an older version
    return Candidates(*arrays.read_named(path, (
        "candidates", "loss", "labels", "domain", "corrupted", "stiff_cost", uncut),
        arrays.MAKE_AGAIN))


def _results(folder: Path, candidates: dict[int, Candidates]) -> dict[int, Result]:
    found = {}
    for seed, of_seed in candidates.items():
        files_of_seed = [folder / str(seed) / name for name in ("result.json", "chosen.npy")]
        if all(path.is_file() for path in files_of_seed):
            metrics = read_metrics(folder / str(seed) / "metrics.jsonl")
            found[seed] = Result(
                typed_json.read_record(ResultFile, files_of_seed[0]),
                of_seed.positions(arrays.read_npy(files_of_seed[1], arrays.MAKE_AGAIN)),
                np.array([line["loss"] for line in metrics], dtype=np.float64))
    return found


def _failures(folder: Path, seeds: Sequence[int]) -> dict[int, str]:
    paths = {seed: folder / str(seed) / "failed.json" for seed in seeds}
    return {seed: files.read_json(path)["error"] for seed, path in paths.items() if path.is_file()}


def _spectra(seeds: Sequence[tuple[int, Path]]) -> dict[int, SpectrumSummary]:
    found = {}
    for seed, folder in seeds:
        path = folder / "onset" / "curvature" / "spectrum.json"  # as the stiff costs are
        if path.is_file():
            spectrum = files.read_json(path)
            found[seed] = SpectrumSummary(
                tuple(spectrum["eigenvalues"]), spectrum["elbow"]["num_stiff"],
                spectrum["operator"], tuple(spectrum["notes"]))
    return found
