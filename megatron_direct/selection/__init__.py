"""Which K samples to select: problem, exact subproblems, solver."""

from megatron_direct.selection.budget import stiff_budget
from megatron_direct.selection.infeasible import InfeasibleQuotas, InfeasibleSelection
from megatron_direct.selection.objectives.quadratic import LowRank
from megatron_direct.selection.problem import Selection
from megatron_direct.selection.solver import solve_selection

__all__ = [
    "InfeasibleQuotas",
    "InfeasibleSelection",
    "LowRank",
    "Selection",
    "solve_selection",
    "stiff_budget",
]
