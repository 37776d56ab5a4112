"""The selection problem, solved on rank 0 or over all ranks, and the masks it yields."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from megatron_direct.data.mask import SampleMask
from megatron_direct.data.ngram_hashes import BYTES_OF_TEXT
from megatron_direct.data.ngram_likeness import Texts
from megatron_direct.data.token_features import TokenSource
from megatron_direct.gradients.store import Sketches
from megatron_direct.runtime import attendance, parallel
from megatron_direct.selection.auto import worth_of
from megatron_direct.selection.choice import Choice, choose
from megatron_direct.selection.config import SelectionConfig
from megatron_direct.selection.evidence import Evidence
from megatron_direct.selection.problem import Selection
from megatron_direct.selection.treatment import CostRange
from megatron_direct.selection.worth import Worth
from megatron_direct.steps import sketch as sketch_step
from megatron_direct.steps.domains import Chosen, FoundGroups, find_domains, write_blend
from megatron_direct.steps.draw import find_draw
from megatron_direct.steps.extend import SolvedShare, is_share, problem_of_share
from megatron_direct.steps.measure import Measured
from megatron_direct.steps.selected import (
    MeanLoss,
    SampleCounts,
    SelectionSummary,
    composition,
    masks_of,
    write_masks,
)
from megatron_direct.steps.selection_request import (
    check_finite,
    check_number,
    in_terms_of_flags,
    limits,
)


def solve_and_write(config: SelectionConfig, measured: Measured, seed: int, folder: Path, *,
                    begin: Callable[[Mapping[str, SampleMask]], object],
                    decode: Callable[[np.ndarray], str] | None = None) -> None:
    """Writes ``selection.json``, ``masks/``, ``drawn/`` and ``blend/`` into ``folder``; all ranks
    call this.

    begin: on rank 0, with the masks of the selection that is to be written: until it returns an
    earlier one in ``folder`` is left alone. decode: of tokens into text, on rank 0, if there is a
    tokenizer.

    Raises NothingFits, on all ranks, if no K samples keep the budget and the quotas.
    """
    attendance.at("selection problem")
    problem = problem_of_share(config, measured)

    def write(solved: _Solved) -> None:
        _write(folder, _Run(config, measured, seed, decode), solved, begin)

    if parallel.on_rank_zero(lambda: _is_spread(config, measured)):
        rank, size = parallel.rank_and_size()
        share = _Part(measured, sketch_step.read_sketches(
            measured.store, measured.pool, rank, size), parallel.sum_over_world, rank, size)
        solved = _solve(problem, share, seed)
        parallel.on_rank_zero(lambda: write(solved))
        return

    def alone() -> None:
        share = _Part(measured, sketch_step.read_sketches(measured.store, measured.pool))
        write(_solve(problem, share, seed))

    parallel.on_rank_zero(alone)


def _is_spread(config: SelectionConfig, measured: Measured) -> bool:
    if config.sketch_rows != "auto":
        return config.sketch_rows == "spread"
    # The rows, those that are finite, two copies for the solver's and the clusters' sake; texts.
    pool = measured.pool
    texts = BYTES_OF_TEXT * int(pool.samples.num_labels[pool.numbers].sum(dtype=np.int64)) \
        if config.counts_texts else 0
    needed = 4 * measured.store.num_bytes(len(pool.numbers)) + texts
    return needed > psutil.virtual_memory().available


@dataclass(frozen=True)
class _Part:
    """This rank's part of the rows of the pool: a stretch of its samples, after that of the rank
    before."""

    measured: Measured
    part: Sketches
    all_reduce_sum: Callable[[np.ndarray], np.ndarray] = lambda array: array
    rank: int = 0
    size: int = 1

    def joined(self, values: np.ndarray) -> np.ndarray:
        """All ranks' values, one rank's after the other's."""
        counts = np.zeros(self.size)
        counts[self.rank] = len(values)
        ends = np.concatenate([[0], np.cumsum(self.all_reduce_sum(counts))]).astype(np.int64)
        whole = np.zeros(ends[-1])
        whole[ends[self.rank]: ends[self.rank + 1]] = values
        return self.all_reduce_sum(whole)

    def total(self, count: int) -> int:
        return int(self.all_reduce_sum(np.array([float(count)]))[0])

    def begins_at(self, count: int) -> int:
        """How many the ranks before this one have, each of which gives its count."""
        counts = np.zeros(self.size)
        counts[self.rank] = count
        return int(self.all_reduce_sum(counts)[: self.rank].sum())


@dataclass(frozen=True)
class _Run:
    """What was asked, and of what. decode: of tokens into text, if there is a tokenizer."""

    config: SelectionConfig
    measured: Measured
    seed: int
    decode: Callable[[np.ndarray], str] | None


@dataclass(frozen=True)
class _Solved:
    """choice, domains: among the samples that are not of not_finite [.], their numbers; worth: of
    these, where the selection is to be extended to others."""

    choice: Choice
    not_finite: np.ndarray
    mean_loss: MeanLoss
    domains: FoundGroups
    worth: Worth | None


def _solve(config: SelectionConfig, here: _Part, seed: int) -> _Solved:
    samples, part, finite = here.measured.pool.samples, here.part, here.part.finite
    not_finite = here.joined(part.samples[~finite]).astype(np.int64)
    num_rows = here.total(len(part.samples))
    check_number(config, num_rows)
    num_finite = num_rows - len(not_finite)
    check_finite(config, num_finite)
    numbers = part.samples[finite]
    evidence = _evidence(here, numbers)
    with in_terms_of_flags():
        choice = choose(config, evidence, seed, limits(config, samples, numbers))
    mean_loss = evidence.share().from_leader(
        lambda of_all: _mean_loss(of_all, choice.selection), part.losses[finite])
    counts = np.bincount(choice.selection.indices, minlength=num_finite)
    worth = worth_of(config, evidence, seed) if is_share(here.measured) else None
    return _Solved(choice, not_finite, mean_loss,
                   find_domains(config, evidence, counts, seed), worth)


def _evidence(here: _Part, numbers: np.ndarray) -> Evidence:
    """Of this rank's part of the candidates, whose gradients are finite."""
    samples, part, valid = here.measured.pool.samples, here.part, here.measured.valid
    valid_sketches = sketch_step.read_sketches(here.measured.store, valid)
    return Evidence(
        part.rows if part.finite.all() else part.rows[part.finite], samples.num_labels[numbers],
        samples.dataset_of(numbers), len(samples.prefixes),
        here.begins_at(len(numbers)) + np.arange(len(numbers)), valid_sketches.rows,
        here.measured.directions, here.all_reduce_sum,
        valid.samples.dataset_of(valid_sketches.samples),
        valid.samples.sources_of(valid_sketches.samples),
        Texts.read_from(TokenSource(samples, numbers),
                        TokenSource(valid.samples, valid_sketches.samples)))


def _mean_loss(losses: np.ndarray, found: Selection) -> MeanLoss:
    return MeanLoss(float(losses.mean()), float(losses[found.indices].mean()))


def _in_numbers(config: SelectionConfig, found: Selection, cost: CostRange) -> dict:
    """What the solver said, beside the least and the average that K samples cost."""
    return {"objective": config.objective, "num_select": len(found.indices),
            "objective_value": found.objective, "upper_bound": found.upper_bound,
            "status": found.status, "stiff_cost": found.stiff_cost,
            "stiff_budget": found.stiff_budget, "least_stiff_cost": cost.least,
            "average_stiff_cost": cost.average, "history": tuple(found.history)}


def _write(folder: Path, run: _Run, solved: _Solved,
           begin: Callable[[Mapping[str, SampleMask]], object]) -> None:
    """Rank 0 alone: it takes vectors over all samples, and the indexes of all pools."""
    pool, not_finite = run.measured.pool, solved.not_finite
    samples, indices = pool.samples, solved.choice.selection.indices
    candidates = np.setdiff1d(pool.numbers, not_finite, assume_unique=True) \
        if len(not_finite) else pool.numbers
    counts, domains = np.bincount(indices, minlength=len(candidates)), solved.domains
    numbers, distilled = _in_numbers(run.config, solved.choice.selection, solved.choice.costs), None
    repeating = solved.choice.repeating
    drawn = None if repeating is None else find_draw(samples, candidates, counts > 0, repeating)
    if solved.worth is not None:
        extended = SolvedShare(candidates, counts > 0, not_finite, solved.worth, domains).extend(
            run.config, run.measured, run.seed)
        if drawn is not None:
            drawn = drawn.with_predicted(np.setdiff1d(
                extended.candidates[extended.counts > 0], candidates, assume_unique=True))
        candidates, counts, domains = extended.candidates, extended.counts, extended.domains
        distilled = extended.distilled
        numbers["num_select"] = distilled.num_select
    chosen = np.repeat(candidates, counts)
    masks = masks_of(samples, pool.digests, chosen)
    begin(masks)
    for name in ("masks", "drawn", "blend"):  # of an earlier one: of more pools or clusters
        shutil.rmtree(folder / name, ignore_errors=True)
    if drawn is not None:
        write_masks(folder, masks_of(samples, pool.digests, drawn.numbers), "drawn")
    summary = SelectionSummary(
        **numbers, num_stiff=run.measured.directions.num_stiff,
        samples=SampleCounts(len(samples), samples.num_unusable, samples.cut.samples,
                             samples.cut.tokens, len(not_finite)),
        mean_loss=solved.mean_loss, composition=composition(samples, chosen),
        mask_digests=write_masks(folder, masks), not_finite=tuple(not_finite.tolist()),
        how_many=solved.choice.how_many, stability=solved.choice.stability, distilled=distilled,
        draw=None if drawn is None else drawn.draw)
    made = write_blend(folder, Chosen(samples, candidates, counts, pool.digests,
                                      run.measured.valid.samples.prefixes, run.decode), domains)
    summary.write(folder)
    parallel.say(f"{summary}\n{made}")
