"""What an objective says of itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_direct.selection.evidence import Evidence
from megatron_direct.selection.objectives.quadratic import LowRank, Quadratic


class TermSettings(Protocol):
    """What objectives read of a SelectionConfig, whose choices come from their registry."""

    @property
    def flat_subspace(self) -> str: ...

    @property
    def step_size(self) -> float: ...

    @property
    def contrast(self) -> bool: ...

    @property
    def normalize_gradients(self) -> bool: ...


@dataclass(frozen=True, eq=False)
class Terms:
    """What objectives are made of beside the rows, as solve_selection takes it.

    target      [k] mean validation gradient, in the coordinates of the rows
    curvature   H: [k] eigenvalues, [k, k] or LowRank
    step_size   eta
    """

    target: np.ndarray | None = None
    curvature: np.ndarray | LowRank | None = None
    step_size: float | None = None

    @classmethod
    def names(cls) -> list[str]:
        return [f.name for f in dataclasses.fields(cls)]


@dataclass(frozen=True)
class Objective:
    """One way to say which selected sum is best.

    name            of ``--objective`` and solve_selection(objective=...)
    needs           the names of the Terms that it is made of
    needs_budget    whether a stiff budget must be given: False where the objective itself makes
                    stiff directions expensive
    treats_sketches whether it sums up whole sketches, treated (treatment.py), or flat parts
    quadratic       (terms, k, K) -> J; checks the values of its terms
    terms           (settings, evidence, weights [M] of the validation samples, which sum to 1)
                    -> the terms as sketches yield them
    """

    name: str
    needs: tuple[str, ...]
    needs_budget: bool
    treats_sketches: bool
    quadratic: Callable[[Terms, int, int], Quadratic]
    terms: Callable[[TermSettings, Evidence, np.ndarray], Terms]
