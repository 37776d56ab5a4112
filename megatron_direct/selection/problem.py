"""What is asked and what is answered: the selection problem, and its result.

Notation, used in every file of this folder:

    N  samples, k  sketch coordinates, K  samples to select
    F  [k, N]   column i is f_i, the flat part of sample i's sketch; its transpose are the *rows*
    a  [N]      stiff costs, a_i >= 0;  tau  the stiff budget
    w  [N]      weights;  s = F w  [k]  the selected sum

    maximise J(F w)   over   W = { 0 <= w <= 1,  sum w = K,  a.w <= tau,  quotas }

with w in {0, 1} for a selection, and in [0, 1] for its relaxation. Where a sample may be selected
M times, it stands among the candidates M times, with one and the same row; N then counts copies.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from megatron_direct.selection.feasible import FeasibleSet
from megatron_direct.selection.objectives.quadratic import Quadratic
from megatron_direct.selection.rows import Rows


@dataclass(frozen=True, eq=False)
class Problem:
    """Maximise the quadratic J of F w over the feasible set W.

    ``self_terms`` [N] are what J's second order makes of each row alone (Quadratic.self_terms);
    they guide which exchanges are looked at.
    """

    rows: Rows
    feasible: FeasibleSet
    quadratic: Quadratic
    self_terms: np.ndarray


@dataclass(frozen=True)
class Selection:
    """A selection, what it attains, and what no selection can exceed.

    indices       int64 [K], ascending sample ids, each as often as it is selected
    objective     value of the selection; larger is better for every objective
    stiff_cost    sum of the selected costs, correctly rounded
    stiff_budget  the budget it was held to, or None where there was none
    status        "optimal": objective equals upper_bound, but for rounding in products;
                  "converged": no move that was tried improves it (and, for a concave objective,
                  the relaxation was solved to its tolerance);
                  "iteration-limit": stopped before that
    upper_bound   no feasible weights, fractional ones included, exceed this; None if not asked for
    history       the steps of the solve in order, each a dict of plain numbers and strings
    """

    indices: np.ndarray
    objective: float
    stiff_cost: float
    stiff_budget: float | None
    status: str
    upper_bound: float | None
    history: list[dict] = field(default_factory=list)
