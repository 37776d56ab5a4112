"""Dominant directions of the rows, and a bound on how much any direction holds, by block Krylov.

For the second moment M = F F^T, and P the projection away from a given direction, the operator
P M P is applied ``STEPS`` times to a block of random vectors. Rayleigh-Ritz on the span of all
blocks yields the dominant directions. It errs on the low side of the largest eigenvalue lambda;
for a single random start and q products (Kuczynski and Wozniakowski 1992, theorem 4.2)

    Prob[ ritz < (1 - eps) lambda ] <= 1.648 sqrt(k) exp(-(2 q - 1) sqrt(eps)),

and the block's starts are independent, so that all fail with that probability to the power of
their number. lambda <= ritz / (1 - eps) then holds except with probability FAILURE, whatever the
rows are; and for certain once the span is the whole space.
"""

from __future__ import annotations

import math

import numpy as np

from megatron_direct.selection.rows import Rows

# Then eps = 0.32 at k = 1024; a wider block costs as much as further steps and gains less.
BLOCK, STEPS = 4, 7
FAILURE = 1e-6


def dominant_directions(
    rows: Rows, away: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, float]:
    """BLOCK orthonormal directions [., k], most second moment first, orthogonal to the unit
    vector ``away`` [k] (or zero); and the bound on the second moment of any such direction."""
    space = rows.dim - 1 if away.any() else rows.dim
    basis = np.zeros((0, rows.dim))
    if space == 0:
        return basis, 0.0
    images = np.zeros((0, rows.dim))

    def outside(vectors: np.ndarray) -> np.ndarray:
        vectors = vectors - np.outer(vectors @ away, away)
        return vectors - (vectors @ basis.T) @ basis

    block = rng.standard_normal((BLOCK, rows.dim))
    for _ in range(STEPS):
        fresh = outside(block)
        # What the basis spans already is replaced: an invariant subspace has been found.
        spanned = np.linalg.norm(fresh, axis=1) <= 1e-10 * np.linalg.norm(block, axis=1)
        fresh[spanned] = rng.standard_normal((int(spanned.sum()), rows.dim))
        # Once more, to be orthogonal to rounding.
        block = np.linalg.qr(outside(fresh).T)[0].T[: space - len(basis)]
        image = rows.sums(rows.scores(block))
        image -= np.outer(image @ away, away)
        basis, images = np.concatenate([basis, block]), np.concatenate([images, image])
        if len(basis) == space:
            break
        block = image
    projected = basis @ images.T
    values, vectors = np.linalg.eigh(0.5 * (projected + projected.T))
    eps = 0.0
    if len(basis) < space:
        odds = math.log(1.648 * math.sqrt(space)) - math.log(FAILURE) / BLOCK
        eps = (odds / (2 * STEPS - 1)) ** 2
    largest = max(values[-1], 0.0)
    # 1e-4: products in float32 err by less, relative to the largest eigenvalue.
    bound = (1 + 1e-4) * largest / (1 - eps) if eps < 1 else math.inf
    return vectors.T[::-1][:BLOCK] @ basis, bound
