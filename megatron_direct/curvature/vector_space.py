"""What an eigensolver does to vectors: inner products, linear combinations, rotations.

A *vector* is anything with +, - and float *: a NumPy array, a torch tensor, or one rank's shard of
a vector that is spread over many. Inner products sum over the shards. A space that knows more of
its vectors than that overrides the operations that it can do faster.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Vector = Any
Dot = Callable[[Vector, Vector], float]
BlockDot = Callable[[Sequence[Vector], Vector], np.ndarray]
Combine = Callable[[np.ndarray, Sequence[Vector]], Vector]


class VectorSpace(abc.ABC):
    """Base of spaces: a space gives `dot`, and everything else follows from it."""

    @abc.abstractmethod
    def dot(self, u: Vector, v: Vector) -> float:
        """Inner product over all shards, in float64 if it can be."""

    def inner_products(self, vectors: Sequence[Vector], others: Sequence[Vector]) -> np.ndarray:
        """[len(vectors), len(others)] float64."""
        return np.array([[float(self.dot(v, w)) for w in others] for v in vectors],
                        dtype=np.float64).reshape(len(vectors), len(others))

    def combine(self, coefficients: np.ndarray, vectors: Sequence[Vector]) -> Vector:
        """Their linear combination, as a new vector."""
        # Python floats: a NumPy float64 scalar would turn float32 arrays into float64.
        total = float(coefficients[0]) * vectors[0]
        for coefficient, vector in zip(coefficients[1:].tolist(), vectors[1:], strict=True):
            total = total + coefficient * vector
        return total

    def remove(self, coefficients: np.ndarray, vectors: Sequence[Vector],
               others: list[Vector]) -> None:
        """Subtract from others[j] the combination sum_i coefficients[i, j] vectors[i].

        Replaces the entries of the list `others`, the last first, and changes no vector: others may
        also stand among the vectors.
        """
        if not vectors:
            return
        for j in reversed(range(len(others))):
            others[j] = others[j] - self.combine(coefficients[:, j], vectors)

    def rotate(self, vectors: list[Vector], rotation: np.ndarray) -> None:
        """Replace the a vectors of the list by p orthonormal combinations of them, V rotation.

        By Householder reflections: they need two more vectors, where the plain product would need
        p. The vectors given are used up; those in the list afterwards are other objects.

        Args:
            rotation: [a, p], orthonormal columns.
        """
        reflectors, scales = np.linalg.qr(rotation, mode="raw")
        for j, scale in enumerate(scales.tolist()):
            u = reflectors[j, j:].copy()
            u[0] = 1.0
            self._reflect(vectors, j, u, scale)
        del vectors[rotation.shape[1]:]
        for j, sign in enumerate(np.sign(np.diag(reflectors)).tolist()):
            if sign < 0:
                vectors[j] = sign * vectors[j]

    def _reflect(self, vectors: list[Vector], first: int, u: np.ndarray, scale: float) -> None:
        """V (I - scale u u^T) for V = vectors[first:], in the list."""
        along = self.combine(scale * u, vectors[first:])
        for i, coefficient in enumerate(u.tolist(), start=first):
            vectors[i] = vectors[i] - coefficient * along

    def reorthonormalise(self, vectors: list[Vector]) -> None:
        """Make vectors that are orthonormal to a few digits so to all of them, in the list.

        By the inverse of the Cholesky factor of their inner products; the error is squared.
        """
        for j, coefficients in reversed(list(enumerate(self._inverse_factor(vectors).T))):
            vectors[j] = self.combine(coefficients[: j + 1], vectors[: j + 1])

    def _inverse_factor(self, vectors: Sequence[Vector]) -> np.ndarray:
        """[p, p] upper triangular X with (V X)^T (V X) = I."""
        return np.linalg.inv(np.linalg.cholesky(self.inner_products(vectors, vectors))).T

    def norm(self, w: Vector) -> float:
        return float(np.sqrt(float(self.dot(w, w))))

    def orthogonalise(self, w: Vector, basis: Sequence[Vector]) -> tuple[Vector, float, float]:
        """What is left of w without its part in the span of an orthonormal basis.

        By classical Gram-Schmidt, twice. Also its norm, after and before.
        """
        before = after = self.norm(w)
        for _ in range(2 if basis else 0):
            left = [w]
            self.remove(self.inner_products(basis, left), basis, left)
            w = left[0]
            after = self.norm(w)
        return w, after, before

    def unit_roundoff(self, w: Vector) -> float:
        """Relative rounding of the vectors' arithmetic, measured so that the ranks agree on it."""
        rounding = self.norm(7.0 * ((1.0 / 7.0) * w) - w) / self.norm(w)
        return max(rounding, 2.0**-53)  # that of float64, if by chance nothing was rounded


class FunctionSpace(VectorSpace):
    """A space made of functions.

    Args:
        dot: (v, w) -> inner product over all shards, in float64 if it can be.
        block_dot: (vectors, w) -> [len(vectors)] inner products in one all-reduce; by default one
            `dot` each.
        combine: (coefficients, vectors) -> their linear combination, as a new vector; by default
            a sum in a loop.
    """

    def __init__(
        self, dot: Dot, block_dot: BlockDot | None = None, combine: Combine | None = None
    ) -> None:
        self._dot = dot
        self._block_dot = block_dot
        self._combine = combine

    def dot(self, u: Vector, v: Vector) -> float:
        return float(self._dot(u, v))

    def inner_products(self, vectors: Sequence[Vector], others: Sequence[Vector]) -> np.ndarray:
        if self._block_dot is None:
            return super().inner_products(vectors, others)
        columns = [self._block_dot(vectors, w) for w in others]
        return np.stack(columns, axis=1).astype(np.float64)

    def combine(self, coefficients: np.ndarray, vectors: Sequence[Vector]) -> Vector:
        if self._combine is None:
            return super().combine(coefficients, vectors)
        return self._combine(coefficients, vectors)
