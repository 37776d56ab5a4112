"""Copies of one sample: those with the lowest ids are selected."""

from __future__ import annotations

import numpy as np

from megatron_direct.selection.problem import Problem

# Rows that differ by less than this share of their norm are copies.
_SAME_ROW = 1e-6
# Pairs whose rows are fetched and compared at once.
_PAIRS = 64


def prefer_lower_ids(problem: Problem, mask: np.ndarray) -> np.ndarray:
    """The selection [N] bool with copies of one sample exchanged for those of lower ids.

    Copies share group and row, and so their cost, but for rounding: which copy was computed in
    which batch shall not decide. Candidates are found by two random projections of the rows and
    compared in full before they are exchanged; the budget holds all the same.
    """
    rows, feasible = problem.rows, problem.feasible
    mask = mask.copy()
    run = np.zeros(len(mask), dtype=np.int64)
    if feasible.quotas is not None:
        run = feasible.quotas.codes.astype(np.int64)
    for probe in rows.scores(np.random.default_rng(0).standard_normal((2, rows.dim))):
        run = _runs(run, probe, rows.tie(probe))
    mixed = (np.bincount(run, mask) > 0) & (np.bincount(run, ~mask) > 0)
    order = np.argsort(run, kind="stable")
    where = order[mixed[run[order]]]
    pairs: list[tuple[int, int]] = []
    for part in np.split(where, np.flatnonzero(np.diff(run[where])) + 1):
        leaving, entering = np.sort(part[mask[part]])[::-1], np.sort(part[~mask[part]])
        pairs += [(i, j) for i, j in zip(leaving, entering, strict=False) if j < i]
    # Sums of costs err by a few units in the last place.
    slack = feasible.budget - feasible.cost(mask) * (1 + 1e-12)
    for start in range(0, len(pairs), _PAIRS):
        out, into = np.array(pairs[start : start + _PAIRS]).T
        leaving, entering = rows.take(out), rows.take(into)
        apart = np.linalg.norm(leaving - entering, axis=1)
        same = apart <= _SAME_ROW * np.linalg.norm(leaving, axis=1)
        for i, j in zip(out[same], into[same], strict=True):
            dearer = max(float(feasible.costs[j] - feasible.costs[i]), 0.0)
            if dearer == 0 or dearer <= slack:
                mask[i], mask[j] = False, True
                slack -= dearer
    return mask


def _runs(run: np.ndarray, values: np.ndarray, tie: float) -> np.ndarray:
    """[N] the number of each sample's run, once runs are split where sorted values [N] are more
    than ``tie`` apart."""
    order = np.lexsort((values, run))
    new = (np.diff(run[order]) != 0) | (np.diff(values[order]) > tie)
    result = np.empty(len(run), dtype=np.int64)
    result[order] = np.concatenate([[0], np.cumsum(new)])
    return result
