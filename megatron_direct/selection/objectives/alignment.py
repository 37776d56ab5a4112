"""alignment: g_val.F w, so b = g_val, scale 0.

A step -eta u with u = F w / K changes the validation loss by -eta <g_val, u> to first order; the
scale is dropped. ``target`` is the flat part of the mean validation gradient. Linear.
"""

from __future__ import annotations

import numpy as np

from megatron_direct.selection.checks import checked_vector
from megatron_direct.selection.evidence import Evidence, flat_rows, mean_gradient
from megatron_direct.selection.objectives.objective import Objective, Terms, TermSettings
from megatron_direct.selection.objectives.quadratic import Quadratic


def _quadratic(terms: Terms, dim: int, num_select: int) -> Quadratic:
    return Quadratic(checked_vector("target", terms.target, dim), 0.0)


def _terms(settings: TermSettings, evidence: Evidence, valid_weights: np.ndarray) -> Terms:
    mean = mean_gradient(evidence.valid_rows, valid_weights, unit=False)
    return Terms(target=flat_rows(mean[None], evidence.directions, settings.flat_subspace)[0])


ALIGNMENT = Objective(
    name="alignment", needs=("target",), needs_budget=True, treats_sketches=False,
    quadratic=_quadratic, terms=_terms,
)
