"""The textbook method for flat-energy: successive linearisation, each surrogate maximised by
projected gradient steps, each projection by Dykstra's alternating projections.

Float64 and dense, with the limits published for it: at most 20 linearisations of 50 steps with
up to 200 sweeps. Its weights miss the constraints by what Dykstra leaves, and are then repaired.
"""

from __future__ import annotations

import numpy as np

ROUNDS, STEPS, SWEEPS = 20, 50, 200
TOLERANCE = 1e-4
SWEEP_TOLERANCE = 1e-8


def textbook_weights(
    flat: np.ndarray, costs: np.ndarray, num_select: int, budget: float
) -> list[np.ndarray]:
    """The weights [N] after each linearisation."""
    num = flat.shape[1]
    weights = np.full(num, num_select / num)
    rounds = []
    for _ in range(ROUNDS):
        gradient = 2.0 * (flat.T @ (flat @ weights))
        step = gradient / (np.linalg.norm(gradient) + 1e-12)
        new = weights
        for _ in range(STEPS):
            new = dykstra(new + step, costs, num_select, budget)
        moved = np.linalg.norm(new - weights)
        weights = new
        rounds.append(weights)
        if moved < TOLERANCE:
            break
    return rounds


def dykstra(point: np.ndarray, costs: np.ndarray, num_select: int, budget: float) -> np.ndarray:
    """The projection on box, sum and budget, as far as SWEEPS sweeps bring it.

    Dykstra's corrections are kept for box and budget; an affine set needs none.
    """
    num, cost_norm = len(point), costs @ costs
    box_correction, budget_correction = np.zeros(num), 0.0
    current = point
    for _ in range(SWEEPS):
        before = current
        shifted = current + box_correction
        current = np.clip(shifted, 0.0, 1.0)
        box_correction = shifted - current
        current = current + (num_select - current.sum()) / num
        current = current + budget_correction * costs
        excess = max(costs @ current - budget, 0.0)
        budget_correction = excess / cost_norm if cost_norm > 0 else 0.0
        current = current - budget_correction * costs
        if np.abs(current - before).max() < SWEEP_TOLERANCE:
            break
    return current


def repaired(
    weights: np.ndarray, costs: np.ndarray, num_select: int, budget: float
) -> np.ndarray:
    """Ascending ids of K samples within the budget, near the weights.

    The K largest of weights - price * costs, at the least price (by bisection) that fits.
    """
    def largest(price: float) -> np.ndarray:
        return np.lexsort((costs, price * costs - weights))[:num_select]

    unit = 1.0 / max(costs.max(), 1e-300)
    picked = largest(0.0)
    if costs[picked].sum() <= budget:
        return np.sort(picked)
    low, high = 0.0, unit
    while costs[largest(high)].sum() > budget and high < 1e9 * unit:
        high *= 4.0
    for _ in range(50):
        middle = 0.5 * (low + high)
        fits = costs[largest(middle)].sum() <= budget
        low, high = (low, middle) if fits else (middle, high)
    picked = largest(high)
    if costs[picked].sum() > budget:
        picked = np.argsort(costs, kind="stable")[:num_select]
    return np.sort(picked)


def textbook_selection(
    flat: np.ndarray, costs: np.ndarray, num_select: int, budget: float
) -> tuple[np.ndarray, float]:
    """The best of the repaired selections of all rounds, and its flat energy."""
    best, best_value = None, -np.inf
    for weights in textbook_weights(flat, costs, num_select, budget):
        ids = repaired(weights, costs, num_select, budget)
        total = flat[:, ids].sum(axis=1)
        if total @ total > best_value:
            best, best_value = ids, float(total @ total)
    return best, best_value
