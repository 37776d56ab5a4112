"""Eigenpairs of the validation set's curvature on disk: their key, and what they serve for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_direct.curvature.spectrum import Directions, Elbow, find_elbow
from megatron_direct.runtime import arrays, files, parallel
from megatron_direct.runtime.manifest import Artefact, Key
from megatron_direct.steps.curvature_config import SKETCHED_FISHER, CurvatureConfig
from megatron_direct.steps.pass_plan import Drawn
from megatron_direct.steps.sketch import SketchesKey


@dataclass(frozen=True)
class SpectrumKey(Key):
    """What eigenpairs depend on. How many were requested is not part of it: more resume."""

    sketches_digest: str
    valid_digests: tuple[str, ...]
    num_valid_samples: int
    curvature: str
    lanczos_tol: float
    seed: int
    num_curvature_samples: int = 0
    density_samples: int = 0
    density_steps: int = 16


def spectrum_key(config: CurvatureConfig, sketches: SketchesKey, valid: Drawn) -> SpectrumKey:
    return SpectrumKey(sketches.digest(), tuple(valid.digests), len(valid.numbers),
                       config.curvature, config.lanczos_tol, sketches.seed,
                       config.num_curvature_samples, config.density_samples, config.density_steps)


@dataclass(frozen=True)
class Eigenpairs:
    """What a spectrum folder holds. sketches: [p, k] of the eigenvectors; rank: the largest that
    the operator can have; asked: pairs, and max_matvecs: products, that the flags allowed;
    total_energy: the sum of all positive eigenvalues, or None if that is not known."""

    eigenvalues: np.ndarray
    sketches: np.ndarray
    rank: int
    asked: int
    max_matvecs: int
    converged: bool
    total_energy: float | None

    def serve(self, config: CurvatureConfig) -> bool:
        """Whether they are all that the flags ask for."""
        if config.curvature == SKETCHED_FISHER:  # earlier versions wrote the leading ones only
            return len(self.eigenvalues) == self.rank
        wanted = min(config.num_eigenpairs, self.rank)
        if self.converged:
            return len(self.eigenvalues) >= wanted
        return self.asked >= wanted and self.max_matvecs >= config.max_matvecs

    def elbow(self, config: CurvatureConfig) -> Elbow:
        """Among all pairs that the operator has, or the leading ones that the flags ask for."""
        count = self.rank if len(self.eigenvalues) == self.rank else config.num_eigenpairs
        return find_elbow(self.eigenvalues[:count], config.energy_share,
                          total_energy=self.total_energy)

    def directions(self, config: CurvatureConfig) -> Directions:
        """The leading pairs that the flags ask for, and all up to the elbow, which are stiff."""
        num_stiff = self.elbow(config).num_stiff
        values = self.eigenvalues[: max(config.num_eigenpairs, num_stiff)]
        return Directions(values, self.sketches[: len(values)], num_stiff)


def known_directions(config: CurvatureConfig, key: SpectrumKey, folder: Path) -> Directions | None:
    """Those of an earlier run, if they are all that is asked for; all ranks call this."""
    def read() -> Directions | None:
        if not Artefact(folder, "a spectrum").matches(key):
            return None
        found = _read(folder)
        return found.directions(config) if found.serve(config) else None

    return parallel.on_rank_zero(read)


def write_eigenpairs(folder: Path, key: SpectrumKey, found: Eigenpairs, summary: dict) -> None:
    artefact = Artefact(folder, "a spectrum")
    artefact.begin(key)  # what is there is of another run, or is about to be replaced by more
    total = np.nan if found.total_energy is None else found.total_energy
    with files.written_whole(folder / "directions.npz") as file:
        np.savez(file, **{**vars(found), "total_energy": total})
    files.write_json(folder / "spectrum.json", summary)
    artefact.finish(key)


def _read(folder: Path) -> Eigenpairs:
    values, sketches, rank, asked, max_matvecs, converged, total = arrays.read_named(
        folder / "directions.npz",
        ("eigenvalues", "sketches", "rank", "asked", "max_matvecs", "converged", "total_energy"),
        f"Delete {folder}, and run the command again.")
    return Eigenpairs(values, sketches, int(rank), int(asked), int(max_matvecs), bool(converged),
                      None if np.isnan(total) else float(total))
