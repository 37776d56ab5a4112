"""The last stage of ``select``: the selection problem, on rank 0, and the masks it yields."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from megatron_direct import files, parallel
from megatron_direct.config import flag
from megatron_direct.data import indexed
from megatron_direct.data.mask import SampleMask
from megatron_direct.data.samples import Samples
from megatron_direct.errors import UserError
from megatron_direct.gradients import store
from megatron_direct.selection import InfeasibleSelection, solve_selection, stiff_budget
from megatron_direct.selection.problem import Selection
from megatron_direct.stages.curvature import Directions


@dataclass(frozen=True)
class SelectionConfig:
    """Selection problem."""

    num_select: int | None = flag(
        None, "K, samples to select; left out: a quarter of the pool", type=int)
    objective: str = flag(
        "descent", "what the selected samples maximise; flat-energy is the paper's",
        choices=("flat-energy", "alignment", "descent"))
    flat_subspace: str = flag(
        "complement", "what counts as flat: all that is not stiff, or only the computed directions "
        "behind the elbow whose eigenvalues are above zero", choices=("complement", "bulk"))
    stiff_budget_fraction: float = flag(
        0.05, "budget of stiff cost: 0 is the least that K samples can cost, 1 that of K average "
        "samples; --objective descent has none unless --stiff-budget is given")
    stiff_budget: float | None = flag(
        None, "budget of stiff cost in absolute terms, in place of the fraction", type=float)
    step_size: float = flag(
        5.0, "--objective descent: length of the step, over 1 / lambda_max")
    quotas: tuple = flag(
        (), "least and greatest number of samples from a pool, as NAME:LEAST:GREATEST with either "
        "left empty at will; NAME is the last part of its prefix", nargs="+")
    sketch_rows: str = flag(
        "auto", "where the problem is solved: with all rows on rank 0, or with the rows spread "
        "over the ranks; auto: spread if they take more than half of rank 0's free memory",
        choices=("auto", "gathered", "spread"))


def num_to_select(config: SelectionConfig, num_usable: int) -> int:
    """K. Raises UserError if it does not lie between 1 and the size of the pool."""
    count = config.num_select if config.num_select is not None else max(1, num_usable // 4)
    if not 1 <= count <= num_usable:
        raise UserError(f"--num-select {count} must lie between 1 and the pool's {num_usable} "
                        "samples. Give a smaller number, or more pools in --data-path.")
    return count


def parse_quotas(texts: Sequence[str], names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """{name: (least, greatest)}. Raises UserError for one that is not understood."""
    quotas = {}
    for text in texts:
        name, *bounds = text.split(":")
        try:
            least, greatest = bounds
            quotas[name] = (int(least or 0), int(greatest) if greatest else sys.maxsize)
        except ValueError:
            raise UserError(f"--quotas {text} is not NAME:LEAST:GREATEST.") from None
        if name not in names:
            raise UserError(f"--quotas {text}: no pool is called {name}. They are called "
                            f"{', '.join(names)}.")
    return quotas


def solve(config: SelectionConfig, samples: Samples, folder: Path, directions: Directions, *,
          seed: int) -> None:
    """Writes ``selection.json`` and ``masks/``; all ranks call this.

    Raises UserError, on all ranks, if no K samples keep the budget and the quotas.
    """
    pool = folder / "sketches" / "pool"
    if parallel.on_rank_zero(lambda: _is_spread(config, pool)):
        rank, size = parallel.rank_and_size()
        outcome = _solve(config, samples, folder, directions, seed, store.load(pool, rank, size),
                         parallel.sum_over_world)
        parallel.on_rank_zero(lambda: _write(folder, samples, *outcome))
    else:
        parallel.on_rank_zero(lambda: _write(folder, samples, *_solve(
            config, samples, folder, directions, seed, store.load(pool), lambda array: array)))


def _is_spread(config: SelectionConfig, pool: Path) -> bool:
    if config.sketch_rows != "auto":
        return config.sketch_rows == "spread"
    return store.num_bytes(pool) > psutil.virtual_memory().available // 2


def _solve(config: SelectionConfig, samples: Samples, folder: Path, directions: Directions,
           seed: int, part: store.Sketches, all_reduce_sum: Callable[[np.ndarray], np.ndarray],
           ) -> tuple[np.ndarray, dict]:
    """(numbers of the chosen samples, summary), from this rank's part of the rows."""

    def everywhere(values: np.ndarray) -> np.ndarray:
        """[samples] what each rank knows of its own samples, 0 for those that have no row."""
        whole = np.zeros(len(samples))
        whole[part.samples] = values
        return all_reduce_sum(whole)

    has_row, finite = everywhere(np.ones(len(part.samples))) > 0, everywhere(part.finite) > 0
    candidates = np.flatnonzero(finite)
    count = num_to_select(config, int(has_row.sum()))
    if count > len(candidates):
        raise UserError(f"--num-select {count} is more than the {len(candidates)} samples whose "
                        "gradients are finite. Give a smaller number, or check the checkpoint.")
    rows, here = part.rows[part.finite], part.samples[part.finite]
    stiff = stiff_costs(rows, directions)
    cost = np.zeros(len(samples))
    cost[here] = stiff
    cost = all_reduce_sum(cost)[candidates]
    mean_valid = store.load(folder / "sketches" / "valid").rows.mean(0)
    names = list(indexed.prefix_names(samples.prefixes).values())
    quotas = parse_quotas(config.quotas, names)
    keywords = _of_objective(config, mean_valid, directions)
    if quotas:
        keywords.update(groups=np.array(names)[samples.dataset_of(here)], quotas=quotas)
    budget = config.stiff_budget
    if budget is None and config.objective != "descent":
        budget = stiff_budget(cost, count, config.stiff_budget_fraction)
    try:
        found = solve_selection(
            summed_rows(config, rows, directions).T, stiff, count, stiff_budget=budget,
            objective=config.objective, seed=seed, sample_ids=np.searchsorted(candidates, here),
            all_reduce_sum=all_reduce_sum, **keywords)
    except InfeasibleSelection as error:
        raise UserError(f"{error} Give --stiff-budget of at least {error.min_stiff_budget:.6g}, "
                        "or --stiff-budget-fraction in its place.") from error
    except ValueError as error:
        if not quotas:
            raise
        raise UserError(f"--quotas: {error}") from error
    chosen = candidates[found.indices]
    losses = everywhere(np.where(part.finite, part.losses, 0.0))
    counts = {"in_pools": len(samples), "too_short": samples.num_unusable, "cut": samples.num_cut,
              "cut_tokens": samples.num_cut_tokens, "not_finite": int((has_row & ~finite).sum())}
    mean_loss = {"pool": float(losses[candidates].mean()), "selected": float(losses[chosen].mean())}
    return chosen, {"objective": config.objective, "num_select": len(chosen),
                    **_in_numbers(found, cost), "samples": counts, "mean_loss": mean_loss}


def stiff_costs(rows: np.ndarray, directions: Directions) -> np.ndarray:
    """[N] a_i = sum_j lambda_j <g_i, v_j>^2 over stiff j, with inner products of sketches."""
    stiff = directions.sketches[: directions.num_stiff].astype(np.float64)
    return (rows.astype(np.float64) @ stiff.T) ** 2 @ directions.eigenvalues[: len(stiff)]


def summed_rows(config: SelectionConfig, rows: np.ndarray, directions: Directions) -> np.ndarray:
    """[N, k] the rows that the objective sums up: whole sketches for descent, else flat parts."""
    if config.objective == "descent":
        return rows
    return flat_rows(rows, directions, config.flat_subspace)


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
    for start in range(0, len(rows), 4096):
        result[start: start + 4096] = project(rows[start: start + 4096].astype(np.float64))
    return result


def _orthonormal(vectors: np.ndarray) -> np.ndarray:
    """[k, p] orthonormal basis of the span of [p, k]."""
    return np.linalg.qr(vectors.T.astype(np.float64))[0]


def _of_objective(config: SelectionConfig, mean_valid: np.ndarray, directions: Directions) -> dict:
    """The keyword arguments that an objective needs beside the rows.

    mean_valid: [k] sketch of the mean validation gradient.
    """
    if config.objective == "alignment":
        return {"target": flat_rows(mean_valid[None], directions, config.flat_subspace)[0]}
    if config.objective == "descent":
        # H as far as it is known: its computed eigenpairs. Elsewhere it counts as zero.
        sketches = directions.sketches.astype(np.float64)
        return {"target": mean_valid,
                "curvature": (sketches.T * np.maximum(directions.eigenvalues, 0)) @ sketches,
                "step_size": config.step_size / float(directions.eigenvalues[0])}
    return {}


def _in_numbers(found: Selection, cost: np.ndarray) -> dict:
    """What the solver said, beside the least and the average that K samples cost."""
    count = len(found.indices)
    return {"objective_value": found.objective, "upper_bound": found.upper_bound,
            "status": found.status, "stiff_cost": found.stiff_cost,
            "stiff_budget": found.stiff_budget,
            "least_stiff_cost": float(np.sort(cost)[:count].sum()),
            "average_stiff_cost": float(cost.mean() * count), "history": found.history}


def _write(folder: Path, samples: Samples, chosen: np.ndarray, summary: dict) -> None:
    names = indexed.prefix_names(samples.prefixes)
    masks = masks_of(samples, chosen)
    for prefix, mask in masks.items():
        mask.save(mask_path(folder, names[prefix]))
    summary = {**summary, "composition": composition(samples, chosen),
               "mask_digests": {names[prefix]: mask.digest for prefix, mask in masks.items()}}
    files.write_json(folder / "selection.json", summary)
    parallel.say(_in_words(summary))


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
