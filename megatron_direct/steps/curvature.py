"""Leading directions of the validation set's curvature, and what they are once sketched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from megatron_direct.curvature.density import SpectralDensity, spectral_density
from megatron_direct.curvature.krylov import KrylovState, SymmetricOperator
from megatron_direct.curvature.lanczos import AsymmetricOperator, Spectrum, leading_eigenpairs
from megatron_direct.curvature.preconditioner import PreconditionedOperator
from megatron_direct.curvature.resume import LanczosLog
from megatron_direct.curvature.sketched import SketchedFisherOperator
from megatron_direct.curvature.spectrum import Directions
from megatron_direct.curvature.symmetry import check_symmetry
from megatron_direct.curvature.thick_restart import SYMMETRY_TOL, Target
from megatron_direct.curvature.vectors import ParameterSpace
from megatron_direct.data.samples import Samples
from megatron_direct.errors import UserError
from megatron_direct.gradients.per_sample import GradientModel
from megatron_direct.mcore import grid
from megatron_direct.runtime import attendance, host, parallel
from megatron_direct.steps.curvature_config import (
    EXACT,
    OPERATORS,
    SKETCHED_FISHER,
    CurvatureConfig,
)
from megatron_direct.steps.eigenpairs import Eigenpairs, SpectrumKey, write_eigenpairs
from megatron_direct.steps.pass_plan import Drawn

# In the place of SYMMETRY_TOL: 1.3e-3 was measured of a Fisher in bfloat16.
_BF16_SYMMETRY_TOL = 2e-2
# A basis on disk from this size on is worth a word to the user: it stays after the run.
_REPORTED_BYTES = 1 << 30


def leading_directions(config: CurvatureConfig, key: SpectrumKey, folder: Path, valid: Drawn,
                       valid_rows: np.ndarray, gradients: GradientModel | None) -> Directions:
    """Computes them, or carries on to more of them; all ranks call this.

    valid_rows: [M, k] sketches of the validation samples. gradients: None will do for the sketched
    Fisher, which needs no pass.
    """
    attendance.at("curvature")
    _require_finite(valid_rows, valid.numbers)
    operator: Any
    estimate = None
    if config.curvature == SKETCHED_FISHER:
        numbers = valid.numbers
        operator = SketchedFisherOperator(valid_rows)
        rank, dimension, density = operator.num_samples, operator.dimension, None
        spectrum = parallel.on_rank_zero(operator.spectrum)
        sketches = np.stack(spectrum.eigenvectors)
    else:
        assert gradients is not None
        numbers = _evenly(valid.numbers, config.num_curvature_samples)
        work = _over_parameters(config, key, folder, valid.samples, numbers, gradients)
        operator, rank, dimension = work.operator, work.rank, work.space.dimension
        spectrum, density = work.run()
        sketches = grid.sum_over_model(torch.stack([
            gradients.sketch.of_vector(work.space.split(v), gradients.shards)
            for v in spectrum.eigenvectors])).cpu().numpy()
        if config.curvature == "fisher" and gradients.sample_loss == "mean":
            estimate = _trace_by_sketches(valid_rows[np.isin(valid.numbers, numbers)])
        _say_what_it_holds(work.log)
    rank = min(rank, dimension)
    total = _total_energy(density, spectrum, rank)
    found = Eigenpairs(spectrum.eigenvalues, sketches, rank, config.num_eigenpairs,
                       config.max_matvecs, spectrum.converged, estimate if total is None else total)
    notes = _notes(config, found, operator)
    parallel.on_rank_zero(lambda: write_eigenpairs(folder, key, found, {
        **_summary(spectrum, density), "operator": config.curvature,
        "num_valid_samples": len(numbers), "dimension": dimension,
        "elbow": vars(found.elbow(config)), "notes": notes}))
    parallel.say(f"curvature: {'; '.join(notes)}; {spectrum.num_matvecs} products, "
                 f"{spectrum.status}")
    return found.directions(config)


def _require_finite(rows: np.ndarray, numbers: np.ndarray) -> None:
    bad = numbers[~np.isfinite(rows).all(1)]
    if len(bad):
        raise UserError(f"the loss of validation sample {bad[0]}, or its gradient, is not finite. "
                        "Remove the sample from the validation set, or check the checkpoint.")


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


def _say_what_it_holds(log: LanczosLog) -> None:
    if (held := log.num_bytes()) >= _REPORTED_BYTES:
        parallel.say(f"curvature: {log.folder} holds {held / 2**30:.1f} GiB of basis vectors, from "
                     "which a run with more --num-eigenpairs or --max-matvecs resumes. It may be "
                     "deleted: such a run then starts from scratch.")


class _Lanczos:
    """One run over an operator on parameters. log: of its state, from which a run that was killed,
    or that is asked for more pairs, carries on."""

    def __init__(self, config: CurvatureConfig, operator, key: SpectrumKey, log: LanczosLog,
                 symmetry_tol: float):
        self.config, self.operator, self.space = config, operator, operator.space
        self.rank = self.space.dimension
        if "fisher" in config.curvature:
            self.rank = min(self.rank, operator.num_samples)
        self._seed, self.log, self._symmetry_tol = key.seed, log, symmetry_tol

    def run(self) -> tuple[Spectrum, SpectralDensity | None]:
        """Leading eigenpairs, and the density if it is asked for."""
        config, space, log = self.config, self.space, self.log
        with tqdm(desc=f"lanczos ({config.curvature})", unit="product",
                  disable=None if parallel.is_rank_zero() else True) as progress:
            # Other signs than those that it starts with.
            operator = SymmetricOperator(_counted(self.operator.matvec, progress), space,
                                         lambda seed: space.random_signs(self._seed + 1 + seed),
                                         space.dimension)
            target = Target(min(config.num_eigenpairs, self.rank), config.lanczos_tol,
                            config.max_matvecs, symmetry_tol=self._symmetry_tol)
            try:
                spectrum = leading_eigenpairs(operator, target, space.random_signs(self._seed),
                                              state=log.load(), on_step=self._after_step)
            except AsymmetricOperator as error:
                raise UserError(f"--curvature {config.curvature}: {error}"
                                f"{self._likely_cause()}") from error
            if config.density_samples == 0:
                return spectrum, None
            return spectrum, spectral_density(
                operator, config.density_samples, config.density_steps,
                eigenvalues=spectrum.eigenvalues, eigenvectors=spectrum.eigenvectors)

    def _after_step(self, state: KrylovState) -> None:
        self.log.write(state)
        attendance.at(f"curvature, product {state.num_matvecs}")
        if parallel.stop_is_agreed():
            parallel.stop()

    def _likely_cause(self) -> str:
        """The kind of layer at which the asymmetry is largest."""
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


def _total_energy(density: SpectralDensity | None, spectrum: Spectrum, rank: int) -> float | None:
    """The sum of all positive eigenvalues, where it is known: all are, or the density was asked
    for."""
    if len(spectrum.eigenvalues) == rank:
        return float(np.maximum(spectrum.eigenvalues, 0).sum())
    return None if density is None else density.positive_trace.value


def _trace_by_sketches(rows: np.ndarray) -> float:
    """An estimate of the trace of the empirical Fisher of these samples, (1/m) sum_i ||g_i||^2,
    from their sketches [m, k], if they are of the same losses (its are mean ones). A squared length
    has a standard error of up to sqrt(2 / k): 3 % at k = 2048."""
    return float(np.mean(np.sum(rows.astype(np.float64) ** 2, axis=1)))


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
