"""The curvature stage of ``select``: leading directions, and what they are once sketched."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from megatron_direct.config import flag
from megatron_direct.curvature.density import SpectralDensity, spectral_density
from megatron_direct.curvature.fisher import FisherOperator
from megatron_direct.curvature.gauss_newton import GaussNewtonOperator
from megatron_direct.curvature.hessian import HessianOperator
from megatron_direct.curvature.lanczos import AsymmetricOperator, Spectrum, lanczos
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
from megatron_direct.curvature.vectors import ParameterSpace
from megatron_direct.data.samples import Samples
from megatron_direct.errors import UserError
from megatron_direct.gradients.sketch import Sketch
from megatron_direct.mcore import grid
from megatron_direct.mcore.model import ParameterShard
from megatron_direct.runtime import files, parallel

OPERATORS = {"hessian": HessianOperator, "gauss-newton": GaussNewtonOperator,
             "fisher": FisherOperator}


@dataclass(frozen=True)
class CurvatureConfig:
    """Curvature."""

    curvature: str = flag(
        "sketched-fisher", "operator whose leading directions are the stiff ones; sketched-fisher "
        "comes out of the validation set's sketches and costs no pass",
        choices=(*OPERATORS, "sketched-fisher"))
    num_eigenpairs: int = flag(
        64, "leading eigenpairs that are computed; stiff are those up to the elbow")
    energy_share: float = flag(
        PAPER_ENERGY_SHARE, "share of the energy that the stiff directions hold")
    lanczos_tol: float = flag(
        1e-3, "residual of an eigenpair, over the largest eigenvalue, at which Lanczos stops")
    max_matvecs: int = flag(200, "most operator products that Lanczos may take")
    num_curvature_samples: int = flag(
        0, "of the validation samples, those that operator products run over, at most; 0: all")
    density_samples: int = flag(
        0, "random vectors for the spectral density and the trace, at least 2; 0: neither, and "
        "the elbow of --curvature hessian and gauss-newton is told among the computed pairs")
    density_steps: int = flag(16, "Lanczos steps from each of these vectors")


def leading_directions(config: CurvatureConfig, chunks: Sequence[torch.nn.Module],
                       shards: Sequence[ParameterShard], sketch: Sketch, samples: Samples,
                       numbers: np.ndarray, micro_batch_size: int, *, seed: int,
                       scales: Mapping[str, torch.Tensor] | None, sample_loss: str,
                       valid_rows: np.ndarray, identity: dict, folder: Path) -> Directions:
    """Computes them, or reads them if ``folder`` holds them already; all ranks call this.

    scales: of the preconditioner, by shard; the curvature is then D H D. valid_rows: [M, k]
    sketches of the validation samples, of gradients of their mean or summed losses. identity: of
    checkpoint, data and layout; a Lanczos run of another identity is begun anew.
    """
    if parallel.on_rank_zero(lambda: (folder / "spectrum.json").is_file()):
        return parallel.on_rank_zero(lambda: _read(folder))
    if config.curvature == "sketched-fisher":
        operator = SketchedFisherOperator(valid_rows, numbers)
        space = operator  # it is its own space: vectors are sketches
        spectrum, density = _compute(config, operator, space, seed, None)
        sketches = np.stack(spectrum.eigenvectors)
    else:
        space = ParameterSpace(shards)
        count = config.num_curvature_samples
        if 0 < count < len(numbers):  # spread evenly over the datasets, as the drawn ones are
            numbers = numbers[np.arange(count) * len(numbers) // count]
        operator = OPERATORS[config.curvature](chunks, space, samples, numbers, micro_batch_size)
        if scales is not None:
            operator = PreconditionedOperator(operator, space, scales)
        log = LanczosLog(folder / "lanczos", {**identity, "curvature": config.curvature})
        spectrum, density = _compute(config, operator, space, seed, log)
        sketches = grid.sum_over_model(torch.stack(
            [sketch.of_vector(space.split(v), shards) for v in spectrum.eigenvectors])
        ).cpu().numpy()
    elbow = find_elbow(spectrum.eigenvalues, config.energy_share,
                       total_energy=_total_energy(config, density, valid_rows, sample_loss))
    notes = [str(elbow), *getattr(operator, "notes", lambda: [])()]
    rank = _largest_rank(config, operator, space)
    if rank < config.num_eigenpairs:
        notes.append(f"the operator's rank is at most {rank}: no more than {rank} of "
                     f"--num-eigenpairs {config.num_eigenpairs} were looked for")
    parallel.on_rank_zero(lambda: _write(folder, config, spectrum, elbow, density, sketches,
                                         len(numbers), space.dimension, notes))
    if config.curvature != "sketched-fisher":
        log.remove()
    parallel.say(f"curvature: {'; '.join(notes)}; {spectrum.num_matvecs} products, "
                 f"{spectrum.status}")
    return Directions(spectrum.eigenvalues, sketches, elbow.num_stiff)


def _compute(config: CurvatureConfig, operator, space, seed: int, log: LanczosLog | None,
             ) -> tuple[Spectrum, SpectralDensity | None]:
    """Leading eigenpairs, and the density if it is asked for.

    space: what has ``dimension``, ``dot`` and ``random_signs``, and ``block_dot`` if it can.
    """
    count = min(config.num_eigenpairs, _largest_rank(config, operator, space))
    block_dot = getattr(space, "block_dot", None)
    with tqdm(desc=f"lanczos ({config.curvature})", unit="product",
              disable=None if parallel.is_rank_zero() else True) as progress:
        matvec = _counted(operator.matvec, progress)
        try:
            spectrum = lanczos(
                matvec, space.random_signs(seed), count, dot=space.dot, block_dot=block_dot,
                random_vector=space.random_signs, dimension=space.dimension,
                tol=config.lanczos_tol, max_matvecs=config.max_matvecs,
                state=None if log is None else log.load(),
                on_step=None if log is None else log.write)
        except AsymmetricOperator as error:
            raise UserError(f"--curvature {config.curvature}: {error}"
                            f"{_likely_cause(operator, space)}") from error
        if config.density_samples == 0:
            return spectrum, None
        return spectrum, spectral_density(
            matvec, space.random_signs, config.density_samples, config.density_steps,
            dot=space.dot, block_dot=block_dot, eigenvalues=spectrum.eigenvalues,
            eigenvectors=spectrum.eigenvectors)


def _largest_rank(config: CurvatureConfig, operator, space) -> int:
    if "fisher" in config.curvature:
        return min(space.dimension, operator.num_samples)
    return space.dimension


def _counted(matvec: Callable, progress: tqdm) -> Callable:
    def counted(vector):
        progress.update()
        return matvec(vector)

    return counted


def _likely_cause(operator, space) -> str:
    """The kind of layer at which the asymmetry is largest, where the space has layers."""
    if not isinstance(space, ParameterSpace):
        return ""
    try:
        check_symmetry(operator.matvec, space)
    except UserError as error:
        return f" ({error})"
    return ""


def _total_energy(config: CurvatureConfig, density: SpectralDensity | None,
                  valid_rows: np.ndarray, sample_loss: str) -> float | None:
    """The sum of all positive eigenvalues, where it is known.

    That of the empirical Fisher is its trace, (1/M) sum_i ||g_i||^2, known from the sketches if
    they are of the same losses (the Fisher is of mean ones, the sketched one of the sketches').
    """
    if density is not None:
        return density.positive_trace.value
    if config.curvature == "sketched-fisher" or (
            config.curvature == "fisher" and sample_loss == "mean"):
        return float(np.mean(np.sum(valid_rows.astype(np.float64) ** 2, axis=1)))
    return None


def _write(folder: Path, config: CurvatureConfig, spectrum: Spectrum, elbow: Elbow,
           density: SpectralDensity | None, sketches: np.ndarray, num_samples: int,
           dimension: int, notes: list[str]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, eigenvalues=spectrum.eigenvalues, sketches=sketches,
             num_stiff=elbow.num_stiff)
    with files.written_whole(folder / "directions.npz") as file:
        file.write(buffer.getvalue())
    files.write_json(folder / "spectrum.json", {
        "operator": config.curvature,
        "num_valid_samples": num_samples,
        "dimension": dimension,
        "eigenvalues": spectrum.eigenvalues.tolist(),
        "residuals": spectrum.residuals.tolist(),
        "converged": spectrum.converged,
        "status": spectrum.status,
        "num_matvecs": spectrum.num_matvecs,
        "smallest_ritz": spectrum.smallest_ritz,
        "elbow": vars(elbow),
        "notes": notes,
        "density": None if density is None else {
            "nodes": density.nodes.tolist(), "weights": density.weights.tolist(),
            "trace": vars(density.trace), "positive_trace": vars(density.positive_trace)},
    })


def _read(folder: Path) -> Directions:
    with np.load(folder / "directions.npz") as data:
        return Directions(data["eigenvalues"], data["sketches"], int(data["num_stiff"]))
