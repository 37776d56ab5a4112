"""The selection problem as it is posed in sketch coordinates: costs, flat parts, objectives.

Inner products of sketches stand for those of gradients (shapes: N candidates, M validation samples,
k sketch coordinates, p eigenpairs). With g_i sample i's gradient and (lambda_j, v_j) the leading
eigenpairs of the validation loss's curvature, stiff up to the elbow:

    a_i = sum over stiff j of lambda_j <g_i, v_j>^2      stiff cost
    flat(g_i) = g_i less its part along the stiff v_j    (or its part along the v_j behind them)

``descent`` treats the sketches first: they are brought to one length, since the length of a single
sample's gradient says more about noise than about worth; shrunk towards the means of their clusters
(:mod:`megatron_direct.selection.shrinkage`); and weighted by the sample's tokens, since Megatron
packs samples into sequences, in which each token counts alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_direct.curvature.spectrum import Directions
from megatron_direct.errors import UserError
from megatron_direct.selection import shrinkage
from megatron_direct.selection.problem import Selection, stiff_budget
from megatron_direct.selection.solver import solve_selection
from megatron_direct.settings import Settings, flag


@dataclass(frozen=True)
class SelectionConfig(Settings):
    """Selection problem."""

    num_select: int | None = flag(
        None, "K, samples to select; left out: a quarter of the pool", type=int, at_least=1)
    objective: str = flag(
        "descent", "what the selected samples maximise; flat-energy is the paper's",
        choices=("flat-energy", "alignment", "descent"))
    flat_subspace: str = flag(
        "complement", "what counts as flat: all that is not stiff, or only the computed directions "
        "behind the elbow whose eigenvalues are above zero", choices=("complement", "bulk"))
    stiff_budget_fraction: float = flag(
        0.05, "budget of stiff cost: 0 is the least that K samples can cost, 1 that of K average "
        "samples; --objective descent has none unless --stiff-budget is given", at_least=0,
        at_most=1)
    stiff_budget: float | None = flag(
        None, "budget of stiff cost in absolute terms, in place of the fraction", type=float,
        at_least=0, at_most=math.inf)
    step_size: float = flag(
        1.0, "--objective descent: length of the step, over 1 / lambda_max (longer ones are worse "
        "on the embedded text: docs/selection.md)", above=0)
    normalize_gradients: bool = flag(
        True, "--objective descent: gradients of equal length")
    weight_by_tokens: bool = flag(
        True, "--objective descent: a sample counts by the tokens that it is trained on")
    shrinkage_clusters: int = flag(
        8, "--objective descent: clusters of the pools towards whose means gradients are shrunk; "
        "0: no shrinkage", at_least=0)
    kept_deviation: float = flag(
        0.5, "share of a gradient's deviation from its cluster's mean that is kept", at_least=0,
        at_most=1)
    quotas: tuple = flag(
        (), "least and greatest number of samples from a pool, as NAME:LEAST:GREATEST with either "
        "left empty at will; NAME is the last part of its prefix", nargs="+")
    sketch_rows: str = flag(
        "auto", "where the problem is solved: with all rows on rank 0, or with the rows spread "
        "over the ranks; auto: spread if they take more than a quarter of rank 0's free "
        "memory",
        choices=("auto", "gathered", "spread"))


@dataclass(frozen=True)
class Evidence:
    """What is known of the candidates that this rank holds, n of all N.

    rows: [n, k] sketches; labels: [n] tokens that a sample is trained on; datasets: [n] number of
    the pool, below num_datasets; ids: [n] numbers of the candidates, 0..N-1 over all ranks;
    all_reduce_sum: as solve_selection takes it; valid_rows: [M, k] sketches of the validation
    samples, the same on each rank.
    """

    rows: np.ndarray
    labels: np.ndarray
    datasets: np.ndarray
    num_datasets: int
    ids: np.ndarray
    valid_rows: np.ndarray
    directions: Directions
    all_reduce_sum: Callable[[np.ndarray], np.ndarray] = lambda array: array


def solve(config: SelectionConfig, evidence: Evidence, num_select: int, seed: int,
          **quotas) -> tuple[Selection, np.ndarray]:
    """(selection, [N] stiff costs). quotas: ``groups`` and ``quotas``, as solve_selection has them.

    Raises InfeasibleSelection, and ValueError for quotas that cannot be met.
    """
    costs = stiff_costs(evidence.rows, evidence.directions)
    count = int(evidence.all_reduce_sum(np.array([float(len(costs))]))[0])
    all_costs = np.zeros(count)
    all_costs[evidence.ids] = costs
    all_costs = evidence.all_reduce_sum(all_costs)
    budget = config.stiff_budget
    if budget is None and config.objective != "descent":
        budget = stiff_budget(all_costs, num_select, config.stiff_budget_fraction)
    found = solve_selection(
        summed_rows(config, evidence, seed).T, costs, num_select, stiff_budget=budget,
        objective=config.objective, seed=seed, sample_ids=evidence.ids,
        all_reduce_sum=evidence.all_reduce_sum, **_of_objective(config, evidence), **quotas)
    return found, all_costs


def stiff_costs(rows: np.ndarray, directions: Directions) -> np.ndarray:
    """[N] a_i = sum_j lambda_j <g_i, v_j>^2 over stiff j, with inner products of sketches."""
    stiff = directions.sketches[: directions.num_stiff].astype(np.float64)
    return (rows.astype(np.float64) @ stiff.T) ** 2 @ directions.eigenvalues[: len(stiff)]


def summed_rows(config: SelectionConfig, evidence: Evidence, seed: int) -> np.ndarray:
    """[n, k] the rows that the objective sums up: treated sketches for descent, else flat parts."""
    if config.objective != "descent":
        return flat_rows(evidence.rows, evidence.directions, config.flat_subspace)
    labels, reduce = evidence.labels.astype(np.float64), evidence.all_reduce_sum
    lengths = np.sqrt(np.einsum("nk,nk->n", evidence.rows, evidence.rows, dtype=np.float64))
    count, total_length, total_labels = reduce(
        np.array([float(len(lengths)), lengths.sum(), labels.sum()]))
    weights = labels / (total_labels / count) if config.weight_by_tokens else np.ones(len(labels))
    # The one copy of the rows; what follows changes it in place.
    rows = np.array(evidence.rows, dtype=np.float32)
    if config.normalize_gradients:  # a row of zeros stays one
        _scale(rows, np.divide(total_length / count, lengths, out=np.zeros_like(lengths),
                               where=lengths > 0))
    if config.shrinkage_clusters:
        clusters, num_clusters = shrinkage.find_clusters(
            rows, evidence.datasets, evidence.num_datasets, config.shrinkage_clusters,
            evidence.ids, reduce, seed)
        shrinkage.shrink(rows, weights, clusters, num_clusters, config.kept_deviation, reduce)
    _scale(rows, weights)
    return rows


def _scale(rows: np.ndarray, factors: np.ndarray) -> None:
    """Multiplies each of the rows [n, k] in place, in float64 arithmetic."""
    for block in shrinkage.blocks(len(rows)):
        rows[block] = rows[block] * factors[block, None]


def flat_rows(rows: np.ndarray, directions: Directions, subspace: str) -> np.ndarray:
    """[N, k] the part of each sketch in the flat subspace.

    complement: what is left once the stiff directions are projected out; bulk: the projection on
    the computed directions behind them with eigenvalues above zero.
    """
    if subspace == "complement":
        basis = _orthonormal(directions.sketches[: directions.num_stiff])
        return _in_blocks(lambda block: block - (block @ basis) @ basis.T, rows)
    behind = directions.sketches[directions.num_stiff:][
        directions.eigenvalues[directions.num_stiff:] > 0]
    if len(behind) == 0:
        raise UserError("--flat-subspace bulk: no direction with an eigenvalue above zero was "
                        "computed behind the elbow. Raise --num-eigenpairs.")
    basis = _orthonormal(behind)
    return _in_blocks(lambda block: (block @ basis) @ basis.T, rows)


def _in_blocks(project: Callable[[np.ndarray], np.ndarray], rows: np.ndarray) -> np.ndarray:
    """float32 rows out of float64 arithmetic, without a float64 copy of all rows."""
    result = np.empty_like(rows, dtype=np.float32)
    for block in shrinkage.blocks(len(rows)):
        result[block] = project(rows[block].astype(np.float64))
    return result


def _orthonormal(vectors: np.ndarray) -> np.ndarray:
    """[k, p] orthonormal basis of the span of [p, k]."""
    return np.linalg.qr(vectors.T.astype(np.float64))[0]


def _of_objective(config: SelectionConfig, evidence: Evidence) -> dict:
    """The keyword arguments that an objective needs beside the rows."""
    directions, mean_valid = evidence.directions, evidence.valid_rows.mean(0)
    if config.objective == "alignment":
        return {"target": flat_rows(mean_valid[None], directions, config.flat_subspace)[0]}
    if config.objective == "descent":
        # H as far as it is known: its computed eigenpairs. Elsewhere it counts as zero.
        sketches = directions.sketches.astype(np.float64)
        return {"target": mean_valid,
                "curvature": (sketches.T * np.maximum(directions.eigenvalues, 0)) @ sketches,
                "step_size": config.step_size / float(directions.eigenvalues[0])}
    return {}
