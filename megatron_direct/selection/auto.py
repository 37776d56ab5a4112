"""``--num-select auto``: as many samples as their worth and the annealing's length ask for.

Which samples: the objective chooses, without --contrast among those of positive worth alone; where
nothing is clearly better than the whole pool, the selection is the whole pool.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from megatron_direct.errors import UserError
from megatron_direct.selection.config import SelectionConfig
from megatron_direct.selection.evidence import Evidence
from megatron_direct.selection.halves import divide
from megatron_direct.selection.how_many import (
    Gain,
    Values,
    best_selection,
    nested_selections,
    shares_of,
)
from megatron_direct.selection.problem import Selection
from megatron_direct.selection.treatment import CostRange, select_by_sketches
from megatron_direct.selection.worth import (
    Alignments,
    Worth,
    alignments_with_pool,
    cluster_numbers,
    estimate_worth,
    measure_alignments,
)

# Two halves, and a scatter within each.
FEWEST_VALID = 8


@dataclass(frozen=True)
class HowMany:
    """Why so many. Worth is the cosine of a sample's gradient with the validation set's, cross-
    fitted and averaged over tokens; gains are of the value of what the annealing sees
    (how_many.py), both of the num_select samples of greatest worth: which the objective selects is
    another question. repeats_between, repeats_within: reliability of half of the evidence;
    halves: what halves of the validation set are, in words; none where an older version wrote it.
    """

    annealing_tokens: int
    pool_tokens: int
    num_candidates: int
    num_harmful: int
    num_select: int
    worth_of_pool: float
    worth_of_selection: float
    over_pool: Gain
    over_random: Gain
    repeats_between: float
    repeats_within: float
    halves: str = ""

    @property
    def is_whole_pool(self) -> bool:
        return self.num_select == self.num_candidates

    def __str__(self) -> str:
        lines = [
            f"how many: {self.num_harmful} of {self.num_candidates} samples have a worth below 0; "
            f"a token of the pool is worth {self.worth_of_pool:.4f} on average, and the annealing "
            f"sees {self.annealing_tokens / self.pool_tokens:.2f} times the pool's tokens"]
        if self.halves:
            lines.append("  scores from one half of the validation set are judged by the other: "
                         f"{self.halves}")
        if self.is_whole_pool:
            return "\n".join([
                *lines, "  nothing to gain: no smaller selection is clearly worth more than the "
                "whole pool, which is therefore the selection"])
        return "\n".join([
            *lines,
            f"  a token of the {self.num_select} samples of greatest worth is worth "
            f"{self.worth_of_selection:.4f}; with repetition and variety counted, predicted gain "
            f"over the whole pool {_in_words(self.over_pool)}, over as many samples at random "
            f"{_in_words(self.over_random)} (99.9 % intervals)"])


def _in_words(gain: Gain) -> str:
    return f"{gain.mean:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]"


def require_valid(num_samples: int) -> None:
    """Raises UserError for a validation set of too few samples to be divided."""
    if num_samples < FEWEST_VALID:
        raise UserError(
            f"--num-select auto judges scores from one half of the validation set by the other: "
            f"{num_samples} samples are too few for that, it takes {FEWEST_VALID}. "
            "Give more validation data, or a number of samples to select.")


def worth_of(config: SelectionConfig, evidence: Evidence, seed: int) -> Worth:
    """Of all candidates, the same on every rank; all ranks call this.

    Raises UserError if the validation set is too small to be divided.
    """
    require_valid(len(evidence.valid_rows))
    return evidence.once(("worth", config.shrinkage_clusters, seed), lambda: _worth_by(
        config, evidence, measure_alignments(evidence, seed), seed))


def _worth_by(config: SelectionConfig, evidence: Evidence, alignments: Alignments, seed: int,
              ) -> Worth:
    return estimate_worth(alignments, cluster_numbers(config, evidence, seed),
                          evidence.share().known_to_all(evidence.labels))


def _worth_chosen_by(config: SelectionConfig, evidence: Evidence, worth: Worth, seed: int,
                     ) -> Worth:
    """By what the objective chooses: in contrast, the excess over the pool."""
    if not config.is_in_contrast:
        return worth
    return _worth_by(config, evidence, measure_alignments(evidence, seed).in_excess_of(
        alignments_with_pool(evidence, seed)), seed)


@dataclass(frozen=True, eq=False)
class Settled:
    """values: of the selections that are looked at; best: the number of the one that is taken;
    chosen_by: the worth by what the objective chooses by."""

    values: Values
    best: int
    chosen_by: Worth

    @property
    def num_select(self) -> int:
        return int(self.values.found.counts[self.best])


def settle(config: SelectionConfig, evidence: Evidence, worth: Worth, annealing_tokens: int,
           seed: int) -> Settled:
    """How many samples; all ranks call this."""
    chosen_by, shares = _worth_chosen_by(config, evidence, worth, seed), shares_of(worth)
    values = Values.of(nested_selections(worth, shares), annealing_tokens)
    return Settled(values, best_selection(values, nested_selections(chosen_by, shares)), chosen_by)


def select_auto(config: SelectionConfig, evidence: Evidence, worth: Worth, seed: int,
                ) -> tuple[Selection, CostRange, HowMany]:
    """(selection, what so many of all samples cost, why so many); all ranks call this."""
    pool_tokens = int(worth.weights.sum())
    annealing_tokens = config.anneal_tokens or pool_tokens
    settled = settle(config, evidence, worth, annealing_tokens, seed)
    values, best = settled.values, settled.best
    found, count = values.found, settled.num_select
    # Where the pool's own direction is taken out, what harms is the last to be chosen anyway.
    allowed = worth.values > 0
    if config.is_in_contrast or count > allowed.sum():
        allowed = np.ones(len(allowed), dtype=bool)
    if count == len(allowed):  # the whole pool is each sample once
        config = dataclasses.replace(config, max_count=1)
    selection, _ = select_by_sketches(config, evidence.of(allowed), count, seed)
    selection = dataclasses.replace(selection,
                                    indices=np.flatnonzero(allowed)[selection.indices])
    costs = evidence.share().from_leader(
        lambda whole: CostRange.of(np.tile(whole, config.max_count), count),
        evidence.stiff_costs())
    return selection, costs, HowMany(
        annealing_tokens=annealing_tokens, pool_tokens=pool_tokens,
        num_candidates=len(allowed), num_harmful=int((worth.values < 0).sum()),
        num_select=count, worth_of_pool=float(found.worth[-1]),
        worth_of_selection=float(found.worth[best]), over_pool=values.over_pool(best),
        over_random=values.over_random(best), repeats_between=settled.chosen_by.reliability.between,
        repeats_within=settled.chosen_by.reliability.within,
        halves=str(divide(evidence)))
