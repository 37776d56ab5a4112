"""Concave objectives: the relaxation solved by simplicial decomposition, with its duality gap.

Maximise concave J(F w) over W. Every linear programme max c.w, c = F^T grad J(s), gives a vertex
of W and the bound J* <= J(s) + c.(vertex - w); J is then maximised over the convex hull of the
vertices met so far, a small quadratic programme in k dimensions (Holloway 1974; von Hohenbalken
1977). Only the image of a vertex, F w, enters it, so the N samples cost two products per iteration.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_direct.selection.linear import Vertex, maximise
from megatron_direct.selection.objectives import Quadratic
from megatron_direct.selection.problem import Problem

# Relative duality gap at which the relaxation counts as solved.
GAP_TOLERANCE = 1e-4
_MAX_ITERATIONS = 300


@dataclass(frozen=True)
class Relaxed:
    """Weights [N], their value, a bound on every feasible value, and whether the gap between
    the two came within GAP_TOLERANCE."""

    weights: np.ndarray
    value: float
    upper_bound: float
    converged: bool


@dataclass(frozen=True, eq=False)
class _Atom:
    """A vertex that is kept: the bits of its two selections, and the share of the second."""

    lower: np.ndarray
    upper: np.ndarray
    theta: float

    @classmethod
    def of(cls, vertex: Vertex) -> _Atom:
        return cls(np.packbits(vertex.lower), np.packbits(vertex.upper), vertex.theta)

    def add_to(self, weights: np.ndarray, share: float) -> None:
        """Adds its weights [N], times a share of the mixture."""
        for bits, part in ((self.lower, 1.0 - self.theta), (self.upper, self.theta)):
            weights += (share * part) * np.unpackbits(bits, count=len(weights))


def relax(problem: Problem, history: list[dict]) -> Relaxed:
    """Maximise J over W to a relative duality gap of GAP_TOLERANCE."""
    rows, quadratic = problem.rows, problem.quadratic
    sums = np.zeros(rows.dim)
    upper = np.inf
    value = -np.inf
    images = np.zeros((0, rows.dim))
    atoms: list[_Atom] = []
    mix = np.zeros(0)
    price = 0.0
    for iteration in range(_MAX_ITERATIONS):
        gradient = quadratic.gradient(sums)
        scores = rows.scores(gradient[None])[0]
        vertex = maximise(problem.feasible, scores, rows.ties(scores), price)
        price = vertex.price
        if iteration:
            # Widened by what rounding of the products may hide.
            guard = rows.rounding * (abs(value) + abs(vertex.value))
            upper = min(upper, value + float(vertex.value - gradient @ sums) + guard)
            history.append({
                "stage": "relaxation", "iteration": iteration, "objective": value,
                "upper_bound": upper,
            })
            if upper - value <= GAP_TOLERANCE * abs(value):
                break
        images = np.concatenate([images, rows.sums(vertex.weights()[None])])
        atoms.append(_Atom.of(vertex))
        mix = _maximise_on_simplex(images, quadratic, np.append(mix, 0.0))
        used = mix > 0
        images, mix = images[used], mix[used]
        atoms = [atom for atom, keep in zip(atoms, used, strict=True) if keep]
        sums = mix @ images
        value = float(quadratic.value(sums))
    best = np.zeros(rows.num_samples)
    for share, atom in zip(mix, atoms, strict=True):
        atom.add_to(best, share)
    return Relaxed(best, value, upper, upper - value <= GAP_TOLERANCE * abs(value))


def _maximise_on_simplex(
    images: np.ndarray, quadratic: Quadratic, mix: np.ndarray
) -> np.ndarray:
    """Mixture [t] >= 0 of sum 1 that maximises J(mix @ images), starting from a mixture.

    Active-set method: solve on the support with the sum held, stop at the first bound met and
    leave it out, and take in the vertex with the largest gradient until none exceeds the support's.
    """
    linear = images @ quadratic.linear
    gram = quadratic.curve(images) @ images.T
    scale = max(np.abs(linear).max(), np.abs(gram).max())
    if not mix.any():
        mix = np.zeros(len(mix))
        mix[np.argmax(linear + 0.5 * np.diag(gram))] = 1.0
    for _ in range(10 * len(mix)):
        slope = linear + gram @ mix
        level = slope @ mix
        entering = int(np.argmax(slope))
        if slope[entering] - level <= 1e-12 * scale:
            break
        support = mix > 0
        support[entering] = True
        while True:
            free = np.flatnonzero(support)
            goal = np.zeros(len(mix))
            goal[free] = _stationary(gram[np.ix_(free, free)], linear[free], scale)
            falling = support & (goal < mix) & (goal <= 0)
            if not falling.any():
                mix = goal
                break
            step = mix[falling] / (mix[falling] - goal[falling])
            reach = min(1.0, step.min())
            mix = mix + reach * (goal - mix)
            blocked = falling & (mix <= 1e-14)
            mix[blocked] = 0.0
            support &= ~blocked
    return np.maximum(mix, 0.0) / np.maximum(mix, 0.0).sum()


def _stationary(gram: np.ndarray, linear: np.ndarray, scale: float) -> np.ndarray:
    """Where linear.x + x.gram x / 2 is stationary on sum x = 1; a ridge settles flat directions."""
    size = len(linear)
    system = np.zeros((size + 1, size + 1))
    system[:size, :size] = gram - 1e-12 * scale * np.eye(size)
    system[:size, size] = system[size, :size] = scale
    solution = np.linalg.solve(system, np.append(-linear, scale))
    return solution[:size]
