"""Leading eigenpairs of a symmetric operator by thick-restart Lanczos.

The problem: H (n x n, symmetric, known by its products) has eigenvalues lambda_1 >= ...; find
the algebraically largest k of them and orthonormal eigenvectors. The Krylov decomposition and its
notation are `krylov`'s; when to stop and what a restart keeps are `thick_restart`'s.

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
    KrylovState,
    Matvec,
    RandomVector,
    SymmetricOperator,
    append_next,
    begin,
    extend,
    require_finite,
    ritz_pairs,
)
from megatron_direct.curvature.thick_restart import (
    SYMMETRY_TOL,
    UNSEEN_SHARE,
    Target,
    lock,
    reason_to_stop,
    restart,
)
from megatron_direct.curvature.vector_space import (
    BlockDot,
    Combine,
    Dot,
    FunctionSpace,
    Vector,
)

# An asymmetry is judged from the fifth product on: the Ritz values of the first few can be far
# below the norm of H, which rounding is relative to.
_MATVECS_BEFORE_SYMMETRY_CHECK = 5
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
    symmetry_tol: float = SYMMETRY_TOL,
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

    A Krylov space holds one eigenvector of an eigenvalue that is repeated exactly, and of several
    that are closer to each other than about tol times the largest it may show one as converged
    before the others appear. Further ones are sought (with `random_vector`) only where the space of
    `start` ends, as it does for an operator of low rank; pairs beyond the rank are then returned
    with eigenvalue 0 to rounding.

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
    operator = SymmetricOperator(
        matvec, FunctionSpace(dot, block_dot, combine), random_vector, dimension
    )
    target = Target(num_eigenpairs, tol, max_matvecs, max_basis, symmetry_tol)
    return leading_eigenpairs(operator, target, start, on_step=on_step, state=state)


def leading_eigenpairs(
    operator: SymmetricOperator,
    target: Target,
    start: Vector,
    *,
    on_step: Callable[[KrylovState], None] | None = None,
    state: KrylovState | None = None,
) -> Spectrum:
    """`lanczos` over a space of one's own."""
    k, space = target.num_eigenpairs, operator.space
    if operator.dimension is not None and k > operator.dimension:
        raise _too_many(k, operator.dimension)
    if state is None:
        state, _ = begin(start, space)

    while True:
        pairs = ritz_pairs(state.projected)
        status = reason_to_stop(state, pairs, target, operator.random_vector is not None)
        if status is not None:
            break
        if not state.has_next:
            lock(state, pairs, k, space)
            state.num_invariant += 1
            assert operator.random_vector is not None, "or there would be a reason to stop"
            if append_next(state, operator.random_vector(state.num_invariant), space) == 0.0:
                if len(state.locked) < k:
                    raise _too_many(k, len(state.locked))
                continue
        elif len(state.basis) >= target.basis_limit:
            restart(state, pairs, target, space)
        extend(state, operator, negligible=_INVARIANT_SHARE * target.tol)
        _require_symmetric(state, target.symmetry_tol)
        if on_step is not None:
            on_step(state)

    next_vector = state.basis.pop() if state.has_next else None
    couplings = lock(state, pairs, k, space)
    unseen = _unseen_residual(state, couplings, next_vector, operator)
    bound = target.tol * state.norm
    residuals = np.hypot(couplings, unseen)
    if status == "converged" and unseen > UNSEEN_SHARE * bound:
        if state.num_matvecs + len(state.locked) <= target.max_matvecs:
            residuals = residual_norms(
                operator.matvec, state.locked, state.basis, dot=space.dot
            )
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
    space = FunctionSpace(dot)
    return np.array(
        [
            space.norm(matvec(vector) - float(value) * vector)
            for value, vector in zip(eigenvalues, eigenvectors, strict=True)
        ]
    )


def _too_many(k: int, dimension: int) -> ValueError:
    return ValueError(
        f"{k} eigenpairs requested of an operator of dimension {dimension}; request at most "
        f"{dimension}"
    )


def _require_symmetric(state: KrylovState, accepted: float) -> None:
    is_judged = not state.has_next or state.num_matvecs >= _MATVECS_BEFORE_SYMMETRY_CHECK
    if is_judged and state.asymmetry > accepted * state.norm:
        raise AsymmetricOperator(state.asymmetry / state.norm, accepted)


def _unseen_residual(
    state: KrylovState,
    couplings: np.ndarray,
    next_vector: Vector | None,
    operator: SymmetricOperator,
) -> float:
    """The norm of E S, by one product on a random combination of the locked vectors.

    For coefficients c uniform on the sphere of radius sqrt(k), the mean square of E S c is the
    squared Frobenius norm of E S: the sum over the pairs.
    """
    space = operator.space
    c = np.random.default_rng(0).standard_normal(len(couplings))
    c *= np.sqrt(len(c)) / np.linalg.norm(c)
    rest = operator.matvec(space.combine(c, state.basis)) - space.combine(
        c * state.locked, state.basis
    )
    state.num_matvecs += 1
    if next_vector is not None:
        rest = rest - float(c @ couplings) * next_vector
    unseen = space.norm(rest)
    require_finite([unseen], state.num_matvecs)
    return unseen
