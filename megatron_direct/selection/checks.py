"""Checks of what solve_selection is given: expected, found, and what to do about it."""

from __future__ import annotations

import math
from numbers import Integral, Real

import numpy as np


def checked_flat(flat: np.ndarray) -> np.ndarray:
    """[k, N] floating point; its values are checked with the first product."""
    flat = np.asarray(flat)
    if flat.ndim != 2 or flat.shape[0] == 0 or not np.issubdtype(flat.dtype, np.floating):
        raise ValueError(
            f"flat must be a floating-point array [k, N], k >= 1, found {flat.dtype} of shape "
            f"{flat.shape}; pass the transpose of sketches [N, k] in float32 or float64"
        )
    return flat


def checked_costs(stiff_cost: np.ndarray) -> np.ndarray:
    """[N] float64, finite and non-negative, or a ValueError that names the first bad sample."""
    costs = np.asarray(stiff_cost, dtype=np.float64)
    if costs.ndim != 1 or costs.size == 0:
        raise ValueError(
            f"stiff_cost must be a vector [N], N >= 1, found shape {costs.shape}; give one cost "
            "per sample"
        )
    bad = ~(np.isfinite(costs) & (costs >= 0))
    if bad.any():
        first = int(np.argmax(bad))
        raise ValueError(
            f"stiff_cost must be finite and non-negative, found {costs[first]} at sample {first} "
            f"and {int(bad.sum())} in all are bad; drop these samples"
        )
    return costs


def checked_count(num_select: int, num_samples: int) -> int:
    """K as an int in [1, N], N counting each sample as often as it may be selected."""
    is_count = isinstance(num_select, Integral) and not isinstance(num_select, bool)
    if not is_count or not 1 <= num_select <= num_samples:
        raise ValueError(
            f"num_select must be an integer from 1 to the number of samples, {num_samples}, "
            f"found {num_select!r}; select fewer, or give more samples"
        )
    return int(num_select)


def checked_number(name: str, value: float | None) -> float:
    """A real number as a float, NaN and infinity included."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ValueError(f"{name} must be a number, found {value!r}; convert it to a float")
    return float(value)


def checked_max_count(max_count: int) -> int:
    """M as an int of at least 1."""
    if not isinstance(max_count, Integral) or isinstance(max_count, bool) or max_count < 1:
        raise ValueError(f"max_count must be an integer of at least 1, found {max_count!r}; 1 "
                         "selects each sample once at most")
    return int(max_count)


def checked_budget(stiff_budget: float | None) -> float:
    """tau as a float; None means no budget and becomes infinity."""
    if stiff_budget is None:
        return math.inf
    budget = checked_number("stiff_budget", stiff_budget)
    if not budget >= 0:  # refuses NaN too
        raise ValueError(
            f"stiff_budget must be at least 0, found {stiff_budget!r}; stiff_budget(stiff_cost, "
            "num_select, fraction) computes one, math.inf sets none"
        )
    return budget


def checked_step_size(step_size: float | None) -> float:
    """eta, finite and above 0."""
    step = checked_number("step_size", step_size)
    if not (math.isfinite(step) and step > 0):
        raise ValueError(
            f"step_size must be finite and above 0, found {step_size!r}; 1 / lambda_max is a "
            "good value"
        )
    return step


def checked_vector(name: str, values: np.ndarray | None, dim: int) -> np.ndarray:
    """[k] float64, finite."""
    vector = np.asarray(values, dtype=np.float64)
    if vector.shape != (dim,):
        raise ValueError(
            f"{name} must be of shape ({dim},), an entry for each of flat's rows, found shape "
            f"{vector.shape}"
        )
    return checked_finite(name, vector)


def checked_finite(name: str, values: np.ndarray) -> np.ndarray:
    """The array itself, or a ValueError that names the first entry that is not finite."""
    bad = ~np.isfinite(values)
    if bad.any():
        first = tuple(int(axis) for axis in np.argwhere(bad)[0])
        raise ValueError(
            f"{name} must be finite, found {values[first]} at {first}, and {int(bad.sum())} bad "
            "entries in all; drop the samples that cause them"
        )
    return values
