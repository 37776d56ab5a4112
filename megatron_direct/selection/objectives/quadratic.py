"""Quadratics of the selected sum, J(s) = b.s + scale s.H s / 2, to be maximised.

H is positive semi-definite, and the sign of ``scale`` says which way J bends: up (convex, its
maximum is at a vertex), down (concave, a duality gap certifies its maximum), or, with 0, not at
all. H comes in the forms below; shapes: k coordinates, p directions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_direct.selection.rows import Rows


@dataclass(frozen=True, eq=False)
class Diagonal:
    """H = diag(values), values [k] >= 0."""

    values: np.ndarray

    def times(self, sums: np.ndarray) -> np.ndarray:
        """[..., k] H s."""
        return sums * self.values

    def diagonal(self) -> np.ndarray:
        """[k]."""
        return self.values


@dataclass(frozen=True, eq=False)
class LowRank:
    """H = sum_j max(lambda_j, 0) d_j d_j^T of eigenvalues [p] and directions [p, k].

    The directions, which need not be orthonormal (sketches of eigenvectors are not quite), are the
    rows. Positive semi-definite as it is written, so that no [k, k] matrix is ever formed.
    """

    eigenvalues: np.ndarray
    directions: np.ndarray

    def times(self, sums: np.ndarray) -> np.ndarray:
        """[..., k] H s, in O(k p)."""
        return ((sums @ self.directions.T) * self._weights()) @ self.directions

    def diagonal(self) -> np.ndarray:
        """[k]."""
        return self._weights() @ self.directions**2

    def _weights(self) -> np.ndarray:
        return np.maximum(self.eigenvalues, 0.0)


@dataclass(frozen=True, eq=False)
class Quadratic:
    """J for sums s [..., k]; ``curvature`` None is the identity."""

    linear: np.ndarray
    scale: float
    curvature: Diagonal | LowRank | None = None

    @property
    def convex(self) -> bool:
        """Whether J bends up; a linear J is treated as a concave one."""
        return self.scale > 0

    def curve(self, sums: np.ndarray) -> np.ndarray:
        """[..., k] scale H s."""
        return self.scale * (sums if self.curvature is None else self.curvature.times(sums))

    def self_terms(self, rows: Rows) -> np.ndarray:
        """[N] scale f_i.H f_i / 2, of H's diagonal alone, which is one pass over the rows.

        A ValueError names the first row that is not finite.
        """
        weights = None if self.curvature is None else self.curvature.diagonal()
        return 0.5 * self.scale * rows.squares(weights)

    def value(self, sums: np.ndarray) -> np.ndarray:
        """[...] J."""
        return sums @ self.linear + 0.5 * np.einsum("...k,...k->...", sums, self.curve(sums))

    def gradient(self, sums: np.ndarray) -> np.ndarray:
        """[..., k] b + scale H s."""
        return self.linear + self.curve(sums)
