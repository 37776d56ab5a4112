"""Leading eigenpairs of a symmetric operator by thick-restart Lanczos.

The problem: H (n x n, symmetric, known by its products) has eigenvalues lambda_1 >= ...; find
the algebraically largest k of them and orthonormal eigenvectors.

With the Krylov decomposition and the notation of `krylov`, the Ritz pairs are (theta_i, V_a s_i),
where T s_i = theta_i s_i. When the basis is full it is rotated to the leading Ritz vectors, the
others are dropped, and the next vector is kept: Wu and Simon, "Thick-restart Lanczos method for
large symmetric eigenvalue problems", SIAM J. Matrix Anal. Appl. 22 (2000).

The residual of a Ritz pair is (b . s_i) v_next + E s_i. Its first part is known at no cost; E, the
rounding, is not seen in it, and is measured by products on the Ritz vectors before they are
returned.

Every rank of a job takes the same decisions, since all of them follow from inner products that are
summed over the ranks, and from small eigenproblems that every rank solves on the same numbers.

Memory: `max_basis` vectors and three to work with, besides what a product takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_direct.curvature.krylov import (
    BlockDot,
    Combine,
    Dot,
    KrylovState,
    Matvec,
    RandomVector,
    Vector,
    VectorSpace,
    append_next,
    begin,
    extend,
    require_finite,
    ritz_pairs,
    rotate,
)

# An asymmetry is judged from the fifth product on: the Ritz values of the first few can be far
# below the norm of H, which rounding is relative to.
_MATVECS_BEFORE_SYMMETRY_CHECK = 5
# The measured rounding may be a tenth of the tolerance before pairs are measured one by one: a
# random combination shows less than a tenth of it with probability 0.08 at worst, all of it lying
# in one direction. The estimates keep within what that leaves, in quadrature.
_UNSEEN_SHARE = 0.1
_ESTIMATE_SHARE = (1.0 - _UNSEEN_SHARE**2) ** 0.5
# A subspace that is invariant to a hundredth of the tolerance is taken for invariant, and its pairs
# for exact: what that neglects is a tenth of what may go unseen.
_INVARIANT_SHARE = 0.01


class AsymmetricOperator(ValueError):
    """<u, H v> and <H u, v> differ by more than rounding.

    `asymmetry` is their largest difference over unit vectors u, v met, relative to |lambda_max|.
    """

    def __init__(self, asymmetry: float, accepted: float) -> None:
        super().__init__(
            f"the operator is not symmetric: |<u, H v> - <H u, v>| reached {asymmetry:.3g} of "
            f"|lambda_max|, accepted is {accepted:.3g}; a function in the product is "
            "differentiated wrongly, or the products are of low precision"
        )
        self.asymmetry = asymmetry


@dataclass(frozen=True)
class Spectrum:
    """Leading eigenpairs, how good they are and what they cost.

    `status` is one of
        converged           every residual is at most tol * |lambda_max|
        max-matvecs         the products were used up first
        rounding-floor      the estimates met the tolerance, the measured residuals did not: ask for
                            a larger `tol` or give more precise products
        invariant-subspace  the Krylov space of the start vector ended before it held
                            `num_eigenpairs` vectors, and there was no `random_vector` to go on with
    """

    eigenvalues: np.ndarray  # [k'] float64, descending; k' <= num_eigenpairs, less if not converged
    eigenvectors: list[Vector]  # [k'] orthonormal
    residuals: np.ndarray  # [k'] ||H v - lambda v||, measured as `lanczos` says
    num_matvecs: int  # all products, those that measure residuals included
    converged: bool
    status: str
    smallest_ritz: float  # an upper bound of the smallest eigenvalue: the negative edge, if < 0
    num_invariant: int  # invariant subspaces met: > 0 if H has a low rank or few eigenvalues
    asymmetry: float  # largest |<u, H v> - <H u, v>| / |lambda_max| met, over unit vectors


def lanczos(
    matvec: Matvec,
    start: Vector,
    num_eigenpairs: int,
    *,
    dot: Dot,
    tol: float,
    max_matvecs: int,
    block_dot: BlockDot | None = None,
    combine: Combine | None = None,
    random_vector: RandomVector | None = None,
    max_basis: int | None = None,
    dimension: int | None = None,
    symmetry_tol: float = 1e-3,
    on_step: Callable[[KrylovState], None] | None = None,
    state: KrylovState | None = None,
) -> Spectrum:
    """Find the algebraically largest `num_eigenpairs` eigenpairs of a symmetric operator.

    Converged means ||H v - lambda v|| <= tol * |lambda_max| for every pair, |lambda_max| being the
    largest Ritz value in size. Residuals are measured by products on the vectors returned. One
    product, on a random combination of them, measures the norm rho of E S for all pairs together;
    residual i is then sqrt((b . s_i)^2 + rho^2), and on average not below the true one. Where rho
    is not small against the tolerance, one product a pair measures each residual by itself.
    `residual_norms` does that for any pairs.

    A Krylov space holds one eigenvector of an eigenvalue that is repeated exactly. Further ones
    are looked for (with `random_vector`) only where the space of `start` ends, as it does for an
    operator of low rank; pairs beyond the rank are then returned with eigenvalue 0 to rounding.

    Args:
        matvec: v -> H v. It must not change v, and must give the same bits for the same v.
        start: vector to start from, of any norm but 0; the same in every layout of ranks.
        num_eigenpairs: k >= 1.
        dot: inner product over all shards, in float64 if it can be.
        tol: > 0, see above. Single-precision products do not reach much below 1e-6.
        max_matvecs: >= 2, the products allowed, those that measure residuals included.
        block_dot: (vectors, w) -> [len(vectors)] inner products in one all-reduce; called twice a
            step. By default one `dot` each.
        combine: (coefficients, vectors) -> their linear combination, as a new vector; by default
            a sum in a loop.
        random_vector: seed -> vector, to go on with where the Krylov space of `start` ends.
        max_basis: most basis vectors held, >= k + 3. By default max(2 k + 2, 21), as in
            ARPACK; on spectra like those of Hessians an unbounded basis saves at most a sixth
            of the products.
        dimension: n, where it is known, to refuse more eigenpairs than that at once.
        symmetry_tol: the |<u, H v> - <H u, v>| / |lambda_max| accepted. The default lies between
            the rounding of single-precision products (1e-5) and the error of wrong ones (1e-1).
        on_step: called with the state after every step. The state is live: save it in the call.
        state: a state that `on_step` was given, to carry on from to the result, bit for bit, of the
            run without a break. `start` is not read then, and the state is used up.

    Raises:
        AsymmetricOperator: a ValueError, see `symmetry_tol`.
        ValueError: bad arguments, more eigenpairs than dimensions, a product that is not finite.
    """
    k = num_eigenpairs
    if max_basis is None:
        max_basis = max(2 * k + 2, 21)
    _check_arguments(k, tol, max_matvecs, max_basis, dimension)
    space = VectorSpace(dot, block_dot, combine)
    if state is None:
        state, _ = begin(start, space)

    while True:
        ritz, rotation = ritz_pairs(state.projected)
        status = _status(state, ritz, rotation, k, tol, max_matvecs, random_vector is not None)
        if status is not None:
            break
        if not state.has_next:
            _lock(state, ritz, rotation, k, space)
            state.num_invariant += 1
            if append_next(state, random_vector(state.num_invariant), space) == 0.0:
                if len(state.locked) < k:
                    raise _too_many(k, len(state.locked))
                continue
        elif len(state.basis) >= max_basis:
            _restart(state, ritz, rotation, k, max_basis, tol, space)
        extend(state, matvec, space, negligible=_INVARIANT_SHARE * tol)
        is_judged = not state.has_next or state.num_matvecs >= _MATVECS_BEFORE_SYMMETRY_CHECK
        if is_judged and state.asymmetry > symmetry_tol * state.norm:
            raise AsymmetricOperator(state.asymmetry / state.norm, symmetry_tol)
        if on_step is not None:
            on_step(state)

    next_vector = state.basis.pop() if state.has_next else None
    couplings = _lock(state, ritz, rotation, k, space)
    unseen = _unseen_residual(state, couplings, next_vector, matvec, space)
    bound = tol * state.norm
    residuals = np.hypot(couplings, unseen)
    if status == "converged" and unseen > _UNSEEN_SHARE * bound:
        if state.num_matvecs + len(state.locked) <= max_matvecs:
            residuals = residual_norms(matvec, state.locked, state.basis, dot=dot)
            state.num_matvecs += len(state.locked)
            require_finite(residuals, state.num_matvecs)
        if residuals.max() > bound:
            status = "rounding-floor"
    return Spectrum(
        eigenvalues=state.locked,
        eigenvectors=state.basis,
        residuals=residuals,
        num_matvecs=state.num_matvecs,
        converged=status == "converged",
        status=status,
        smallest_ritz=state.smallest_ritz,
        num_invariant=state.num_invariant,
        asymmetry=state.asymmetry / state.norm if state.norm > 0 else 0.0,
    )


def residual_norms(
    matvec: Matvec, eigenvalues: np.ndarray, eigenvectors: Sequence[Vector], *, dot: Dot
) -> np.ndarray:
    """||H v - lambda v|| of each pair, by one product a pair: [k] float64."""
    space = VectorSpace(dot)
    return np.array(
        [
            space.norm(matvec(vector) - float(value) * vector)
            for value, vector in zip(eigenvalues, eigenvectors, strict=True)
        ]
    )


def _check_arguments(
    k: int, tol: float, max_matvecs: int, max_basis: int, dimension: int | None
) -> None:
    if k < 1:
        raise ValueError(f"num_eigenpairs must be at least 1, got {k}")
    if dimension is not None and k > dimension:
        raise _too_many(k, dimension)
    if not tol > 0:
        raise ValueError(f"tol must be positive, got {tol}")
    if max_matvecs < 2:
        raise ValueError(
            f"max_matvecs must be at least 2, a step and a measured residual, got {max_matvecs}"
        )
    if max_basis < k + 3:
        raise ValueError(
            f"max_basis must be at least num_eigenpairs + 3 = {k + 3}, got {max_basis}; "
            f"{2 * k + 2} is a good choice"
        )


def _too_many(k: int, dimension: int) -> ValueError:
    return ValueError(
        f"{k} eigenpairs asked of an operator of dimension {dimension}: ask for {dimension} at most"
    )


def _status(
    state: KrylovState,
    ritz: np.ndarray,
    rotation: np.ndarray,
    k: int,
    tol: float,
    max_matvecs: int,
    can_begin_anew: bool,
) -> str | None:
    """Why to stop now, or None: a function of the state alone, so that a resumed run agrees."""
    bound = tol * state.norm
    num_locked, a = len(state.locked), len(ritz)
    if state.has_next:
        if a > 0 and num_locked + a >= k:
            estimates = np.abs(state.coupling @ rotation)
            # The first active pair counts even if the locked ones are larger: until it has
            # converged, a Krylov space begun anew may still hold a larger one.
            num_active = max(1, int(np.sum(_leading(state, ritz, k) >= num_locked)))
            if estimates[:num_active].max() <= _ESTIMATE_SHARE * bound:
                return "converged"
    elif a == 0:
        return "converged"  # the locked vectors span the whole space
    elif not can_begin_anew:
        return "converged" if a >= k else "invariant-subspace"
    elif num_locked >= k and ritz[0] <= state.locked[k - 1] + bound:
        return "converged"  # an invariant subspace from a random vector held nothing larger
    return "max-matvecs" if state.num_matvecs + 2 > max_matvecs else None


def _leading(state: KrylovState, ritz: np.ndarray, k: int) -> np.ndarray:
    """Positions of the k largest, descending, in the locked eigenvalues followed by `ritz`."""
    return np.argsort(-np.concatenate([state.locked, ritz]), kind="stable")[:k]


def _restart(
    state: KrylovState,
    ritz: np.ndarray,
    rotation: np.ndarray,
    k: int,
    max_basis: int,
    tol: float,
    space: VectorSpace,
) -> None:
    """Replace the active vectors by their leading Ritz vectors, more of them than are wanted.

    One more for each that has converged, as in ARPACK (Lehoucq, Sorensen and Yang, "ARPACK users'
    guide", SIAM 1998), within a quarter and a half of the room for more. Measured on size 2,000:
    the quarter halves the products for k = 1 and evenly spaced eigenvalues, costs or saves at most
    15% of them for k = 5 and 10, and changes nothing on spectra like those of Hessians.
    """
    first, a = len(state.locked), len(ritz)
    wanted = max(1, k - first)
    room = max_basis - 1 - first - wanted
    num_converged = np.sum(np.abs(state.coupling @ rotation)[:wanted] <= tol * state.norm)
    keep = min(a - 1, wanted + int(np.clip(num_converged, room // 4, room // 2)))
    signs = rotate(state.basis, first, rotation[:, :keep], space)
    del state.basis[first + keep : first + a]
    state.projected = np.diag(ritz[:keep])
    state.coupling = (state.coupling @ rotation[:, :keep]) * signs


def _lock(
    state: KrylovState, ritz: np.ndarray, rotation: np.ndarray, k: int, space: VectorSpace
) -> np.ndarray:
    """Turn the leading k of the locked and the active pairs into locked ones, and drop the rest.

    Returns:
        [k'] b . s_i of each, 0 for those that were locked before.
    """
    first = len(state.locked)
    signs = rotate(state.basis, first, rotation, space)
    leading = _leading(state, ritz, k)
    couplings = np.concatenate([np.zeros(first), (state.coupling @ rotation) * signs])[leading]
    state.basis[:] = [state.basis[i] for i in leading]
    space.reorthonormalise(state.basis)  # what rounding in many restarts has added up to
    state.locked = np.concatenate([state.locked, ritz])[leading]
    state.projected = np.zeros((0, 0))
    state.coupling = np.zeros(0)
    return couplings


def _unseen_residual(
    state: KrylovState,
    couplings: np.ndarray,
    next_vector: Vector | None,
    matvec: Matvec,
    space: VectorSpace,
) -> float:
    """The norm of E S, by one product on a random combination of the locked vectors.

    For coefficients c uniform on the sphere of radius sqrt(k), the mean square of E S c is the
    squared Frobenius norm of E S: the sum over the pairs.
    """
    c = np.random.default_rng(0).standard_normal(len(couplings))
    c *= np.sqrt(len(c)) / np.linalg.norm(c)
    rest = matvec(space.combine(c, state.basis)) - space.combine(c * state.locked, state.basis)
    state.num_matvecs += 1
    if next_vector is not None:
        rest = rest - float(c @ couplings) * next_vector
    unseen = space.norm(rest)
    require_finite([unseen], state.num_matvecs)
    return unseen
