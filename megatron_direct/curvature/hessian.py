"""The Hessian of the validation loss, as an operator: H = d^2 L / d theta^2.

L is the mean loss of all label tokens of the validation samples. H is symmetric and indefinite:
H = J^T H_loss J + sum_t (dL/dz_t) d^2 z_t / d theta^2, the Gauss-Newton matrix and the curvature of
the logits z themselves. Products are exact up to rounding.
"""

from __future__ import annotations

from megatron_direct.curvature.dual import DualOperator


class HessianOperator(DualOperator):
    """Products H v; vectors as in ``curvature.vectors``."""

    with_tangents = True
