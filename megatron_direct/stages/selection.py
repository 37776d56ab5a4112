"""The last stage of ``select``: the selection problem, on rank 0, and the masks it yields."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_direct import files, parallel
from megatron_direct.config import flag
from megatron_direct.data import indexed
from megatron_direct.data.mask import SampleMask
from megatron_direct.data.samples import Samples
from megatron_direct.errors import UserError
from megatron_direct.gradients.store import Sketches
from megatron_direct.selection import InfeasibleSelection, solve_selection, stiff_budget
from megatron_direct.selection.problem import Selection
from megatron_direct.stages.curvature import StiffDirections


@dataclass(frozen=True)
class SelectionConfig:
    """Selection problem."""

    num_select: int | None = flag(
        None, "K, samples to select; left out: a quarter of the pool", type=int)
    objective: str = flag(
        "flat-energy", "what the selected samples maximise, or (descent) minimise",
        choices=("flat-energy", "alignment", "descent"))
    stiff_budget_fraction: float = flag(
        0.05, "budget of stiff cost: 0 is the least that K samples can cost, 1 that of K average "
              "samples")
    stiff_budget: float | None = flag(
        None, "budget of stiff cost in absolute terms, in place of the fraction", type=float)
    step_size: float = flag(
        5.0, "--objective descent: length of the step, over 1 / lambda_max")


def num_to_select(config: SelectionConfig, num_usable: int) -> int:
    """K. Raises UserError if it does not lie between 1 and the size of the pool."""
    count = config.num_select if config.num_select is not None else max(1, num_usable // 4)
    if not 1 <= count <= num_usable:
        raise UserError(f"--num-select {count} must lie between 1 and the pool's {num_usable} "
                        "samples. Give a smaller number, or more pools in --data-path.")
    return count


def solve(config: SelectionConfig, samples: Samples, pool: Sketches, mean_valid: np.ndarray,
          directions: StiffDirections, *, seed: int, folder: Path) -> None:
    """Writes ``selection.json`` and ``masks/`` (rank 0).

    mean_valid: [k] sketch of the mean validation gradient. Raises UserError if no K samples fit.
    """
    candidates = np.flatnonzero(pool.finite)
    count = num_to_select(config, len(samples.usable))
    if count > len(candidates):
        raise UserError(f"--num-select {count} is more than the {len(candidates)} samples whose "
                        "gradients are finite. Give a smaller number, or check the checkpoint.")
    rows = pool.rows[candidates]
    cost = stiff_costs(rows, directions)
    budget = config.stiff_budget
    if budget is None and config.objective != "descent":
        budget = stiff_budget(cost, count, config.stiff_budget_fraction)
    try:
        found = solve_selection(summed_rows(config, rows, directions).T, cost, count,
                                stiff_budget=budget, objective=config.objective, seed=seed,
                                **_of_objective(config, mean_valid, directions))
    except InfeasibleSelection as error:
        raise UserError(f"{error} Give --stiff-budget of at least {error.min_stiff_budget:.6g}, "
                        "or --stiff-budget-fraction in its place.") from error
    chosen = pool.samples[candidates[found.indices]]
    masks = masks_of(samples, chosen)
    names = indexed.prefix_names(samples.prefixes)
    for prefix, mask in masks.items():
        mask.save(mask_path(folder, names[prefix]))
    summary = _report(config, samples, pool, cost, found, chosen, masks, names)
    files.write_json(folder / "selection.json", summary)
    parallel.say(_in_words(summary))


def stiff_costs(rows: np.ndarray, directions: StiffDirections) -> np.ndarray:
    """[N] a_i = sum_j lambda_j <g_i, v_j>^2, with the inner products taken between sketches."""
    projections = rows.astype(np.float64) @ directions.sketches.T.astype(np.float64)
    return projections**2 @ directions.eigenvalues


def flat_rows(rows: np.ndarray, directions: StiffDirections) -> np.ndarray:
    """[N, k] what is left of each sketch once the (sketched) stiff directions are projected out."""
    basis, _ = np.linalg.qr(directions.sketches.T.astype(np.float64))  # [k, p]
    return (rows - (rows @ basis) @ basis.T).astype(np.float32)


def summed_rows(config: SelectionConfig, rows: np.ndarray, directions: StiffDirections,
                ) -> np.ndarray:
    """The rows that the objective sums up: whole sketches for descent, else their flat parts."""
    return rows if config.objective == "descent" else flat_rows(rows, directions)


def _of_objective(config: SelectionConfig, mean_valid: np.ndarray, directions: StiffDirections,
                  ) -> Mapping:
    """The keyword arguments that an objective needs beside the rows."""
    if config.objective == "alignment":
        return {"target": flat_rows(mean_valid[None], directions)[0]}
    if config.objective == "descent":
        sketches = directions.sketches.astype(np.float64)
        return {"target": mean_valid,
                "curvature": (sketches.T * directions.eigenvalues) @ sketches,
                "step_size": config.step_size / float(directions.eigenvalues[0])}
    return {}


def masks_of(samples: Samples, chosen: np.ndarray) -> dict[str, SampleMask]:
    """One mask for each dataset, from the numbers of the samples that were chosen."""
    keep = np.zeros(len(samples), dtype=bool)
    keep[chosen] = True
    return {prefix: SampleMask(keep[samples.first[i]: samples.first[i + 1]],
                               indexed.dataset_digest(prefix))
            for i, prefix in enumerate(samples.prefixes)}


def mask_path(folder: Path, name: str) -> Path:
    return folder / "masks" / f"{name}.mask.npz"


def load_masks(folder: Path, prefixes: Sequence[str]) -> dict[str, SampleMask]:
    """The masks of a run, or of an arm, read on rank 0 and given to all ranks."""
    names = indexed.prefix_names(list(prefixes))

    def read():
        return {prefix: SampleMask.load(mask_path(folder, names[prefix])) for prefix in prefixes}

    masks = parallel.on_rank_zero(read)
    digests = ", ".join(f"{names[prefix]}: {mask.digest}" for prefix, mask in masks.items())
    parallel.require_same_on_all_ranks(digests, "digests of the masks")
    return masks


def composition(samples: Samples, chosen: np.ndarray) -> dict[str, dict[str, int]]:
    """By dataset: candidates, selected, and how many of each were corrupted on purpose."""
    names = indexed.prefix_names(samples.prefixes)
    domain_of = samples.dataset_of(chosen)
    result = {}
    for i, prefix in enumerate(samples.prefixes):
        corrupted = np.zeros(len(samples.document_lengths[i]), dtype=bool)
        corrupted[indexed.read_card(prefix).get("corrupted", [])] = True
        documents = chosen[domain_of == i] - samples.first[i]
        result[names[prefix]] = {
            "samples": len(corrupted), "selected": len(documents),
            "corrupted": int(corrupted.sum()),
            "selected_corrupted": int(corrupted[documents].sum())}
    return result


def _in_words(summary: dict) -> str:
    counts = summary["samples"]
    lines = [f"selection: {summary['num_select']} of {counts['in_pools']} samples by "
             f"{summary['objective']}, {summary['status']}; {counts['cut']} cut at the sequence "
             f"length, {counts['too_short']} too short, {counts['not_finite']} not finite"]
    for name, part in summary["composition"].items():
        corrupted = (f" (corrupted: {part['selected_corrupted']} of {part['corrupted']})"
                     if part["corrupted"] else "")
        lines.append(f"  {name}: {part['selected']} of {part['samples']}{corrupted}")
    return "\n".join(lines)


def _report(config: SelectionConfig, samples: Samples, pool: Sketches, cost: np.ndarray,
            found: Selection, chosen: np.ndarray, masks: Mapping[str, SampleMask],
            names: Mapping[str, str]) -> dict:
    least = float(np.sort(cost)[: len(chosen)].sum())
    return {
        "objective": config.objective,
        "num_select": len(chosen),
        "objective_value": found.objective,
        "upper_bound": found.upper_bound,
        "status": found.status,
        "stiff_cost": found.stiff_cost,
        "stiff_budget": None if found.stiff_budget is None or math.isinf(found.stiff_budget)
        else found.stiff_budget,
        "least_stiff_cost": least,
        "average_stiff_cost": float(cost.mean() * len(chosen)),
        "samples": {"in_pools": len(samples), "too_short": samples.num_unusable,
                    "cut": samples.num_cut, "cut_tokens": samples.num_cut_tokens,
                    "not_finite": int((~pool.finite).sum())},
        "mean_loss": {"pool": float(pool.losses[pool.finite].mean()),
                      "selected": float(pool.losses[np.isin(pool.samples, chosen)].mean())},
        "composition": composition(samples, chosen),
        "mask_digests": {names[prefix]: mask.digest for prefix, mask in masks.items()},
        "history": found.history,
    }
