"""Which K samples to select: problem, exact subproblems, solver."""

from megatron_direct.selection.problem import InfeasibleSelection, Selection, stiff_budget
from megatron_direct.selection.solver import solve_selection

__all__ = ["InfeasibleSelection", "Selection", "solve_selection", "stiff_budget"]
