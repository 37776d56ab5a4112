"""Krylov decompositions of a symmetric operator, over vectors that may be spread over ranks.

The problem: H (n x n, symmetric) is known by its products v -> H v. Every number that a decision
rests on comes from inner products, which sum over the shards of the vectors: the ranks therefore
stay in step without further messages.

Notation. The basis is [locked | active | next]:

    locked   l eigenvectors that are set aside (deflated)
    active   a vectors with H V_a = V_a T + v_next b^T + E,  T [a, a] symmetric, b [a]
    next     the vector that H is applied to in the next step
    E        rounding, and what else is wrong with a product

This is the Krylov-Schur form, of which the tridiagonal T of Lanczos is a case: Stewart, "A
Krylov-Schur algorithm for large eigenproblems", SIAM J. Matrix Anal. Appl. 23 (2002).

Locked and active vectors are orthonormal. Every new vector is orthogonalised against all of them by
classical Gram-Schmidt, twice (Giraud, Langou and Rozloznik, "The loss of orthogonality in the
Gram-Schmidt orthogonalization process", Comput. Math. Appl. 50 (2005)), and the second time is put
off to the step in which H is applied to it: its inner products are then taken together with those
of the product, in one all-reduce and one pass over the basis per step (Bielich, Langou, Thomas,
Swirydowicz, Yamazaki and Boman, "Low-synch Gram-Schmidt with delayed reorthogonalization for Krylov
solvers", Parallel Computing 112 (2022)). Until then `next` is of norm 1 and orthogonal to the basis
up to amplified rounding only; the Krylov relation holds with it as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_direct.curvature.vector_space import Vector, VectorSpace

Matvec = Callable[[Vector], Vector]
RandomVector = Callable[[int], Vector]

# What is left of a vector below this many units of rounding is taken for rounding: single-precision
# products of a transformer's Hessian err by 20 to 80 units (1e-6 to 5e-6).
BREAKDOWN_ROUNDOFFS = 100.0
# Pythagoras gives the square of the norm of what is left of a product without an all-reduce of its
# own, to the vectors' rounding over its share of the product's square: to 1e-4 in single precision
# at this share, and the next step corrects that. Fishers come to shares of 0.005; below this one
# the norm is taken by itself, as it is where a Krylov space is about to end.
_PYTHAGORAS_SHARE = 1e-3


@dataclass(frozen=True)
class SymmetricOperator:
    """H, and the space that its vectors are of.

    matvec: v -> H v. It must not change v, and must give the same bits for the same v.
    random_vector: seed -> vector, the same in every layout of ranks. dimension: n, where known.
    """

    matvec: Matvec
    space: VectorSpace
    random_vector: RandomVector | None = None
    dimension: int | None = None


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


@dataclass(frozen=True)
class RitzPairs:
    """Eigenvalues [a] of T, descending, and its eigenvectors [a, a], by columns."""

    values: np.ndarray
    vectors: np.ndarray


def ritz_pairs(projected: np.ndarray) -> RitzPairs:
    values, vectors = np.linalg.eigh(projected)
    return RitzPairs(values[::-1], vectors[:, ::-1])


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
    w, norm, norm_w = space.orthogonalise(w, state.basis)
    if norm <= BREAKDOWN_ROUNDOFFS * state.unit_roundoff * norm_w:
        return 0.0
    state.basis.append((1.0 / norm) * w)
    return norm


def extend(state: KrylovState, operator: SymmetricOperator, negligible: float = 0.0) -> None:
    """One Lanczos step: apply H to the next vector, which becomes active, and find a new next.

    There is no new next vector if the active ones turn out to span an invariant subspace: if what
    is left of the product is rounding, or at most `negligible` * |lambda_max|.
    """
    space, num_locked, a = operator.space, len(state.locked), len(state.projected)
    pair = [state.basis[-1], operator.matvec(state.basis[-1])]
    state.num_matvecs += 1
    products = space.inner_products([*state.basis, pair[1]], pair)
    require_finite(products[:, 1], state.num_matvecs)

    # With V the locked and active vectors, u the next one and w = H u:
    # v = (u - V d) / nu is of norm 1, and what is left of w is w - V h - v (v . w).
    d, h = products[:-2].T
    nu = np.sqrt(products[-2, 0] - d @ d)
    v_w = (products[-2, 1] - d @ h) / nu
    square = products[-1, 1] - h @ h - v_w**2
    of_basis = np.stack([np.append(d / nu, 1.0 - 1.0 / nu),
                         np.append(h - d * (v_w / nu), v_w / nu)], axis=1)
    space.remove(of_basis, state.basis, pair)
    state.basis[-1], left = pair
    pair.clear()
    norm_left = np.sqrt(square) if square > _PYTHAGORAS_SHARE * products[-1, 1] \
        else space.norm(left)
    require_finite([norm_left], state.num_matvecs)

    # By symmetry <v_i, H v> is nu b_i for active v_i, and 0 for locked ones.
    coupling = nu * state.coupling
    of_d = np.append(state.locked * d[:num_locked], state.projected @ d[num_locked:])
    expected = np.append(np.zeros(num_locked), coupling)
    asymmetries = np.abs((h - of_d) / nu - expected)
    state.asymmetry = max(state.asymmetry, float(asymmetries.max(initial=0.0)))
    projected = np.empty((a + 1, a + 1))
    projected[:a, :a] = state.projected
    projected[:a, a] = projected[a, :a] = coupling
    projected[a, a] = (v_w - coupling @ d[num_locked:]) / nu
    ritz = np.linalg.eigvalsh(projected)
    state.projected = projected
    state.norm = max(state.norm, float(np.abs(ritz).max()))
    state.smallest_ritz = min(state.smallest_ritz, float(ritz[0]))

    state.coupling = np.zeros(a + 1)
    beta, norm_w = norm_left / nu, float(np.sqrt(products[-1, 1])) / nu
    negligible = max(negligible, BREAKDOWN_ROUNDOFFS * state.unit_roundoff)
    if beta > negligible * max(state.norm, norm_w):
        state.coupling[a] = beta
        state.basis.append(float(1.0 / norm_left) * left)


def require_finite(numbers: Sequence[float] | np.ndarray, num_matvecs: int) -> None:
    """Refuse a product by the inner products that were taken of it."""
    if not np.isfinite(numbers).all():
        raise ValueError(
            f"product {num_matvecs} of the operator is not finite: check for a loss or gradient "
            "that is not finite at these parameters"
        )
