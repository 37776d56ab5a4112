"""How much of an arm's choice would be made again.

The arm chooses twice more, each time from half of the validation set, of each sketch's coordinates
and of the n-grams of texts, and with a seed of its own, so that the two choices share neither
validation samples nor coordinates. The coordinates are those of one sketch, whose halves hold
different entries of the gradient: no second hash of the same entries is drawn. What both take is a
choice; the rest is chance.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from megatron_direct.comparison.arms import Arm, Case
from megatron_direct.selection import InfeasibleQuotas, InfeasibleSelection
from megatron_direct.selection.auto import FEWEST_VALID
from megatron_direct.selection.evidence import Evidence, Half
from megatron_direct.selection.halves import halves_of
from megatron_direct.selection.problem import Selection

# Of what an arm needs: what does not depend on halves of the validation set and of the sketch.
_ALWAYS_THE_SAME = {"losses", "ceiling"}


@dataclass(frozen=True)
class Repeats:
    """samples: share of one choice that another one makes, too, copies counted; by_chance: what two
    selections of that size at random share."""

    samples: float
    by_chance: float


class _HalfCase(Case):
    """Of which nothing is drawn for what does not repeat: that would repeat with the seed."""

    def select(self, evidence: Evidence, **settings) -> Selection:
        return self.solve(evidence, **settings)


def repeats_of(arm: Arm, case: Case, num_chosen: int) -> Repeats | None:
    """None for an arm that takes everything, or that asks neither sketches nor validation set, and
    where by half of what is known nothing keeps the budget and the quotas."""
    num_samples = len(case.losses)
    if num_chosen >= num_samples or not set(arm.needs) - _ALWAYS_THE_SAME \
            or len(case.valid_labels) < 2 * FEWEST_VALID:
        return None
    used = {"onset", *arm.needs, *({"select"} if "share" in arm.needs else ())}
    whole = dataclasses.replace(case, num_select=num_chosen, evidence={
        name: evidence for name, evidence in case.evidence.items() if name in used})
    halves = halves_of(case.evidence["onset"], case.seed)
    if min(half.valid.sum() for half in halves) < FEWEST_VALID:  # by sources of unequal size
        return None
    try:
        # One half is made after the other was used: each is as large as half of all rows.
        first, second = (
            np.bincount(arm.take(_half(whole, part, number))[0], minlength=num_samples)
            for number, part in enumerate(halves))
    except (InfeasibleSelection, InfeasibleQuotas):
        return None
    return Repeats(int(np.minimum(first, second).sum()) / num_chosen,
                   _shared_by_chance(first, second) / num_chosen)


def _half(case: Case, part: Half, number: int) -> _HalfCase:
    fields = {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
    return _HalfCase(**{
        **fields, "seed": case.seed + number,
        "evidence": {name: evidence.half(part) for name, evidence in case.evidence.items()},
        "valid_domains": case.valid_domains[part.valid],
        "valid_labels": case.valid_labels[part.valid]})


def _shared_by_chance(first: np.ndarray, second: np.ndarray) -> float:
    """What two choices, given by how often they take each of the N samples, are expected to share
    if each is of samples at random: a copy is the t-th of its sample, for t = 1, 2, ..."""
    most = min(first.max(), second.max())
    return sum(int((first >= t).sum()) * int((second >= t).sum())
               for t in range(1, most + 1)) / len(first)
