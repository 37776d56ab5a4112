"""Copies of one sample: those with the lowest ids are selected."""

from __future__ import annotations

import numpy as np

from megatron_direct.selection.problem import Problem
from megatron_direct.selection.rows import Rows

# Rows that differ by less than this share of their norm are copies.
_SAME_ROW = 1e-6
# Pairs whose rows are fetched and compared at once.
_PAIRS = 64
# Random projections, and the width of a cell, in what rounding explains: wide enough that copies
# seldom fall on two sides of an edge, and so narrow that other samples seldom share a cell in all
# of them, of which there may be 10^8.
_PROBES = 4
_WIDTH = 16


def prefer_lower_ids(problem: Problem, mask: np.ndarray) -> np.ndarray:
    """The selection [N] bool with copies of one sample exchanged for those of lower ids.

    Copies share group and row, and so their cost, but for rounding: which copy was computed in
    which batch shall not decide. Candidates share a cell of a grid over random projections of their
    rows' directions and over their lengths, or of that grid moved by half a cell, and are compared
    in full before they are exchanged; the budget holds all the same.
    """
    rows, feasible = problem.rows, problem.feasible
    mask = mask.copy()
    places = _places(rows)
    groups = None if feasible.quotas is None else feasible.quotas.codes
    # Sums of costs err by a few units in the last place.
    slack = feasible.budget - feasible.cost(mask) * (1 + 1e-12)
    for offset in (0.0, 0.5):
        pairs = _pairs(_cells(places, offset, groups), mask)
        for start in range(0, len(pairs), _PAIRS):
            out, into = pairs[start : start + _PAIRS].T
            leaving, entering = rows.take(out), rows.take(into)
            apart = np.linalg.norm(leaving - entering, axis=1)
            same = apart <= _SAME_ROW * np.linalg.norm(leaving, axis=1)
            for i, j in zip(out[same], into[same], strict=True):
                dearer = max(float(feasible.costs[j] - feasible.costs[i]), 0.0)
                if dearer == 0 or dearer <= slack:
                    mask[i], mask[j] = False, True
                    slack -= dearer
    return mask


def _places(rows: Rows) -> np.ndarray:
    """[p, N] coordinates of each row, in cells, which are of relative width."""
    probes = rows.scores(np.random.default_rng(0).standard_normal((_PROBES, rows.dim)))
    for probe in probes:
        widths = _WIDTH * rows.ties(probe)
        np.divide(probe, widths, out=probe, where=widths > 0)
    lengths = np.log(np.maximum(rows.lengths, np.finfo(np.float64).tiny))
    return np.concatenate([probes, lengths[None] / (_WIDTH * rows.rounding)])


def _cells(places: np.ndarray, offset: float, groups: np.ndarray | None) -> np.ndarray:
    """[N] a number of each sample's cell: its group, and where it lies in each of places [p, N].

    Cells share a number by chance alone, once in 2^64.
    """
    number = np.zeros(places.shape[1], np.uint64) if groups is None else groups.astype(np.uint64)
    for coordinate in places:
        # As signed whole numbers, of which the bits are mixed (splitmix64).
        place = np.floor(coordinate + offset).astype(np.int64).view(np.uint64)
        with np.errstate(over="ignore"):
            number = (number ^ place) * np.uint64(0x9E3779B97F4A7C15)
            number = (number ^ (number >> np.uint64(32))) * np.uint64(0xBF58476D1CE4E5B9)
    return number


def _pairs(cells: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """[m, 2] (selected, not selected and of a lower id) of one cell each; the highest selected with
    the lowest of the others."""
    order = np.argsort(cells, kind="stable")
    starts = np.flatnonzero(np.diff(cells[order], prepend=~cells[order[:1]]))
    sizes = np.diff(starts, append=len(order))
    taken = np.add.reduceat(mask[order].astype(np.int64), starts)
    found = [np.empty((0, 2), dtype=np.int64)]
    for number in np.flatnonzero((taken > 0) & (taken < sizes)):
        cell = order[starts[number]: starts[number] + sizes[number]]  # ascending ids
        count = min(taken[number], sizes[number] - taken[number])
        pairs = np.stack([cell[mask[cell]][::-1][:count], cell[~mask[cell]][:count]], axis=1)
        found.append(pairs[pairs[:, 1] < pairs[:, 0]])
    return np.concatenate(found)
