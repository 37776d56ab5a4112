"""What arms may know at a seed: measured once, shared by all of them, and put into a Case."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_direct.commands.select import (
    SelectConfig,
    clock,
    draw,
    identity_of,
    identity_of_pilot,
    measure,
)
from megatron_direct.comparison.arms import REGISTRY as ARMS
from megatron_direct.comparison.arms import Case
from megatron_direct.config import (
    BatchConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    flag,
)
from megatron_direct.curvature.spectrum import Directions
from megatron_direct.data import indexed
from megatron_direct.data.samples import Samples
from megatron_direct.errors import UserError
from megatron_direct.gradients import store
from megatron_direct.runtime import files, parallel
from megatron_direct.selection import treatment
from megatron_direct.selection.treatment import Evidence, SelectionConfig
from megatron_direct.steps import solve as selection_stage
from megatron_direct.steps.curvature import CurvatureConfig
from megatron_direct.steps.pilot import PilotConfig, measured_at


@dataclass(frozen=True)
class CompareConfig:
    """Comparison."""

    test_data_path: tuple = flag(
        (), "indexed datasets whose losses are compared; no selection sees them", nargs="+",
        required=True)
    arms: tuple = flag((), f"arms to compare, left out: all ({', '.join(ARMS)})", nargs="+")
    num_seeds: int = flag(5, "replicates of each arm")
    lr_wsd_decay_iters: int = flag(100, "iterations of each annealing")
    name: str = flag("", "what the report calls this comparison; left out: the run directory's")
    tokenizer_model: str = flag("", "tokenizer that turns samples back into text for the report; "
                                    "left out: no samples are shown")


@dataclass(frozen=True)
class Setting:
    """All that the seeds and arms of one comparison share."""

    config: CompareConfig
    select: SelectConfig
    curvature: CurvatureConfig
    selection: SelectionConfig
    pilot: PilotConfig
    architecture: ModelConfig
    layout: ParallelConfig
    optimizer: OptimizerConfig
    batch: BatchConfig
    checkpoint: Path
    has_optimizer: bool
    tokenizer_digest: str
    samples: Samples
    valid_samples: Samples
    num_select: int

    @property
    def folder(self) -> Path:
        return Path(self.select.run_dir)

    @property
    def seeds(self) -> list[int]:
        return [self.select.seed + number for number in range(self.config.num_seeds)]


def measured(setting: Setting, seed: int, needs: set[str]) -> Case | None:
    """What the arms may know at a seed, computed or read; on rank 0, None elsewhere.

    Arms that others have proposed take gradients where they propose it, at the checkpoint; what
    ``select`` takes with these flags may be measured behind a pilot.
    """
    folder = setting.folder / "seeds" / str(seed)
    folders = {"onset": onset_folder(setting, folder), "adam-sketches": folder / "adam",
               "select": folder}
    shared = folders["onset"] == folder
    directions = {"onset": _measure(setting, seed, folders["onset"], as_select=shared)}
    if shared:
        directions["select"] = directions["onset"]
    elif "select" in needs:
        directions["select"] = _measure(setting, seed, folder, as_select=True)
    if "adam-sketches" in needs:
        directions["adam-sketches"] = _measure(setting, seed, folders["adam-sketches"],
                                               precondition="adam")
    return parallel.kept_on_rank_zero(lambda: _case(setting, seed, folders, directions))


def _case(setting: Setting, seed: int, folders: dict[str, Path],
          directions: dict[str, Directions]) -> Case:
    """Out of what was measured (rank 0). The candidates of a seed are settled the first time."""
    stored = {name: [store.load(folders[name] / "sketches" / some) for some in ("pool", "valid")]
              for name in directions}
    finite = np.logical_and.reduce([pool.finite for pool, _ in stored.values()])
    pool, valid = stored["onset"]
    path = setting.folder / "seeds" / str(seed) / "samples.npz"
    if path.is_file():
        with np.load(path) as arrays:
            settled = np.isin(pool.samples, arrays["candidates"])
        lost = pool.samples[settled & ~finite]
        if len(lost):
            raise UserError(
                f"seed {seed}: samples {', '.join(map(str, lost[:5]))} have no finite gradient "
                f"for {', '.join(directions)}, and were candidates of arms that are there already. "
                "Begin anew in another --run-dir, with all arms at once.")
        finite = settled
    here = pool.samples[finite]
    samples = setting.samples
    evidence = {name: Evidence(rows.rows[finite], samples.num_labels[here],
                               samples.dataset_of(here), len(samples.prefixes),
                               np.arange(len(here)), valid.rows, directions[name])
                for name, (rows, valid) in stored.items()}
    case = Case(evidence, pool.losses[finite], _domains(setting.samples, here),
                setting.samples.corrupted[here], _domains(setting.valid_samples, valid.samples),
                setting.valid_samples.num_labels[valid.samples], setting.num_select, seed,
                setting.selection, selection_stage.limits(setting.selection, samples, here))
    with files.written_whole(path) as file:
        np.savez(file, candidates=here, loss=case.losses,
                 labels=evidence["onset"].labels, domain=setting.samples.dataset_of(here),
                 corrupted=case.corrupted,
                 stiff_cost=treatment.stiff_costs(evidence["onset"].rows, directions["onset"]))
    return case


def onset_folder(setting: Setting, folder: Path) -> Path:
    """Where a seed's sketches at the checkpoint lie: those of select, if they are just these."""
    same = (setting.pilot.pilot_iters == 0 and setting.select.precondition == "none"
            and setting.curvature.curvature == "sketched-fisher")
    return folder if same else folder / "onset"


def _measure(setting: Setting, seed: int, folder: Path, *, as_select: bool = False,
             precondition: str = "none") -> Directions:
    """Sketches and directions of a seed; all ranks call this.

    as_select: as the flags say. Otherwise at the checkpoint itself, with the directions that the
    sketches alone yield: as the authors of the paper compute them.
    """
    begun = clock(folder)
    select = dataclasses.replace(
        setting.select, seed=seed,
        precondition=setting.select.precondition if as_select else precondition)
    pilot = setting.pilot if as_select else PilotConfig(pilot_iters=0)
    curvature = setting.curvature if as_select else dataclasses.replace(
        setting.curvature, curvature="sketched-fisher")
    identity = parallel.on_rank_zero(lambda: identity_of(
        select, setting.architecture, curvature, setting.selection, setting.checkpoint,
        identity_of_pilot(pilot, setting.optimizer, setting.batch)))
    at = measured_at(pilot, setting.checkpoint, folder / "pilot", setting.architecture,
                     setting.layout, setting.optimizer, setting.batch,
                     list(select.data_path), setting.tokenizer_digest, seed)
    return measure(select, curvature, setting.architecture, setting.layout, at, folder,
                   identity, setting.samples, setting.valid_samples,
                   draw(setting.valid_samples.usable, select.num_valid_samples, seed), begun)


def _domains(samples: Samples, numbers: np.ndarray) -> np.ndarray:
    """[n] the domain of each sample: as its dataset's card says, else the dataset's name."""
    return np.array(domain_names(samples))[samples.dataset_of(numbers)]


def domain_names(samples: Samples) -> list[str]:
    names = indexed.prefix_names(samples.prefixes)
    return [indexed.read_card(prefix).get("domain", names[prefix]) for prefix in samples.prefixes]
