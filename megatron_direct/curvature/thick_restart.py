"""When a Lanczos run may stop, and what it keeps when its basis is full.

The notation is that of `krylov`: the Ritz pairs are (theta_i, V_a s_i), where T s_i = theta_i s_i.
When the basis is full it is rotated to the leading Ritz vectors, the others are dropped, and the
next vector is kept: Wu and Simon, "Thick-restart Lanczos method for large symmetric eigenvalue
problems", SIAM J. Matrix Anal. Appl. 22 (2000).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_direct.curvature.krylov import KrylovState, RitzPairs
from megatron_direct.curvature.vector_space import VectorSpace

# The measured rounding may be a tenth of the tolerance before pairs are measured one by one: a
# random combination shows less than a tenth of it with probability 0.08 at worst, all of it lying
# in one direction. The estimates keep within what that leaves, in quadrature.
UNSEEN_SHARE = 0.1
_ESTIMATE_SHARE = (1.0 - UNSEEN_SHARE**2) ** 0.5

# The |<u, H v> - <H u, v>| / |lambda_max| that is taken for rounding: between that of
# single-precision products (1e-5) and the error of wrong ones (1e-1).
SYMMETRY_TOL = 1e-3


@dataclass(frozen=True)
class Target:
    """The pairs to find, how well, and what that may cost; each field as `lanczos` says."""

    num_eigenpairs: int
    tol: float
    max_matvecs: int
    max_basis: int | None = None
    symmetry_tol: float = SYMMETRY_TOL

    def __post_init__(self) -> None:
        k = self.num_eigenpairs
        if k < 1:
            raise ValueError(f"num_eigenpairs must be at least 1, got {k}")
        if not self.tol > 0:
            raise ValueError(f"tol must be positive, got {self.tol}")
        if self.max_matvecs < 2:
            raise ValueError(
                f"max_matvecs must be at least 2 (one step and one measured residual), got "
                f"{self.max_matvecs}"
            )
        if self.basis_limit < k + 3:
            raise ValueError(
                f"max_basis must be at least num_eigenpairs + 3 = {k + 3}, got {self.max_basis}; "
                f"{2 * k + 2} is a good choice"
            )

    @property
    def basis_limit(self) -> int:
        """Most basis vectors held."""
        return max(2 * self.num_eigenpairs + 2, 21) if self.max_basis is None else self.max_basis


def reason_to_stop(
    state: KrylovState, pairs: RitzPairs, target: Target, can_begin_anew: bool
) -> str | None:
    """A status of `lanczos.Spectrum`, or None to go on.

    A function of the state alone, so that a resumed run agrees.
    """
    k, bound = target.num_eigenpairs, target.tol * state.norm
    num_locked, a = len(state.locked), len(pairs.values)
    if state.has_next:
        if a > 0 and num_locked + a >= k:
            estimates = np.abs(state.coupling @ pairs.vectors)
            # The first active pair counts even if the locked ones are larger: until it has
            # converged, a Krylov space begun anew may still hold a larger one.
            num_active = max(1, int(np.sum(_leading(state, pairs, k) >= num_locked)))
            if estimates[:num_active].max() <= _ESTIMATE_SHARE * bound:
                return "converged"
    elif a == 0:
        return "converged"  # the locked vectors span the whole space
    elif not can_begin_anew:
        return "converged" if a >= k else "invariant-subspace"
    elif num_locked >= k and pairs.values[0] <= state.locked[k - 1] + bound:
        return "converged"  # an invariant subspace from a random vector held nothing larger
    return "max-matvecs" if state.num_matvecs + 2 > target.max_matvecs else None


def restart(state: KrylovState, pairs: RitzPairs, target: Target, space: VectorSpace) -> None:
    """Replace the active vectors by their leading Ritz vectors, more of them than are wanted.

    One more for each that has converged, as in ARPACK (Lehoucq, Sorensen and Yang, "ARPACK users'
    guide", SIAM 1998), within a quarter and a half of the room for more. Measured on size 2,000:
    the quarter halves the products for k = 1 and evenly spaced eigenvalues, costs or saves at most
    15% of them for k = 5 and 10, and changes nothing on spectra like those of Hessians.
    """
    first, a = len(state.locked), len(pairs.values)
    wanted = max(1, target.num_eigenpairs - first)
    room = target.basis_limit - 1 - first - wanted
    coupling = state.coupling @ pairs.vectors
    num_converged = np.sum(np.abs(coupling[:wanted]) <= target.tol * state.norm)
    keep = min(a - 1, wanted + int(np.clip(num_converged, room // 4, room // 2)))
    _rotate_active(state, pairs.vectors[:, :keep], space)
    state.projected = np.diag(pairs.values[:keep])
    state.coupling = coupling[:keep]


def lock(state: KrylovState, pairs: RitzPairs, k: int, space: VectorSpace) -> np.ndarray:
    """Turn the leading k of the locked and the active pairs into locked ones, and drop the rest.

    Returns:
        [k'] b . s_i of each, 0 for those that were locked before.
    """
    first = len(state.locked)
    leading = _leading(state, pairs, k)
    coupling = np.concatenate([np.zeros(first), state.coupling @ pairs.vectors])[leading]
    # Ritz values descend: those among the leading are the first of them.
    _rotate_active(state, pairs.vectors[:, : int(np.sum(leading >= first))], space)
    state.basis[:] = [state.basis[i] for i in leading]
    space.reorthonormalise(state.basis)  # what rounding in many restarts has added up to
    state.locked = np.concatenate([state.locked, pairs.values])[leading]
    state.projected = np.zeros((0, 0))
    state.coupling = np.zeros(0)
    return coupling


def _leading(state: KrylovState, pairs: RitzPairs, k: int) -> np.ndarray:
    """Positions of the k largest, descending, in the locked eigenvalues followed by the Ritz."""
    return np.argsort(-np.concatenate([state.locked, pairs.values]), kind="stable")[:k]


def _rotate_active(state: KrylovState, rotation: np.ndarray, space: VectorSpace) -> None:
    """Replace the a active vectors V_a by V_a rotation, [a, p]."""
    first, last = len(state.locked), len(state.locked) + len(rotation)
    active = state.basis[first:last]
    state.basis[first:last] = []  # given up, so that each is freed as soon as it is replaced
    space.rotate(active, rotation)
    state.basis[first:first] = active
