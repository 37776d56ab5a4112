"""The selection problem posed in sketch coordinates, and solved.

Which rows are summed up (treated_rows.py), and what the objective needs, are computed from
sketches.

Shapes: N candidates, n of them on this rank, k sketch coordinates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_direct.selection.budget import stiff_budget
from megatron_direct.selection.config import SelectionConfig
from megatron_direct.selection.evidence import Evidence
from megatron_direct.selection.objectives import Terms, find_objective
from megatron_direct.selection.objectives.quadratic import LowRank
from megatron_direct.selection.problem import Selection
from megatron_direct.selection.quotas import StatedQuotas, state_quotas
from megatron_direct.selection.solver import solve_selection
from megatron_direct.selection.treated_rows import summed_rows
from megatron_direct.selection.valid_weights import bargain, has_texts


@dataclass(frozen=True)
class CostRange:
    """The least and the average that K samples cost together."""

    least: float
    average: float

    @classmethod
    def of(cls, costs: np.ndarray, num_select: int) -> CostRange:
        """costs: [N]."""
        return cls(float(np.sort(costs)[:num_select].sum()), float(costs.mean() * num_select))


def select_by_sketches(
    config: SelectionConfig, evidence: Evidence, num_select: int, seed: int, *,
    groups: Sequence | np.ndarray | None = None, quotas: Mapping | None = None,
) -> tuple[Selection, CostRange]:
    """(selection, what K samples cost); all ranks call this. ``groups`` and ``quotas`` as
    solve_selection has them.

    Raises InfeasibleSelection, and InfeasibleQuotas for quotas that cannot be met.
    """
    objective = find_objective(config.objective)
    costs = evidence.stiff_costs()
    share = evidence.share()
    cost_range = share.from_leader(
        lambda whole: CostRange.of(np.tile(whole, config.max_count), num_select), costs)
    budget = config.stiff_budget
    if budget is None and objective.needs_budget:
        budget = share.from_leader(
            lambda whole: stiff_budget(np.tile(whole, config.max_count), num_select,
                                       config.stiff_budget_fraction), costs)
    rows, terms = _posed(config, evidence, num_select, seed, state_quotas(groups, quotas, share))
    selection = solve_selection(
        rows.T, costs, num_select, stiff_budget=budget,
        objective=config.objective, seed=seed, target=terms.target, curvature=terms.curvature,
        step_size=terms.step_size, groups=groups, quotas=quotas, max_count=config.max_count,
        sample_ids=evidence.ids,
        all_reduce_sum=evidence.all_reduce_sum)
    return selection, cost_range


def _posed(config: SelectionConfig, evidence: Evidence, num_select: int, seed: int,
           quotas: StatedQuotas | None) -> tuple[np.ndarray, Terms]:
    """The rows that the objective sums up, and its terms; where texts count too, both have a
    coordinate more."""
    size = evidence.rows.shape[1]
    rows = summed_rows(config, evidence, seed, spare=1 if has_texts(config, evidence) else 0)
    found = bargain(config, evidence, num_select, seed, quotas)
    terms = find_objective(config.objective).terms(config, evidence, found.weights)
    if found.likeness is None:
        return rows, terms
    return rows, _with_likeness(terms, rows[:, size], found.likeness)


def _with_likeness(terms: Terms, coordinate: np.ndarray, likeness: np.ndarray) -> Terms:
    """Writes the likeness into the rows' last ``coordinate`` [n], in which nothing is curved."""
    assert terms.target is not None and isinstance(terms.curvature, LowRank)
    # So that float32 rows hold numbers of one size; of no length where all rows are zeros.
    unit = float(np.linalg.norm(terms.target)) or 1.0
    coordinate[:] = likeness / unit
    directions = np.pad(terms.curvature.directions, ((0, 0), (0, 1)))
    return dataclasses.replace(terms, target=np.append(terms.target, unit),
                               curvature=LowRank(terms.curvature.eigenvalues, directions))
