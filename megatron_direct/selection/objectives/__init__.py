"""The registry of objectives: what a selection maximises, and what it has to know for that.

Objectives are quadratics of the selected sum s = F w (quadratic.py), one in each file of this
folder. A new one is a new file, whose constant is imported and listed here; the flag
``--objective`` and ``solve_selection`` take their names from this list.
"""

from __future__ import annotations

from megatron_direct.selection.objectives.alignment import ALIGNMENT
from megatron_direct.selection.objectives.descent import DESCENT
from megatron_direct.selection.objectives.flat_energy import FLAT_ENERGY
from megatron_direct.selection.objectives.objective import Objective, Terms
from megatron_direct.selection.objectives.quadratic import Quadratic

OBJECTIVES: dict[str, Objective] = {
    objective.name: objective for objective in (FLAT_ENERGY, ALIGNMENT, DESCENT)
}


def find_objective(name: str) -> Objective:
    """The objective of this name; a ValueError lists the names there are."""
    if name not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, found {name!r}")
    return OBJECTIVES[name]


def make_objective(name: str, terms: Terms, dim: int, num_select: int) -> Quadratic:
    """J in k = ``dim`` coordinates; a ValueError for terms that are missing, or not used."""
    objective = find_objective(name)
    for term in terms.names():
        given, needed = getattr(terms, term) is not None, term in objective.needs
        if given != needed:
            verb, remedy = ("needs", "give it") if needed else ("does not use", "leave it out")
            raise ValueError(f"objective {name!r} {verb} {term}; {remedy}")
    return objective.quadratic(terms, dim, num_select)
