"""What a user sets of the selection problem."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_direct.selection.objectives import OBJECTIVES
from megatron_direct.settings import Settings, flag


@dataclass(frozen=True)
class SelectionConfig(Settings):
    """Selection problem."""

    num_select: int | None = flag(
        None, "K, samples to select; default: a quarter of the pool", type=int, at_least=1)
    max_count: int = flag(
        1, "how often one sample may be selected; above 1 masks hold counts, and a sample with "
        "count 2 comes twice per epoch", at_least=1, at_most=255)
    objective: str = flag(
        "descent", "what the selected samples maximise; flat-energy is the paper's",
        choices=OBJECTIVES)
    flat_subspace: str = flag(
        "complement", "what counts as flat: all that is not stiff, or only the computed directions "
        "after the elbow whose eigenvalues are above zero", choices=("complement", "bulk"))
    stiff_budget_fraction: float = flag(
        0.05, "budget of stiff cost: 0 is the least that K samples can cost, 1 the cost of K "
        "average samples; --objective descent has none unless --stiff-budget is given", at_least=0,
        at_most=1)
    stiff_budget: float | None = flag(
        None, "absolute budget of stiff cost, instead of the fraction", type=float,
        at_least=0, at_most=math.inf)
    step_size: float = flag(
        1.0, "--objective descent: length of the step, in units of 1 / lambda_max (longer steps "
        "are worse on the embedded text: docs/selection.md)", above=0)
    normalize_gradients: bool = flag(
        True, "--objective descent: scale all gradients to equal length")
    weight_by_tokens: bool = flag(
        True, "--objective descent: weight each sample by the tokens that it is trained on")
    shrinkage_clusters: int = flag(
        8, "--objective descent: number of clusters of the pools towards whose means gradients "
        "are shrunk; 0: no shrinkage", at_least=0)
    kept_deviation: float = flag(
        0.5, "share of a gradient's deviation from its cluster's mean that remains", at_least=0,
        at_most=1)
    quotas: tuple = flag(
        (), "smallest and largest number of samples from a pool, as NAME:LEAST:GREATEST; either "
        "may be empty; NAME is the last part of its prefix", nargs="+")
    sketch_rows: str = flag(
        "auto", "where the problem is solved: with all rows on rank 0, or with the rows spread "
        "over the ranks; auto: spread if they take more than a quarter of rank 0's free "
        "memory",
        choices=("auto", "gathered", "spread"))
