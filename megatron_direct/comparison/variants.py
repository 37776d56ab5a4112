"""The default of ``select`` with one of its decisions taken otherwise, an arm each: what the
comparison says of them is what the default rests on."""

from __future__ import annotations

import dataclasses

from megatron_direct.comparison.arms import REGISTRY, Case, arm
from megatron_direct.selection.problem import Selection

# What the mean validation gradient itself says: the default before --contrast.
_PLAIN = {"contrast": False, "weight_by_tokens": True}


@arm("direct-pilot", "direct with gradients and directions after a pilot annealing (--pilot-iters "
     "20, if the flags name no other)", ("pilot",))
def _after_a_pilot(case: Case) -> Selection:
    return case.select(case.evidence["pilot"])


@arm("direct-plain", "direct by the mean validation gradient itself, samples weighted by tokens "
     "(--no-contrast --weight-by-tokens)", ("select",))
def _plain(case: Case) -> Selection:
    return case.select(case.evidence["select"], **_PLAIN)


@arm("direct-plain-pilot", "direct-plain after a pilot annealing", ("pilot",))
def _plain_after_a_pilot(case: Case) -> Selection:
    return case.select(case.evidence["pilot"], **_PLAIN)


@arm("direct-ungrouped", "direct for the mean of the validation set alone, whatever part of it is "
     "left behind (--valid-clusters 0)", ("select",))
def _ungrouped(case: Case) -> Selection:
    return case.select(case.evidence["select"], valid_clusters=0)


@arm("direct-textless", "direct by gradients alone (--text-weight 0)", ("select",))
def _textless(case: Case) -> Selection:
    return case.select(case.evidence["select"], text_weight=0.0)


@arm("direct-merged", "direct with gradients at the average of the training's last states "
     "(--at merged)", ("merged",))
def _at_the_average(case: Case) -> Selection:
    return case.select(case.evidence["merged"])


@arm("direct-unshrunk", "direct without shrinkage towards clusters", ("select",))
def _unshrunk(case: Case) -> Selection:
    return case.select(case.evidence["select"], shrinkage_clusters=0)


@arm("direct-unnormalized", "direct with gradients of the length that they have "
     "(--no-normalize-gradients)", ("select",))
def _unnormalized(case: Case) -> Selection:
    return case.select(case.evidence["select"], normalize_gradients=False)


@arm("direct-undrawn", "direct with the samples that it prefers, also where another half of the "
     "evidence prefers others (--no-draw-unstable)", ("select",))
def _undrawn(case: Case) -> Selection:
    return case.select(case.evidence["select"], draw_unstable=False)


@arm("direct-quarter", "direct with a quarter of the pool", ("select",))
def _quarter(case: Case) -> Selection:
    return _of_share(case, 1 / 4)


@arm("direct-half", "direct with half of the pool", ("select",))
def _half(case: Case) -> Selection:
    return _of_share(case, 1 / 2)


# Of which the first is what direct selects.
REGISTRY["direct-rounds"] = dataclasses.replace(
    REGISTRY["direct"], name="direct-rounds", rounds=2,
    description="direct, selected anew in the middle of the annealing (alternate --rounds 2)")


def _of_share(case: Case, share: float) -> Selection:
    count = max(1, round(share * len(case.losses)))
    return case.select(case.evidence["select"], num_select=count)
