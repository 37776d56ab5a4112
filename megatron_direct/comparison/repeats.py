"""How much of an arm's choice would be made again.

The arm chooses twice more, each time from half of the validation set, of each sketch's coordinates
and of the n-grams of texts, and with a seed of its own, so that the two choices share neither
validation samples nor hashes. What both take is a choice; the rest is chance.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from megatron_direct.comparison.arms import Arm, Case
from megatron_direct.selection.auto import FEWEST_VALID
from megatron_direct.selection.evidence import Evidence
from megatron_direct.selection.problem import Selection
from megatron_direct.selection.worth import halves_of

# Of what an arm needs: what does not depend on halves of the validation set and of the hashes.
_ALWAYS_THE_SAME = {"losses", "ceiling"}


@dataclass(frozen=True)
class Repeats:
    """samples: share of one half's choice that the other half makes, too; by_chance: what two
    selections of that size at random share."""

    samples: float
    by_chance: float


class _HalfCase(Case):
    """Of which nothing is drawn for what does not repeat: that would repeat with the seed."""

    def select(self, evidence: Evidence, **settings) -> Selection:
        return self.solve(evidence, **settings)


def repeats_of(arm: Arm, case: Case, num_chosen: int) -> Repeats | None:
    """None for an arm that takes everything, or that asks neither sketches nor validation set."""
    num_samples = len(case.losses)
    if num_chosen >= num_samples or not set(arm.needs) - _ALWAYS_THE_SAME \
            or len(case.valid_labels) < 2 * FEWEST_VALID:
        return None
    first, second = (arm.take(half)[0] for half in _halves(case, num_chosen))
    return Repeats(len(np.intersect1d(first, second)) / num_chosen, num_chosen / num_samples)


def _halves(case: Case, num_select: int) -> list[_HalfCase]:
    fields = {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
    return [_HalfCase(**{
        **fields, "num_select": num_select, "seed": case.seed + number,
        "evidence": {name: evidence.half(part) for name, evidence in case.evidence.items()},
        "valid_domains": case.valid_domains[part.valid],
        "valid_labels": case.valid_labels[part.valid]})
        for number, part in enumerate(halves_of(case.evidence["onset"], case.seed))]
