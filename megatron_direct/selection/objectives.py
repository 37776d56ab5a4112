"""Objectives: quadratics of the selected sum s = F w, J(s) = b.s + s.Q s / 2, to be maximised.

**flat-energy** (the paper's). |F w|^2: b = 0, Q = 2 I. A step along the selected mean gradient is
to move as far as it can in flat directions, in which the loss barely rises. Convex, so its maximum
is at a vertex, and no local method certifies it.

**alignment**. A step -eta u with u = F w / K changes the validation loss by -eta <g_val, u> to
first order; with the scale dropped, maximise <g_val, F w>: b = g_val, Q = 0. ``target`` is the
flat part of the mean validation gradient. Linear.

**descent**. To second order the change is -eta <g_val, u> + eta^2 u.H u / 2, and the *decrease* is
maximised: b = eta g_val / K, Q = -eta^2 H / K^2. Negative eigenvalues of H count as zero: a
quadratic model that falls without end in some direction is not to be trusted there. Concave, so a
duality gap certifies it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_direct.selection.rows import Rows

OBJECTIVES = ("flat-energy", "alignment", "descent")


@dataclass(frozen=True)
class Quadratic:
    """J(s) = linear.s + s.Q s / 2 for sums s [..., k]; Q from ``curvature``: a number (times the
    identity), [k] (a diagonal) or [k, k]. ``convex``: Q >= 0 and not 0; else Q <= 0.
    """

    linear: np.ndarray
    curvature: float | np.ndarray
    convex: bool

    def curve(self, sums: np.ndarray) -> np.ndarray:
        """[..., k] Q s."""
        if np.ndim(self.curvature) == 2:
            return sums @ self.curvature
        return sums * self.curvature

    def self_terms(self, rows: Rows) -> np.ndarray:
        """[N] f_i.Q f_i / 2; for a matrix Q of its diagonal alone, k times cheaper."""
        if np.ndim(self.curvature) == 0:
            return 0.5 * self.curvature * rows.squares()
        diagonal = self.curvature if self.curvature.ndim == 1 else np.diag(self.curvature)
        return 0.5 * rows.squares(diagonal)

    def value(self, sums: np.ndarray) -> np.ndarray:
        """[...] J."""
        return sums @ self.linear + 0.5 * np.einsum("...k,...k->...", sums, self.curve(sums))

    def gradient(self, sums: np.ndarray) -> np.ndarray:
        """[..., k] b + Q s."""
        return self.linear + self.curve(sums)


def make_objective(
    name: str,
    dim: int,
    num_select: int,
    target: np.ndarray | None,
    curvature: np.ndarray | None,
    step_size: float | None,
) -> Quadratic:
    """The objective ``name`` in k = ``dim`` coordinates; a ValueError for what is missing."""
    needs = {"flat-energy": (), "alignment": ("target",),
             "descent": ("target", "curvature", "step_size")}
    if name not in needs:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, found {name!r}")
    given = {"target": target, "curvature": curvature, "step_size": step_size}
    for key, value in given.items():
        if (value is not None) != (key in needs[name]):
            verb = "needs" if value is None else "does not use"
            raise ValueError(f"objective {name!r} {verb} {key}")
    if name == "flat-energy":
        return Quadratic(np.zeros(dim), 2.0, convex=True)
    target = _finite("target", target, (dim,))
    if name == "alignment":
        return Quadratic(target, 0.0, convex=False)
    if not (np.isfinite(step_size) and step_size > 0):
        raise ValueError(f"step_size must be finite and above 0, found {step_size!r}")
    step = step_size / num_select
    shape = (dim,) if np.ndim(curvature) == 1 else (dim, dim)
    hessian = _positive_part(_finite("curvature", curvature, shape))
    return Quadratic(step * target, -(step**2) * hessian, convex=False)


def _finite(name: str, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.shape != shape or not np.isfinite(array).all():
        what = "non-finite values" if array.shape == shape else f"shape {array.shape}"
        raise ValueError(f"{name} must be finite and of shape {shape}, found {what}")
    return array


def _positive_part(hessian: np.ndarray) -> np.ndarray:
    """Eigenvalues [k] or symmetric matrix [k, k] with the negative eigenvalues set to zero."""
    if hessian.ndim == 1:
        return np.maximum(hessian, 0.0)
    scale = np.abs(hessian).max()
    # 1e-4: sketches in float32, reduced in differing orders, are symmetric to about this.
    if np.abs(hessian - hessian.T).max() > 1e-4 * scale:
        raise ValueError("a curvature matrix must be symmetric; pass (H + H.T) / 2 if it should be")
    values, vectors = np.linalg.eigh(0.5 * (hessian + hessian.T))
    return (vectors * np.maximum(values, 0.0)) @ vectors.T
