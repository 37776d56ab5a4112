"""The selection problem, solved on rank 0 or over all ranks, and the masks it yields."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from megatron_direct.data import indexed
from megatron_direct.data.samples import Samples
from megatron_direct.errors import UserError
from megatron_direct.gradients.store import Sketches
from megatron_direct.runtime import parallel
from megatron_direct.runtime.manifest import Key
from megatron_direct.selection import InfeasibleQuotas, InfeasibleSelection, treatment
from megatron_direct.selection.config import SelectionConfig
from megatron_direct.selection.evidence import Evidence
from megatron_direct.selection.problem import Selection
from megatron_direct.steps import sketch as sketch_step
from megatron_direct.steps.curvature import CurvatureConfig
from megatron_direct.steps.domains import Chosen, FoundGroups, find_domains, halves_of, write_blend
from megatron_direct.steps.measure import Measured
from megatron_direct.steps.selected import (
    MeanLoss,
    SampleCounts,
    SelectionSummary,
    composition,
    masks_of,
    write_masks,
)


@dataclass(frozen=True)
class SelectionKey(Key):
    """What a selection depends on. ``problem.num_select`` is the number it came to; where the rows
    lie while it is solved is left at its default."""

    pool_digests: tuple[str, ...]
    sketches_digest: str
    spectrum_digest: str
    num_eigenpairs: int
    energy_share: float
    problem: SelectionConfig
    seed: int


def num_to_select(config: SelectionConfig, num_usable: int) -> int:
    """K. Raises UserError if it does not lie between 1 and what the pool can give."""
    count = config.num_select if config.num_select is not None else max(1, num_usable // 4)
    if not 1 <= count <= num_usable * config.max_count:
        times = f" times --max-count {config.max_count}" if config.max_count > 1 else ""
        raise UserError(f"--num-select {count} must be between 1 and the pool's {num_usable} "
                        f"samples{times}. Give a smaller number, more pools in --data-path, or a "
                        "greater --max-count.")
    return count


def selection_key(config: SelectionConfig, curvature: CurvatureConfig, measured: Measured,
                  seed: int) -> SelectionKey:
    problem = dataclasses.replace(
        config, num_select=num_to_select(config, len(measured.pool.numbers)),
        sketch_rows=SelectionConfig().sketch_rows)
    return SelectionKey(tuple(measured.pool.digests), measured.sketches, measured.spectrum,
                        curvature.num_eigenpairs, curvature.energy_share, problem, seed)


def parse_quotas(texts: Sequence[str], names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """{name: (least, greatest)}. Raises UserError for one that is not understood."""
    quotas = {}
    for text in texts:
        name, *bounds = text.split(":")
        try:
            least, greatest = bounds
            quotas[name] = (int(least or 0), int(greatest) if greatest else sys.maxsize)
        except ValueError:
            raise UserError(f"--quotas {text} is not NAME:LEAST:GREATEST, two integers of which "
                            "either may be empty. Correct it.") from None
        if name not in names:
            raise UserError(f"--quotas {text}: no pool has the name {name}. The pools are "
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
        raise UserError(
            f"no {error.num_select} samples fit a stiff budget of {error.stiff_budget!r}. Give "
            f"--stiff-budget of at least {error.min_stiff_budget!r}, which is what the cheapest "
            "cost together, a larger --stiff-budget-fraction, or a smaller --num-select."
        ) from error
    except InfeasibleQuotas as error:
        raise UserError(f"--quotas: {error}") from error


def solve_and_write(config: SelectionConfig, measured: Measured, seed: int, folder: Path,
                    decode: Callable[[np.ndarray], str] | None = None) -> None:
    """Writes ``selection.json``, ``masks/`` and ``blend/`` into ``folder``; all ranks call this.

    decode: of tokens into text, on rank 0, if there is a tokenizer.

    Raises UserError, on all ranks, if no K samples keep the budget and the quotas.
    """
    if parallel.on_rank_zero(lambda: _is_spread(config, measured)):
        share = _Share(measured, sketch_step.read_sketches(
            measured.store, measured.pool, *parallel.rank_and_size()), parallel.sum_over_world)
        solved = _solve(config, share, seed)
        parallel.on_rank_zero(lambda: _write(folder, measured, solved, decode))
        return

    def alone() -> None:
        share = _Share(measured, sketch_step.read_sketches(measured.store, measured.pool))
        _write(folder, measured, _solve(config, share, seed), decode)

    parallel.on_rank_zero(alone)


def _is_spread(config: SelectionConfig, measured: Measured) -> bool:
    if config.sketch_rows != "auto":
        return config.sketch_rows == "spread"
    # The rows, those that are finite, and two copies for the solver's and the clusters' sake.
    needed = measured.store.num_bytes(len(measured.pool.numbers))
    return needed > psutil.virtual_memory().available // 4


@dataclass(frozen=True)
class _Share:
    """This rank's part of the rows of the pool."""

    measured: Measured
    part: Sketches
    all_reduce_sum: Callable[[np.ndarray], np.ndarray] = lambda array: array

    def everywhere(self, values: np.ndarray) -> np.ndarray:
        """[samples] what each rank knows of its own, 0 for those that have no row."""
        whole = np.zeros(len(self.measured.pool.samples))
        whole[self.part.samples] = values
        return self.all_reduce_sum(whole)


@dataclass(frozen=True, eq=False)
class _Solved:
    """summary: without what the masks add; candidates: [N] sample numbers; indices: [K] of the
    candidates selected."""

    summary: SelectionSummary
    candidates: np.ndarray
    indices: np.ndarray
    domains: FoundGroups


def _solve(config: SelectionConfig, share: _Share, seed: int) -> _Solved:
    samples, part = share.measured.pool.samples, share.part
    has_row = share.everywhere(np.ones(len(part.samples))) > 0
    finite = share.everywhere(part.finite) > 0
    candidates = np.flatnonzero(finite)
    count = num_to_select(config, int(has_row.sum()))
    if count > len(candidates) * config.max_count:
        raise UserError(f"--num-select {count} is more than the {len(candidates)} samples whose "
                        "gradients are finite. Give a smaller number, or check the checkpoint.")
    here = part.samples[part.finite]
    directions = share.measured.directions
    evidence = Evidence(
        part.rows[part.finite], samples.num_labels[here], samples.dataset_of(here),
        len(samples.prefixes), np.searchsorted(candidates, here),
        sketch_step.read_sketches(share.measured.store, share.measured.valid).rows, directions,
        share.all_reduce_sum)
    with in_terms_of_flags():
        found, cost = treatment.select_by_sketches(config, evidence, count, seed,
                                                   **limits(config, samples, here))
    chosen = candidates[found.indices]
    losses = share.everywhere(np.where(part.finite, part.losses, 0.0))
    not_finite = np.flatnonzero(has_row & ~finite)
    valid = share.measured.valid
    domains = find_domains(config, evidence, np.bincount(found.indices, minlength=len(candidates)),
                           halves_of(valid.samples, valid.numbers), seed)
    return _Solved(SelectionSummary(
        **_in_numbers(config, found, np.tile(cost, config.max_count)),
        num_stiff=directions.num_stiff,
        samples=SampleCounts(len(samples), samples.num_unusable, samples.num_cut,
                             samples.num_cut_tokens, len(not_finite)),
        mean_loss=MeanLoss(float(losses[candidates].mean()), float(losses[chosen].mean())),
        composition=composition(samples, chosen), mask_digests={},
        not_finite=tuple(not_finite.tolist())), candidates, found.indices, domains)


def _in_numbers(config: SelectionConfig, found: Selection, cost: np.ndarray) -> dict:
    """What the solver said, beside the least and the average that K samples cost."""
    count = len(found.indices)
    return {"objective": config.objective, "num_select": count,
            "objective_value": found.objective, "upper_bound": found.upper_bound,
            "status": found.status, "stiff_cost": found.stiff_cost,
            "stiff_budget": found.stiff_budget,
            "least_stiff_cost": float(np.sort(cost)[:count].sum()),
            "average_stiff_cost": float(cost.mean() * count), "history": tuple(found.history)}


def _write(folder: Path, measured: Measured, solved: _Solved,
           decode: Callable[[np.ndarray], str] | None) -> None:
    pool = measured.pool
    masks = masks_of(pool.samples, pool.digests, solved.candidates[solved.indices])
    summary = dataclasses.replace(solved.summary, mask_digests=write_masks(folder, masks))
    counts = np.bincount(solved.indices, minlength=len(solved.candidates))
    made = write_blend(folder, Chosen(pool.samples, solved.candidates, counts, pool.digests,
                                      measured.valid.samples.prefixes, decode), solved.domains)
    summary.write(folder)
    parallel.say(f"{summary}\n{made}")
