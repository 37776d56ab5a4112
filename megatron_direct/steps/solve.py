"""The last stage of ``select``: the selection problem, on rank 0, and the masks it yields."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil

from megatron_direct.curvature.spectrum import Directions
from megatron_direct.data import indexed
from megatron_direct.data.mask import SampleMask
from megatron_direct.data.samples import Samples
from megatron_direct.errors import UserError
from megatron_direct.gradients import store
from megatron_direct.runtime import files, parallel
from megatron_direct.selection import InfeasibleQuotas, InfeasibleSelection, treatment
from megatron_direct.selection.problem import Selection
from megatron_direct.selection.treatment import Evidence, SelectionConfig


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


def limits(config: SelectionConfig, samples: Samples, numbers: np.ndarray) -> dict:
    """``--quotas`` as the solver takes them, for these samples; empty if there are none."""
    if not config.quotas:
        return {}
    names = list(indexed.prefix_names(samples.prefixes).values())
    return {"groups": np.array(names)[samples.dataset_of(numbers)],
            "quotas": parse_quotas(config.quotas, names)}


@contextlib.contextmanager
def in_terms_of_flags() -> Iterator[None]:
    """A UserError that names the flags in the place of the solver's errors."""
    try:
        yield
    except InfeasibleSelection as error:
        raise UserError(f"{error} Give --stiff-budget of at least {error.min_stiff_budget:.6g}, "
                        "or --stiff-budget-fraction in its place.") from error
    except InfeasibleQuotas as error:
        raise UserError(f"--quotas: {error}") from error


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
    # The rows, those that are finite, and two copies for the solver's and the clusters' sake.
    return store.num_bytes(pool) > psutil.virtual_memory().available // 4


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
    here = part.samples[part.finite]
    evidence = Evidence(part.rows[part.finite], samples.num_labels[here],
                        samples.dataset_of(here), len(samples.prefixes),
                        np.searchsorted(candidates, here),
                        store.load(folder / "sketches" / "valid").rows, directions, all_reduce_sum)
    with in_terms_of_flags():
        found, cost = treatment.select_by_sketches(config, evidence, count, seed,
                                                   **limits(config, samples, here))
    chosen = candidates[found.indices]
    losses = everywhere(np.where(part.finite, part.losses, 0.0))
    counts = {"in_pools": len(samples), "too_short": samples.num_unusable, "cut": samples.num_cut,
              "cut_tokens": samples.num_cut_tokens, "not_finite": int((has_row & ~finite).sum())}
    mean_loss = {"pool": float(losses[candidates].mean()), "selected": float(losses[chosen].mean())}
    return chosen, {"objective": config.objective, "num_select": len(chosen),
                    **_in_numbers(found, cost), "samples": counts, "mean_loss": mean_loss}


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
    is_chosen = np.zeros(len(samples), dtype=bool)
    is_chosen[chosen] = True
    result = {}
    for i, prefix in enumerate(samples.prefixes):
        here = slice(samples.first[i], samples.first[i + 1])
        selected, corrupted = is_chosen[here], samples.corrupted[here]
        result[names[prefix]] = {
            "samples": len(selected), "selected": int(selected.sum()),
            "corrupted": int(corrupted.sum()),
            "selected_corrupted": int((selected & corrupted).sum())}
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
