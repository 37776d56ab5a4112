"""Krylov decompositions of a symmetric operator, over vectors that may be spread over ranks.

The problem: H (n x n, symmetric) is known by its products v -> H v. A *vector* is anything with +,
- and float *: a NumPy array, a torch tensor, or one rank's shard of a vector that is spread over
many. Every number that a decision rests on comes from inner products, which sum over the shards:
the ranks therefore stay in step without further messages.

Notation. The basis is V = [locked | active | next], orthonormal:

    locked   l eigenvectors that are set aside (deflated)
    active   a vectors with H V_a = V_a T + v_next b^T + E,  T [a, a] symmetric, b [a]
    next     the unit vector that H is applied to in the next step
    E        rounding, and what else is wrong with a product

This is the Krylov-Schur form, of which the tridiagonal T of Lanczos is a case: Stewart, "A
Krylov-Schur algorithm for large eigenproblems", SIAM J. Matrix Anal. Appl. 23 (2002). Every new
vector is orthogonalised against the whole basis by classical Gram-Schmidt, twice (Giraud, Langou
and Rozloznik, "The loss of orthogonality in the Gram-Schmidt orthogonalization process", Comput.
Math. Appl. 50 (2005)): two blocks of inner products, so two all-reduces, a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Vector = Any
Matvec = Callable[[Vector], Vector]
Dot = Callable[[Vector, Vector], float]
BlockDot = Callable[[Sequence[Vector], Vector], np.ndarray]
Combine = Callable[[np.ndarray, Sequence[Vector]], Vector]
RandomVector = Callable[[int], Vector]

# What is left of a vector below this many units of rounding is taken for rounding: single-precision
# products of a transformer's Hessian err by 20 to 80 units (1e-6 to 5e-6).
BREAKDOWN_ROUNDOFFS = 100.0


class VectorSpace:
    """Inner products and linear combinations.

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
        self.dot = dot
        self._block_dot = block_dot
        self._combine = combine

    def block_dot(self, vectors: Sequence[Vector], w: Vector) -> np.ndarray:
        if self._block_dot is None:
            return np.array([float(self.dot(v, w)) for v in vectors])
        return np.asarray(self._block_dot(vectors, w), dtype=np.float64)

    def combine(self, coefficients: np.ndarray, vectors: Sequence[Vector]) -> Vector:
        if self._combine is not None:
            return self._combine(coefficients, vectors)
        # Python floats: a NumPy float64 scalar would turn float32 arrays into float64.
        total = float(coefficients[0]) * vectors[0]
        for coefficient, vector in zip(coefficients[1:].tolist(), vectors[1:], strict=True):
            total = total + coefficient * vector
        return total

    def norm(self, w: Vector) -> float:
        return float(np.sqrt(float(self.dot(w, w))))

    def orthogonalise(
        self, w: Vector, basis: Sequence[Vector]
    ) -> tuple[Vector, np.ndarray, float, float]:
        """Remove from w its part in the span of an orthonormal basis.

        Returns:
            What is left of w; the coefficients [len(basis)] of the part removed; the norm of w
            after and before. Coefficients and norms are not finite where w is not.
        """
        if not basis:
            norm = self.norm(w)
            return w, np.zeros(0), norm, norm
        first = self.block_dot([*basis, w], w)
        w = w - self.combine(first[:-1], basis)
        second = self.block_dot([*basis, w], w)
        w = w - self.combine(second[:-1], basis)
        # Pythagoras saves an all-reduce, except where it would cancel.
        square = second[-1] - np.sum(second[:-1] ** 2)
        norm = float(np.sqrt(square)) if square > 0.5 * second[-1] else self.norm(w)
        return w, first[:-1] + second[:-1], norm, float(np.sqrt(first[-1]))

    def reorthonormalise(self, vectors: list[Vector]) -> None:
        """Make vectors that are orthonormal to a few digits so to all of them, in place.

        One Gram-Schmidt pass, one all-reduce a vector: the error is squared.
        """
        for i, vector in enumerate(vectors):
            *coefficients, square = self.block_dot(vectors[: i + 1], vector)
            coefficients = np.array(coefficients)
            if i > 0:
                vector = vector - self.combine(coefficients, vectors[:i])
            vectors[i] = float(1.0 / np.sqrt(square - np.sum(coefficients**2))) * vector

    def unit_roundoff(self, w: Vector) -> float:
        """Relative rounding of the vectors' arithmetic, measured so that the ranks agree on it."""
        rounding = self.norm(7.0 * ((1.0 / 7.0) * w) - w) / self.norm(w)
        return max(rounding, 2.0**-53)  # that of float64, if by chance nothing was rounded


@dataclass
class KrylovState:
    """A Krylov decomposition in the module's notation, and what was counted on the way.

    All that a run needs to carry on from its last finished step. The vectors in `basis` are the
    caller's to serialise; everything else is small.
    """

    basis: list[Vector]  # locked, active, next; no next once the active ones are invariant
    locked: np.ndarray  # [l] eigenvalues of the locked vectors, descending
    projected: np.ndarray  # [a, a] T
    coupling: np.ndarray  # [a] b
    unit_roundoff: float
    num_matvecs: int = 0
    num_invariant: int = 0  # invariant subspaces met
    norm: float = 0.0  # largest |Ritz value| met: the estimate of |lambda_max|
    smallest_ritz: float = np.inf
    asymmetry: float = 0.0  # largest |<v_i, H v_j> - <H v_i, v_j>| met

    @property
    def has_next(self) -> bool:
        return len(self.basis) > len(self.locked) + len(self.projected)


def begin(
    start: Vector,
    space: VectorSpace,
    locked: np.ndarray | None = None,
    locked_vectors: Sequence[Vector] = (),
) -> tuple[KrylovState, float]:
    """State before the first step from `start` less its part in the locked vectors.

    Returns:
        The state, and the norm of what was left of the start vector.
    """
    norm = space.norm(start)
    if not (np.isfinite(norm) and norm > 0):
        raise ValueError(f"a start vector must be finite and not zero; its norm is {norm}")
    locked = np.zeros(0) if locked is None else np.asarray(locked, dtype=np.float64)
    state = KrylovState(
        basis=[*locked_vectors],
        locked=locked,
        projected=np.zeros((0, 0)),
        coupling=np.zeros(0),
        unit_roundoff=space.unit_roundoff(start),
        norm=float(np.abs(locked).max(initial=0.0)),
    )
    return state, append_next(state, start, space)


def append_next(state: KrylovState, w: Vector, space: VectorSpace) -> float:
    """Make w, orthogonalised, the next vector of a state that has none.

    Returns:
        The norm of what was left of w; 0, and no next vector, if that is but rounding.
    """
    w, _, norm, norm_w = space.orthogonalise(w, state.basis)
    if norm <= BREAKDOWN_ROUNDOFFS * state.unit_roundoff * norm_w:
        return 0.0
    state.basis.append((1.0 / norm) * w)
    return norm


def extend(
    state: KrylovState, matvec: Matvec, space: VectorSpace, negligible: float = 0.0
) -> None:
    """One Lanczos step: apply H to the next vector, which becomes active, and find a new next.

    There is no new next vector if the active ones turn out to span an invariant subspace: if what
    is left of the product is rounding, or at most `negligible` * |lambda_max|.
    """
    a = len(state.projected)
    w, column, beta, norm_w = space.orthogonalise(matvec(state.basis[-1]), state.basis)
    state.num_matvecs += 1
    require_finite([*column, beta], state.num_matvecs)
    # By symmetry <v_i, H v_next> is b_i for active v_i, and 0 for locked ones.
    expected = np.concatenate([np.zeros(len(state.locked)), state.coupling])
    state.asymmetry = max(state.asymmetry, float(np.abs(column[:-1] - expected).max(initial=0.0)))

    projected = np.empty((a + 1, a + 1))
    projected[:a, :a] = state.projected
    projected[:a, a] = projected[a, :a] = state.coupling
    projected[a, a] = column[-1]
    ritz = np.linalg.eigvalsh(projected)
    state.projected = projected
    state.norm = max(state.norm, float(np.abs(ritz).max()))
    state.smallest_ritz = min(state.smallest_ritz, float(ritz[0]))

    state.coupling = np.zeros(a + 1)
    negligible = max(negligible, BREAKDOWN_ROUNDOFFS * state.unit_roundoff)
    if beta > negligible * max(state.norm, norm_w):
        state.coupling[a] = beta
        state.basis.append((1.0 / beta) * w)


def require_finite(numbers: Sequence[float], num_matvecs: int) -> None:
    """Refuse a product by the inner products that were taken of it."""
    if not np.isfinite(numbers).all():
        raise ValueError(
            f"product {num_matvecs} of the operator is not finite: look for a loss or a gradient "
            "that is not finite at these parameters"
        )


def ritz_pairs(projected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues [a], descending, and eigenvectors [a, a] of T."""
    values, vectors = np.linalg.eigh(projected)
    return values[::-1], vectors[:, ::-1]


def rotate(basis: list[Vector], first: int, rotation: np.ndarray, space: VectorSpace) -> np.ndarray:
    """Turn the leading p of the a vectors from basis[first] on into their products with rotation.

    By Householder reflections, in place: they need one more vector, where the plain product would
    need p. The other a - p vectors become their orthogonal complement.

    Args:
        rotation: [a, p], orthonormal columns.

    Returns:
        [p] signs: the new basis[first + j] is signs[j] * (V_a rotation)[:, j].
    """
    reflectors, scales = np.linalg.qr(rotation, mode="raw")
    for j, scale in enumerate(scales.tolist()):
        u = reflectors[j, j:].copy()
        u[0] = 1.0
        _reflect(basis, first + j, u, scale, space)
    return np.sign(np.diag(reflectors))


def _reflect(
    basis: list[Vector], first: int, u: np.ndarray, scale: float, space: VectorSpace
) -> None:
    """V (I - scale u u^T) for V = basis[first : first + len(u)], in place."""
    along = space.combine(scale * u, basis[first : first + len(u)])
    for i, coefficient in enumerate(u.tolist(), start=first):
        basis[i] = basis[i] - coefficient * along
