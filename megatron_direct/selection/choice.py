"""What ``select`` selects: how many, which, and which of them at random.

The objective has its say first. Then the selection is made again from each half of the evidence
(stability.py). What all three select is kept; of the others, as many as there were are drawn at
random within their clusters from samples that are sound, since another validation set
of the same kind, or another seed, would have selected others. Where a budget or quotas limit the
selection, it stays as it was solved.

Shapes: N candidates, K selected.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from megatron_direct.selection.auto import FEWEST_VALID, HowMany, select_auto, worth_of
from megatron_direct.selection.config import SelectionConfig
from megatron_direct.selection.evidence import Evidence
from megatron_direct.selection.objectives import OBJECTIVES
from megatron_direct.selection.problem import Selection
from megatron_direct.selection.stability import Repeating, Stability, halves, stability
from megatron_direct.selection.treatment import CostRange, select_by_sketches
from megatron_direct.selection.valid_weights import excess_scores
from megatron_direct.selection.worth import Worth


@dataclass(frozen=True, eq=False)
class Choice:
    """selection: what is selected; its objective, upper bound and status are of the selection that
    was solved for, before what does not repeat was drawn. costs: what so many samples cost;
    how_many: None if K was given; stability, repeating: None where there was nothing to draw."""

    selection: Selection
    costs: CostRange
    how_many: HowMany | None
    stability: Stability | None
    repeating: Repeating | None


def choose(config: SelectionConfig, evidence: Evidence, seed: int, limits: Mapping) -> Choice:
    """By the flags; all ranks call this. limits: groups and quotas, as solve_selection has them."""
    num_samples = evidence.share().num_samples
    may_draw = _may_draw(config, evidence, limits) and (
        config.is_auto or int(config.num_select) < num_samples)
    worth = worth_of(config, evidence, seed) if config.is_auto or may_draw else None
    how_many: HowMany | None
    if config.is_auto:
        assert worth is not None
        solved, costs, how_many = select_auto(config, evidence, worth, seed)
    else:
        solved, costs = select_by_sketches(config, evidence, int(config.num_select), seed, **limits)
        how_many = None
    if len(solved.indices) == num_samples or worth is None or not may_draw:
        return Choice(solved, costs, how_many, None, None)
    first, second = halves(config, evidence, len(solved.indices), seed)
    chosen = np.zeros(num_samples, dtype=bool)
    chosen[solved.indices] = True
    repeating = Repeating(chosen & first & second, worth.clusters, config.draw_unstable)
    if config.draw_unstable:
        indices = np.flatnonzero(drawn_within(
            chosen, repeating.again,
            chosen | _sound(config, evidence, worth, len(solved.indices), seed), worth.clusters,
            seed))
        solved = dataclasses.replace(solved, indices=indices,
                                     stiff_cost=evidence.share().from_leader(
                                         lambda whole: math.fsum(whole[indices].tolist()),
                                         evidence.stiff_costs()))
    return Choice(solved, costs, how_many, stability(first, second, worth.clusters), repeating)


def _may_draw(config: SelectionConfig, evidence: Evidence, limits: Mapping) -> bool:
    return (OBJECTIVES[config.objective].treats_sketches and not limits
            and config.max_count == 1 and config.stiff_budget is None
            and len(evidence.valid_rows) >= FEWEST_VALID)


def _sound(config: SelectionConfig, evidence: Evidence, worth: Worth, num_select: int, seed: int,
           ) -> np.ndarray:
    """[N] bool, what may be drawn at random: of positive worth, or in contrast of a score above the
    mean by gradients alone."""
    if not config.is_in_contrast:
        return worth.values > 0
    scores = excess_scores(config, evidence, num_select, seed)
    # Less what rounding explains: where all are equal, each is their mean.
    return scores > scores.mean() - 1e-6 * np.abs(scores).max()


def drawn_within(chosen: np.ndarray, kept: np.ndarray, allowed: np.ndarray, clusters: np.ndarray,
                 seed: int) -> np.ndarray:
    """[N] bool: ``kept``, and as many more of each cluster as were chosen of it, at random among
    those that are allowed ([N] bool each; clusters: [N]).

    Each sample has a number of its own that decides, so that a sample that changes sides changes
    one other at most.
    """
    keys = np.random.default_rng(seed).random(len(chosen))
    found = kept.copy()
    for cluster in np.unique(clusters[chosen & ~kept]):
        here = clusters == cluster
        free = np.flatnonzero(here & allowed & ~kept)
        count = int((chosen & ~kept & here).sum())
        found[free[np.argsort(keys[free], kind="stable")[:count]]] = True
    return found
