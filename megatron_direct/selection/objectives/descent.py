"""descent: eta <g_val, u> - eta^2 u.H u / 2 with u = F w / K, the decrease of the validation loss
that its quadratic model predicts for a step -eta u. So b = eta g_val / K, scale = -(eta / K)^2.
With --contrast g_val is a mean with weights (valid_weights.py) and gives way to its excess over the
pool's mean gradient m, which stands for the gradient behind an annealing over the pool
(evidence.py); what bends the loss from there on is u - m, and
J = eta <g_val - m, u> - eta^2 (u - m).H (u - m) / 2, but for a constant.

Negative eigenvalues of H count as zero: a quadratic model that falls without end in some direction
is not to be trusted there. Concave, so that a duality gap certifies the relaxation. The curvature
term makes stiff directions expensive, so a stiff budget is optional.
"""

from __future__ import annotations

import numpy as np

from megatron_direct.errors import UserError
from megatron_direct.selection.checks import checked_finite, checked_step_size, checked_vector
from megatron_direct.selection.evidence import (
    Evidence,
    excess_gradient,
    mean_gradient,
    mean_row,
    typical_length,
)
from megatron_direct.selection.objectives.objective import Objective, Terms, TermSettings
from megatron_direct.selection.objectives.quadratic import Diagonal, LowRank, Quadratic


def _quadratic(terms: Terms, dim: int, num_select: int) -> Quadratic:
    step = checked_step_size(terms.step_size) / num_select
    target = checked_vector("target", terms.target, dim)
    return Quadratic(step * target, -(step**2), _checked_curvature(terms.curvature, dim))


def _terms(settings: TermSettings, evidence: Evidence, valid_weights: np.ndarray) -> Terms:
    """H, as given by its computed eigenpairs; elsewhere it counts as zero."""
    directions = evidence.directions
    largest = float(directions.eigenvalues[0])
    if not largest > 0:
        raise UserError(
            "--objective descent measures --step-size in units of 1 / lambda_max, but the largest "
            f"computed eigenvalue of the curvature is {largest:g}. Choose another "
            "--curvature, or --objective flat-energy.")
    step = settings.step_size / largest
    target = _in_contrast(step, settings.normalize_gradients, evidence, valid_weights) \
        if settings.contrast else mean_gradient(evidence.valid_rows, valid_weights, unit=False)
    return Terms(target=target, curvature=LowRank(directions.eigenvalues, directions.sketches),
                 step_size=step)


def _in_contrast(step: float, normalize: bool, evidence: Evidence, valid_weights: np.ndarray,
                 ) -> np.ndarray:
    """The excess, and the linear part of (u - m).H (u - m), as in the module's docstring."""
    directions = evidence.directions
    mean = mean_row(evidence, unit=normalize)
    if normalize:  # as treated rows are: of the typical length of the pool's
        mean = mean * typical_length(evidence)
    values = np.maximum(directions.eigenvalues, 0.0)
    curved = (values * (directions.sketches @ mean)) @ directions.sketches
    return excess_gradient(evidence, valid_weights, unit=normalize) + step * curved


def _checked_curvature(
    curvature: np.ndarray | LowRank | None, dim: int
) -> Diagonal | LowRank:
    """In the form that products take least time with."""
    if isinstance(curvature, LowRank):
        values = np.asarray(curvature.eigenvalues, dtype=np.float64)
        directions = np.asarray(curvature.directions, dtype=np.float64)
        if values.ndim != 1 or directions.shape != (len(values), dim):
            raise ValueError(
                f"a curvature of low rank must have eigenvalues [p] and directions [p, {dim}], "
                f"found shapes {values.shape} and {directions.shape}; give each direction as a row"
            )
        checked_finite("eigenvalues", values)
        checked_finite("directions", directions)
        return LowRank(values, directions)
    array = np.asarray(curvature, dtype=np.float64)
    if array.shape not in ((dim,), (dim, dim)):
        raise ValueError(
            f"curvature must be of shape ({dim},), eigenvalues, or ({dim}, {dim}), a matrix, found "
            f"shape {array.shape}; it must be in the coordinates of flat"
        )
    checked_finite("curvature", array)
    return Diagonal(np.maximum(array, 0.0)) if array.ndim == 1 else _positive_part(array)


def _positive_part(hessian: np.ndarray) -> LowRank:
    """A symmetric matrix [k, k] without its negative eigenvalues."""
    scale = np.abs(hessian).max()
    # 1e-4: sketches in float32, reduced in differing orders, are symmetric to about this.
    if np.abs(hessian - hessian.T).max() > 1e-4 * scale:
        raise ValueError("a curvature matrix must be symmetric; pass (H + H.T) / 2 if it should be")
    values, vectors = np.linalg.eigh(0.5 * (hessian + hessian.T))
    # Eigenvalues of this size are rounding of zeros (the rule of numpy.linalg.matrix_rank).
    positive = values > len(values) * np.finfo(np.float64).eps * values.max()
    return LowRank(values[positive], vectors.T[positive])


DESCENT = Objective(
    name="descent", needs=("target", "curvature", "step_size"), needs_budget=False,
    treats_sketches=True, quadratic=_quadratic, terms=_terms,
)
