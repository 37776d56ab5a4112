"""The curvature stage of ``select``: leading directions, and what they are once sketched."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from megatron_direct import files, parallel
from megatron_direct.config import flag
from megatron_direct.curvature.fisher import FisherOperator
from megatron_direct.curvature.lanczos import AsymmetricOperator, Spectrum, lanczos
from megatron_direct.curvature.spectrum import PAPER_ENERGY_SHARE, Elbow, find_elbow
from megatron_direct.curvature.vectors import ParameterSpace
from megatron_direct.data.samples import Samples
from megatron_direct.errors import UserError
from megatron_direct.gradients.sketch import Sketch
from megatron_direct.model import ParameterShard


@dataclass(frozen=True)
class CurvatureConfig:
    """Curvature."""

    curvature: str = flag("fisher", "operator whose leading directions are the stiff ones",
                          choices=("fisher",))
    num_eigenpairs: int = flag(
        32, "leading eigenpairs that are computed; stiff are those up to the elbow")
    energy_share: float = flag(
        PAPER_ENERGY_SHARE, "share of the energy that the stiff directions hold")
    lanczos_tol: float = flag(
        1e-3, "residual of an eigenpair, over the largest eigenvalue, at which Lanczos stops")
    max_matvecs: int = flag(200, "most operator products that Lanczos may take")


@dataclass(frozen=True)
class Directions:
    """The eigenpairs that were computed, in sketch coordinates; the first num_stiff are stiff.

    eigenvalues: [p], descending; sketches: [p, k], row j is S v_j.
    """

    eigenvalues: np.ndarray
    sketches: np.ndarray
    num_stiff: int


def leading_directions(config: CurvatureConfig, chunks: Sequence[torch.nn.Module],
                       shards: Sequence[ParameterShard], sketch: Sketch, samples: Samples,
                       numbers: np.ndarray, micro_batch_size: int, *, seed: int, trace: float,
                       folder: Path) -> Directions:
    """Computes them, or reads them if ``folder`` holds them already; all ranks call this.

    trace: of the operator, the whole of its energy (it is positive semi-definite).
    """
    if not parallel.on_rank_zero(lambda: (folder / "spectrum.json").is_file()):
        space = ParameterSpace(shards)
        operator = FisherOperator(chunks, space, samples, numbers, micro_batch_size)
        spectrum = _leading_eigenpairs(config, operator, space, seed)
        elbow = find_elbow(spectrum.eigenvalues, config.energy_share, total_energy=trace)
        sketched = parallel.sum_over_model(torch.stack(
            [sketch.of_vector(space.split(v), shards) for v in spectrum.eigenvectors]))
        parallel.on_rank_zero(lambda: _write(folder, config, spectrum, elbow,
                                             sketched.cpu().numpy(), len(numbers), space.dimension))
        parallel.say(f"curvature: {elbow}; {spectrum.num_matvecs} products, {spectrum.status}")
    return parallel.on_rank_zero(lambda: _read(folder))


def _leading_eigenpairs(config: CurvatureConfig, operator: FisherOperator, space: ParameterSpace,
                        seed: int) -> Spectrum:
    progress = tqdm(desc=f"lanczos ({config.curvature})", unit="product",
                    disable=None if parallel.is_rank_zero() else True)

    def matvec(vector):
        progress.update()
        return operator.matvec(vector)

    try:
        return lanczos(
            matvec, space.random_signs(seed),
            # The rank of the empirical Fisher is at most the number of its samples.
            min(config.num_eigenpairs, operator.num_samples, space.dimension),
            dot=space.dot, block_dot=space.block_dot, random_vector=space.random_signs,
            dimension=space.dimension, tol=config.lanczos_tol, max_matvecs=config.max_matvecs)
    except AsymmetricOperator as error:
        raise UserError(f"--curvature {config.curvature}: {error}") from error
    finally:
        progress.close()


def _write(folder: Path, config: CurvatureConfig, spectrum: Spectrum, elbow: Elbow,
           sketched: np.ndarray, num_samples: int, dimension: int) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, eigenvalues=spectrum.eigenvalues, sketches=sketched,
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
        "elbow": {**vars(elbow), "statement": str(elbow)},
    })


def _read(folder: Path) -> Directions:
    with np.load(folder / "directions.npz") as data:
        return Directions(data["eigenvalues"], data["sketches"], int(data["num_stiff"]))
