"""Leading directions of the validation set's curvature, and what they are once sketched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from megatron_direct.config import Precision
from megatron_direct.curvature.density import SpectralDensity, spectral_density
from megatron_direct.curvature.fisher import FisherOperator
from megatron_direct.curvature.gauss_newton import GaussNewtonOperator
from megatron_direct.curvature.hessian import HessianOperator
from megatron_direct.curvature.krylov import KrylovState, SymmetricOperator
from megatron_direct.curvature.lanczos import AsymmetricOperator, Spectrum, leading_eigenpairs
from megatron_direct.curvature.preconditioner import PreconditionedOperator
from megatron_direct.curvature.resume import LanczosLog
from megatron_direct.curvature.sketched import SketchedFisherOperator
from megatron_direct.curvature.spectrum import (
    PAPER_ENERGY_SHARE,
    Directions,
    Elbow,
    find_elbow,
)
from megatron_direct.curvature.symmetry import check_symmetry
from megatron_direct.curvature.thick_restart import SYMMETRY_TOL, Target
from megatron_direct.curvature.vectors import ParameterSpace
from megatron_direct.data.samples import Samples
from megatron_direct.errors import UserError
from megatron_direct.gradients.per_sample import GradientModel
from megatron_direct.mcore import grid
from megatron_direct.runtime import arrays, attendance, files, host, parallel
from megatron_direct.runtime.manifest import Artefact, Key
from megatron_direct.settings import Settings, flag
from megatron_direct.steps.pass_plan import Drawn
from megatron_direct.steps.sketch import SketchesKey

OPERATORS: dict[str, Any] = {"hessian": HessianOperator, "gauss-newton": GaussNewtonOperator,
                             "fisher": FisherOperator}
SKETCHED_FISHER = "sketched-fisher"
# In the place of SYMMETRY_TOL: 1.3e-3 was measured of a Fisher in bfloat16.
_BF16_SYMMETRY_TOL = 2e-2
EXACT = ("hessian", "gauss-newton")  # with second derivatives of the layers
# A basis on disk from this size on is worth a word to the user: it stays after the run.
_REPORTED_BYTES = 1 << 30


@dataclass(frozen=True)
class CurvatureConfig(Settings):
    """Curvature."""

    curvature: str = flag(
        SKETCHED_FISHER, "operator whose leading directions are the stiff ones; sketched-fisher "
        "is computed from the validation set's sketches and needs no further pass",
        choices=(*OPERATORS, SKETCHED_FISHER))
    num_eigenpairs: int = flag(
        64, "leading eigenpairs to compute; those up to the elbow are stiff; sketched-fisher "
        "has all of its pairs, and uses so many, or all up to the elbow", at_least=1)
    energy_share: float = flag(
        PAPER_ENERGY_SHARE, "share of the energy that the stiff directions hold", above=0,
        at_most=1)
    lanczos_tol: float = flag(
        1e-3, "residual of an eigenpair, relative to the largest eigenvalue, that stops Lanczos",
        above=0, below=1)
    max_matvecs: int = flag(200, "largest number of operator products of Lanczos", at_least=2)
    num_curvature_samples: int = flag(
        0, "largest number of validation samples in operator products; 0: all",
        at_least=0)
    density_samples: int = flag(
        0, "random vectors for the spectral density and the trace, at least 2; 0: none, and "
        "the elbow of --curvature hessian and gauss-newton is found among the computed pairs",
        at_least=0)
    density_steps: int = flag(16, "Lanczos steps from each of the random vectors", at_least=2)

    def check(self) -> None:
        if self.density_samples == 1:
            raise UserError("--density-samples is 1: it must be 0, or at least 2 for an estimate "
                            "with a standard error.")


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
    the operator can have; total_energy: the sum of all positive eigenvalues, or None if that is not
    known."""

    eigenvalues: np.ndarray
    sketches: np.ndarray
    rank: int
    max_matvecs: int
    converged: bool
    total_energy: float | None

    def serve(self, config: CurvatureConfig) -> bool:
        """Whether they are all that the flags ask for."""
        if config.curvature == SKETCHED_FISHER:  # earlier versions wrote the leading ones only
            return len(self.eigenvalues) == self.rank
        if self.converged:
            return len(self.eigenvalues) >= min(config.num_eigenpairs, self.rank)
        return self.max_matvecs >= config.max_matvecs

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


def layer_spec(config: CurvatureConfig) -> str:
    """Of the layers that its products can be taken of."""
    return "local" if config.curvature in EXACT else "fused"


def require_precision(config: CurvatureConfig, precision: Precision) -> None:
    """Raises UserError for exact products of a model in bfloat16, before any work."""
    if precision.bf16 and config.curvature in EXACT:
        raise UserError(
            f"--curvature {config.curvature} needs float32: its products are exact, which they "
            "would not be with bfloat16 weights and activations. Add --no-bf16, or use "
            "--curvature fisher.")


def known_directions(config: CurvatureConfig, key: SpectrumKey, folder: Path) -> Directions | None:
    """Those of an earlier run, if they are all that is asked for; all ranks call this."""
    def read() -> Directions | None:
        if not Artefact(folder, "a spectrum").matches(key):
            return None
        found = _read(folder)
        return found.directions(config) if found.serve(config) else None

    return parallel.on_rank_zero(read)


def leading_directions(config: CurvatureConfig, key: SpectrumKey, folder: Path, valid: Drawn,
                       valid_rows: np.ndarray, gradients: GradientModel | None) -> Directions:
    """Computes them, or carries on to more of them; all ranks call this.

    valid_rows: [M, k] sketches of the validation samples. gradients: None will do for the sketched
    Fisher, which needs no pass.
    """
    attendance.at("curvature")
    if config.curvature == SKETCHED_FISHER:
        numbers = valid.numbers
        work = _Lanczos(config, SketchedFisherOperator(valid_rows, numbers), key)
        spectrum, density = work.run()
        sketches = np.stack(spectrum.eigenvectors)
    else:
        assert gradients is not None
        numbers = _evenly(valid.numbers, config.num_curvature_samples)
        work = _over_parameters(config, key, folder, valid.samples, numbers, gradients)
        spectrum, density = work.run()
        sketches = grid.sum_over_model(torch.stack([
            gradients.sketch.of_vector(work.space.split(v), gradients.shards)
            for v in spectrum.eigenvectors])).cpu().numpy()
    found = Eigenpairs(spectrum.eigenvalues, sketches, work.rank, config.max_matvecs,
                       spectrum.converged,
                       _total_energy(config, density, valid_rows, gradients))
    notes = _notes(config, found, work.operator)
    parallel.on_rank_zero(lambda: _write(folder, key, found, {
        **_summary(spectrum, density), "operator": config.curvature,
        "num_valid_samples": len(numbers), "dimension": work.space.dimension,
        "elbow": vars(found.elbow(config)), "notes": notes}))
    parallel.say(f"curvature: {'; '.join(notes)}; {spectrum.num_matvecs} products, "
                 f"{spectrum.status}")
    if work.log is not None and (held := work.log.num_bytes()) >= _REPORTED_BYTES:
        parallel.say(f"curvature: {folder / 'lanczos'} holds {held / 2**30:.1f} GiB of basis "
                     "vectors, from which a run with more --num-eigenpairs or --max-matvecs "
                     "resumes. It may be deleted: such a run then starts from scratch.")
    return found.directions(config)


def _over_parameters(config: CurvatureConfig, key: SpectrumKey, folder: Path, samples: Samples,
                     numbers: np.ndarray, gradients: GradientModel) -> _Lanczos:
    space = ParameterSpace(gradients.shards)
    chunk_config: Any = gradients.chunks[0].config
    room = (_room_for_products(config, space),) if config.curvature in EXACT else ()
    operator: Any = OPERATORS[config.curvature](
        gradients.chunks, space, samples, numbers, gradients.micro_batch, *room)
    if gradients.scales is not None:
        operator = PreconditionedOperator(operator, space, gradients.scales)
    return _Lanczos(config, operator, key,
                    LanczosLog(folder / "lanczos", key.digest(), gradients.shards),
                    _BF16_SYMMETRY_TOL if chunk_config.bf16 else SYMMETRY_TOL)


def _room_for_products(config: CurvatureConfig, space: ParameterSpace) -> int:
    """A quarter of the bytes that are free and that the basis of Lanczos will not take."""
    basis = Target(config.num_eigenpairs, config.lanczos_tol, config.max_matvecs).basis_limit
    return max(0, host.free_bytes() - basis * space.num_bytes()) // 4


def _evenly(numbers: np.ndarray, count: int) -> np.ndarray:
    """At most ``count`` of them (all for 0), spread evenly over the datasets, as they are."""
    if 0 < count < len(numbers):
        return numbers[np.arange(count) * len(numbers) // count]
    return numbers


class _Lanczos:
    """One run over an operator, whose ``space`` has ``dimension`` and ``random_signs``. log: of its
    state, from which a run that was killed, or that is asked for more pairs, carries on."""

    def __init__(self, config: CurvatureConfig, operator, key: SpectrumKey,
                 log: LanczosLog | None = None,
                 symmetry_tol: float = SYMMETRY_TOL):
        self.config, self.operator, self.space = config, operator, operator.space
        self.rank = self.space.dimension
        if "fisher" in config.curvature:
            self.rank = min(self.rank, operator.num_samples)
        self._seed, self.log, self._symmetry_tol = key.seed, log, symmetry_tol

    def run(self) -> tuple[Spectrum, SpectralDensity | None]:
        """Leading eigenpairs, and the density if it is asked for."""
        config, space, log = self.config, self.space, self.log
        if isinstance(self.operator, SketchedFisherOperator):
            return parallel.on_rank_zero(self.operator.spectrum), None
        with tqdm(desc=f"lanczos ({config.curvature})", unit="product",
                  disable=None if parallel.is_rank_zero() else True) as progress:
            operator = SymmetricOperator(_counted(self.operator.matvec, progress), space,
                                         space.random_signs, space.dimension)
            target = Target(min(config.num_eigenpairs, self.rank), config.lanczos_tol,
                            config.max_matvecs, symmetry_tol=self._symmetry_tol)
            try:
                spectrum = leading_eigenpairs(operator, target, space.random_signs(self._seed),
                                              state=None if log is None else log.load(),
                                              on_step=None if log is None else self._after_step)
            except AsymmetricOperator as error:
                raise UserError(f"--curvature {config.curvature}: {error}"
                                f"{self._likely_cause()}") from error
            if config.density_samples == 0:
                return spectrum, None
            return spectrum, spectral_density(
                operator, config.density_samples, config.density_steps,
                eigenvalues=spectrum.eigenvalues, eigenvectors=spectrum.eigenvectors)

    def _after_step(self, state: KrylovState) -> None:
        assert self.log is not None
        self.log.write(state)
        attendance.at(f"curvature, product {state.num_matvecs}")
        if parallel.stop_is_agreed():
            parallel.stop()

    def _likely_cause(self) -> str:
        """The kind of layer at which the asymmetry is largest, where the space has layers."""
        if not isinstance(self.space, ParameterSpace):
            return ""
        try:
            check_symmetry(self.operator.matvec, self.space)
        except UserError as error:
            return f" ({error})"
        return ""


def _counted(matvec: Callable, progress: tqdm) -> Callable:
    def counted(vector):
        progress.update()
        return matvec(vector)

    return counted


def _total_energy(config: CurvatureConfig, density: SpectralDensity | None,
                  valid_rows: np.ndarray, gradients: GradientModel | None) -> float | None:
    """The sum of all positive eigenvalues, where it is known.

    That of the empirical Fisher is its trace, (1/M) sum_i ||g_i||^2, known from the sketches if
    they are of the same losses (the Fisher is of mean ones, the sketched one of the sketches').
    """
    if density is not None:
        return density.positive_trace.value
    if gradients is None or config.curvature == SKETCHED_FISHER or (
            config.curvature == "fisher" and gradients.sample_loss == "mean"):
        return float(np.mean(np.sum(valid_rows.astype(np.float64) ** 2, axis=1)))
    return None


def _notes(config: CurvatureConfig, found: Eigenpairs, operator) -> list[str]:
    notes = [str(found.elbow(config)), *getattr(operator, "notes", lambda: [])()]
    if found.rank < config.num_eigenpairs:
        notes.append(f"the operator's rank is at most {found.rank}: only {found.rank} of "
                     f"--num-eigenpairs {config.num_eigenpairs} were computed")
    return notes


def _summary(spectrum: Spectrum, density: SpectralDensity | None) -> dict:
    return {
        "eigenvalues": spectrum.eigenvalues.tolist(),
        "residuals": spectrum.residuals.tolist(),
        "converged": spectrum.converged,
        "status": spectrum.status,
        "num_matvecs": spectrum.num_matvecs,
        "smallest_ritz": spectrum.smallest_ritz,
        "density": None if density is None else {
            "nodes": density.nodes.tolist(), "weights": density.weights.tolist(),
            "trace": vars(density.trace), "positive_trace": vars(density.positive_trace)}}


def _write(folder: Path, key: SpectrumKey, found: Eigenpairs, summary: dict) -> None:
    artefact = Artefact(folder, "a spectrum")
    artefact.begin(key)  # what is there is of another run, or is about to be replaced by more
    total = np.nan if found.total_energy is None else found.total_energy
    with files.written_whole(folder / "directions.npz") as file:
        np.savez(file, **{**vars(found), "total_energy": total})
    files.write_json(folder / "spectrum.json", summary)
    artefact.finish(key)


def _read(folder: Path) -> Eigenpairs:
    names = ("eigenvalues", "sketches", "rank", "max_matvecs", "converged", "total_energy")
    values, sketches, rank, max_matvecs, converged, total = arrays.read_named(
        folder / "directions.npz", names, f"Delete {folder}, and run the command again.")
    return Eigenpairs(values, sketches, int(rank), int(max_matvecs), bool(converged),
                      None if np.isnan(total) else float(total))
