"""Quotas: least and greatest numbers of selected samples of a group.

Shapes: N samples, G groups of which the last is that of all samples without a quota.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral

import numpy as np

from megatron_direct.selection.infeasible import InfeasibleQuotas
from megatron_direct.selection.share import Share


@dataclass(frozen=True, eq=False)
class Quotas:
    """codes: [N] the group of each sample in 0..G-1, in the least integers that hold it; bounds:
    [G, 2] least and greatest counts."""

    codes: np.ndarray
    bounds: np.ndarray

    @cached_property
    def members(self) -> list[np.ndarray]:
        """The ascending ids of each group's samples."""
        return [np.flatnonzero(self.codes == code) for code in range(len(self.bounds))]

    def counts(self, mask: np.ndarray) -> np.ndarray:
        """[G] selected samples of each group, for a selection [N] bool."""
        return np.bincount(self.codes[mask], minlength=len(self.bounds))

    def admit(self, mask: np.ndarray) -> bool:
        """Whether a selection [N] bool keeps the quotas."""
        counts = self.counts(mask)
        return bool(np.all((self.bounds[:, 0] <= counts) & (counts <= self.bounds[:, 1])))


@dataclass(frozen=True, eq=False)
class StatedQuotas:
    """Quotas as solve_selection is given them. codes: [N] the group of each sample, in the order of
    ``labels``, and then that of samples without a quota; None on ranks that do not lead."""

    labels: list
    limits: list[tuple[int, int]]
    codes: np.ndarray | None

    def of_selections(self, num_select: int, copies: int = 1) -> Quotas:
        """The quotas of K samples, each of which stands among the candidates so many times; the
        leader calls this. Raises InfeasibleQuotas if no K samples keep them."""
        assert self.codes is not None
        codes = np.tile(self.codes, copies)
        return Quotas(codes, _bounds(codes, self.labels, self.limits, num_select))


def state_quotas(
    groups: Sequence | np.ndarray | None, quotas: Mapping | None, share: Share
) -> StatedQuotas | None:
    """What solve_selection is given, or None where there are none; all ranks call this.

    ``groups`` [n] are the labels of this rank's samples; ``quotas``: label -> (least, greatest).
    """
    if quotas is None and groups is None:
        return None
    if not quotas or groups is None:
        raise ValueError(
            "quotas need both: groups (a label per sample) and quotas "
            "(a mapping of label to (least, greatest)); give both, or neither"
        )
    labels = np.asarray(groups)
    if labels.shape != share.ids.shape:
        raise ValueError(
            f"groups must have shape {share.ids.shape}, found {labels.shape}; give a label per "
            "column of flat"
        )
    limits = [_checked_limits(label, limit) for label, limit in quotas.items()]
    # Numbered in the order of the quotas, so that ranks, which may each lack some group, agree.
    kind = np.min_scalar_type(len(quotas))
    codes = np.full(len(labels), len(quotas), dtype=kind)
    for code, label in enumerate(quotas):
        codes[labels == label] = code
    of_all = share.gathered(codes)
    return StatedQuotas(list(quotas), limits, None if of_all is None else of_all.astype(kind))


def _checked_limits(label: object, limits: tuple[int, int]) -> tuple[int, int]:
    is_pair = isinstance(limits, Sequence | np.ndarray) and len(limits) == 2
    if not is_pair or not all(isinstance(limit, Integral) for limit in limits):
        raise ValueError(
            f"the quota of group {label!r} must be two integers (least, greatest), found {limits!r}"
        )
    least, greatest = limits
    if not 0 <= least <= greatest:
        raise InfeasibleQuotas(
            f"the quota of group {label!r} must be 0 <= least <= greatest, "
            f"found ({least}, {greatest}); lower the least or raise the greatest"
        )
    return int(least), int(greatest)


def _bounds(
    codes: np.ndarray, labels: list, limits: list[tuple[int, int]], num_select: int
) -> np.ndarray:
    """[G, 2] least and greatest counts, the latter at most the groups' sizes."""
    sizes = np.bincount(codes, minlength=len(limits) + 1)
    for label, (least, _), size in zip(labels, limits, sizes, strict=False):
        if least > size:
            raise InfeasibleQuotas(
                f"group {label!r} has {size} samples, but its quota asks for at least {least}; "
                "lower it, or give more samples of the group"
            )
    bounds = np.array([*limits, (0, sizes[-1])])
    bounds[:, 1] = np.minimum(bounds[:, 1], sizes)
    least, greatest = bounds.sum(axis=0)
    if not least <= num_select <= greatest:
        reach = ", ".join(
            f"{label!r}: {low} to {high}"
            for label, (low, high) in zip(labels, bounds, strict=False)
        )
        raise InfeasibleQuotas(
            f"the quotas admit from {least} to {greatest} samples, but num_select is {num_select} "
            f"({reach}, samples of other groups: 0 to {sizes[-1]}); change either"
        )
    return bounds
