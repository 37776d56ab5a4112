"""flat-energy, the paper's: |F w|^2, so b = 0, H = I, scale 2.

A step along the selected mean gradient should move as far as possible in flat directions, in which
the loss barely rises. Convex: its maximum is at a vertex, and no local method certifies it.
"""

from __future__ import annotations

import numpy as np

from megatron_direct.selection.objectives.objective import Objective, Terms
from megatron_direct.selection.objectives.quadratic import Quadratic


def _quadratic(terms: Terms, dim: int, num_select: int) -> Quadratic:
    return Quadratic(np.zeros(dim), 2.0)


FLAT_ENERGY = Objective(
    name="flat-energy", needs=(), needs_budget=True, treats_sketches=False,
    quadratic=_quadratic, terms=lambda settings, evidence, valid_weights: Terms(),
)
