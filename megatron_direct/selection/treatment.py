"""The selection problem posed in sketch coordinates, and solved.

Which rows are summed up, and what the objective needs, are computed from sketches. An objective
that sums up whole sketches has them treated first: brought to one length, since the length of a
single sample's gradient says more about noise than about worth; shrunk towards the means of their
clusters (shrinkage.py); and weighted by the sample's tokens, since Megatron packs samples into
sequences, in which each token counts alike. The others sum up flat parts (evidence.py).

Shapes: N candidates, n of them on this rank, k sketch coordinates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_direct.selection.budget import stiff_budget
from megatron_direct.selection.config import SelectionConfig
from megatron_direct.selection.evidence import Evidence, flat_rows, stiff_costs
from megatron_direct.selection.objectives import Terms, find_objective
from megatron_direct.selection.objectives.quadratic import LowRank
from megatron_direct.selection.problem import Selection
from megatron_direct.selection.rows import row_blocks, row_lengths
from megatron_direct.selection.shrinkage import shrink
from megatron_direct.selection.solver import solve_selection
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
    costs = stiff_costs(evidence.rows, evidence.directions)
    share = evidence.share()
    cost_range = share.from_leader(
        lambda whole: CostRange.of(np.tile(whole, config.max_count), num_select), costs)
    budget = config.stiff_budget
    if budget is None and objective.needs_budget:
        budget = share.from_leader(
            lambda whole: stiff_budget(np.tile(whole, config.max_count), num_select,
                                       config.stiff_budget_fraction), costs)
    rows, terms = _posed(config, evidence, num_select, seed)
    selection = solve_selection(
        rows.T, costs, num_select, stiff_budget=budget,
        objective=config.objective, seed=seed, target=terms.target, curvature=terms.curvature,
        step_size=terms.step_size, groups=groups, quotas=quotas, max_count=config.max_count,
        sample_ids=evidence.ids,
        all_reduce_sum=evidence.all_reduce_sum)
    return selection, cost_range


def linear_scores(config: SelectionConfig, evidence: Evidence, num_select: int, seed: int,
                  ) -> np.ndarray:
    """[N] inner products of the rows that are summed up with the objective's target, on every rank;
    all ranks call this."""
    rows, terms = _posed(config, evidence, num_select, seed)
    local = np.empty(len(rows))
    for block in row_blocks(len(rows)):
        local[block] = rows[block] @ terms.target
    return evidence.share().known_to_all(local)


def _posed(config: SelectionConfig, evidence: Evidence, num_select: int, seed: int,
           ) -> tuple[np.ndarray, Terms]:
    """The rows that the objective sums up, and its terms; where texts count too, both have a
    coordinate more."""
    size = evidence.rows.shape[1]
    rows = summed_rows(config, evidence, seed, spare=1 if has_texts(config, evidence) else 0)
    found = bargain(config, evidence, rows[:, :size], num_select, seed)
    terms = find_objective(config.objective).terms(config, evidence, found.weights)
    if found.likeness is None:
        return rows, terms
    return rows, _with_likeness(terms, rows[:, size], found.likeness)


def _with_likeness(terms: Terms, coordinate: np.ndarray, likeness: np.ndarray) -> Terms:
    """Writes the likeness into the rows' last ``coordinate`` [n], in which nothing is curved."""
    assert terms.target is not None and isinstance(terms.curvature, LowRank)
    unit = float(np.linalg.norm(terms.target))  # so that float32 rows hold numbers of one size
    coordinate[:] = likeness / unit
    directions = np.pad(terms.curvature.directions, ((0, 0), (0, 1)))
    return dataclasses.replace(terms, target=np.append(terms.target, unit),
                               curvature=LowRank(terms.curvature.eigenvalues, directions))


def summed_rows(config: SelectionConfig, evidence: Evidence, seed: int, spare: int = 0,
                ) -> np.ndarray:
    """[n, k + spare] the rows that the objective sums up, as float32, behind treated ones so many
    coordinates to be written yet; all ranks call this."""
    if find_objective(config.objective).treats_sketches:
        return _treated(config, evidence, seed, spare)
    return flat_rows(evidence.rows, evidence.directions, config.flat_subspace)


def _treated(config: SelectionConfig, evidence: Evidence, seed: int, spare: int) -> np.ndarray:
    share, (count, size) = evidence.share(), evidence.rows.shape
    labels = evidence.labels.astype(np.float64)
    lengths = row_lengths(evidence.rows)
    total_length, total_labels = share.summed(np.array([lengths.sum(), labels.sum()]))
    mean_length, mean_labels = total_length / share.num_samples, total_labels / share.num_samples
    weights = labels / mean_labels if config.weight_by_tokens else np.ones(len(labels))
    # Before the rows are copied, since a search of clusters needs a copy of its own.
    clusters = evidence.clusters(config.shrinkage_clusters, seed) if config.shrinkage_clusters \
        else None
    # The one copy of the rows; what follows changes it in place.
    wide = np.empty((count, size + spare), dtype=np.float32)
    rows = wide[:, :size]
    rows[:] = evidence.rows
    if config.normalize_gradients:  # a row of zeros stays one
        _scale(rows, np.divide(mean_length, lengths, out=np.zeros_like(lengths),
                               where=lengths > 0))
    if clusters is not None:
        shrink(rows, weights, clusters, config.kept_deviation, share)
    _scale(rows, weights)
    return wide


def _scale(rows: np.ndarray, factors: np.ndarray) -> None:
    """Multiplies each of the rows [n, k] in place, in float64 arithmetic."""
    for block in row_blocks(len(rows)):
        rows[block] = rows[block] * factors[block, None]
