"""Convex objectives: successive convex approximation from several starts, in lockstep.

For convex J the linearisation at s is a lower bound that is exact at s, so with the maximiser w of
c.w, c = F^T grad J(s), the value cannot fall: the vertices of W are climbed until none is above.
Each start is a direction v [k] (its first vertex maximises (F^T v).w). The starts share every pass
over the rows, and the worse ones are dropped on the way.
"""

from __future__ import annotations

import numpy as np

from megatron_direct.selection.linear import maximise
from megatron_direct.selection.problem import Problem
from megatron_direct.selection.projection import project

# The limits of the paper.
_MAX_ITERATIONS = 20
_TOLERANCE = 1e-4
# Starts kept after each iteration, the last number from there on. Measured on random instances:
# pruning after the first iteration drops the eventual winner, keeping more gains 1e-4.
_KEPT = (5, 2)
# Steps of the smooth path, each a share of |w| = sqrt(K). Measured on random instances: 1 step is
# worth little, 2 bring the worst of 60 from 0.967 to 0.983 of the best value known, 10 no further.
_SMOOTH_STEPS, _SMOOTH_SIZE = 2, 0.6


def ascend(
    problem: Problem, starts: np.ndarray, history: list[dict]
) -> tuple[list[np.ndarray], np.ndarray]:
    """The distinct selections [N] bool kept to the end, best first, and the optima [m] of the
    linear programmes at the starts [m, k] themselves."""
    rows = problem.rows
    masks: dict[int, np.ndarray] = {}
    values = np.full(len(starts), -np.inf)
    active, directions, hints = np.arange(len(starts)), starts, [0.0] * len(starts)
    for iteration in range(_MAX_ITERATIONS):
        scores = rows.scores(directions)
        vertices = [
            maximise(problem.feasible, row, rows.ties(row), hint)
            for row, hint in zip(scores, hints, strict=True)
        ]
        if iteration == 0:
            support = np.array([vertex.value for vertex in vertices])
        sums = rows.sums(np.array([vertex.lower for vertex in vertices]))
        reached = problem.quadratic.value(sums)
        gains = reached - values[active]
        for start, vertex, value in zip(active.tolist(), vertices, reached, strict=True):
            if value > values[start]:
                masks[start], values[start] = vertex.lower, value
        history.append({
            "stage": "ascent", "iteration": iteration, "starts": len(active),
            "objective": float(values.max()),
        })
        kept = _distinct_best(values, _KEPT[min(iteration, len(_KEPT) - 1)])
        going = np.isin(active, kept) & (gains > _TOLERANCE * np.abs(values[active]))
        hints = [vertex.price for vertex, go in zip(vertices, going, strict=True) if go]
        active, directions = active[going], problem.quadratic.gradient(sums[going])
        if not active.size:
            break
    return [masks[start] for start in kept], support


def smooth_path(problem: Problem, total: np.ndarray) -> np.ndarray:
    """[k] the sum reached by projected gradient steps from equal weights; ``total`` [k] is the
    sum of all rows.

    From there the first vertices do not yet exclude each other, and the path bends towards the
    better of them; as a start it reaches optima that no dominant direction does.
    """
    rows, feasible = problem.rows, problem.feasible
    size = _SMOOTH_SIZE * np.sqrt(feasible.num_select)
    weights = np.full(rows.num_samples, feasible.num_select / rows.num_samples)
    sums = total * (feasible.num_select / rows.num_samples)
    for _ in range(_SMOOTH_STEPS):
        scores = rows.scores(problem.quadratic.gradient(sums)[None])[0]
        step = size * scores / (np.linalg.norm(scores) or 1.0)
        weights = project(feasible, weights + step)
        sums = rows.sums(weights[None])[0]
    return sums


def _distinct_best(values: np.ndarray, count: int) -> list[int]:
    """Indices of the largest values, best first; values that agree to 1e-9 stand for the same
    selection, and the first of them is taken."""
    kept: list[int] = []
    for index in np.argsort(-values, kind="stable"):
        if not kept or values[kept[-1]] - values[index] > 1e-9 * abs(values[kept[-1]]):
            kept.append(int(index))
    return kept[:count]
