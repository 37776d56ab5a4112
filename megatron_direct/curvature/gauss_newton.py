"""The generalised Gauss-Newton matrix of the validation loss, as an operator: G = J^T H_loss J.

J is the derivative of all logits with respect to the parameters, H_loss the Hessian of the mean
token loss with respect to the logits (softmax and cross entropy: positive semi-definite, and so is
G). Products are exact up to rounding: J v by forward mode, J^T by reverse mode (Schraudolph, "Fast
curvature matrix-vector products for second-order gradient descent", Neural Computation 14, 2002).
"""

from __future__ import annotations

from megatron_direct.curvature.dual import DualOperator


class GaussNewtonOperator(DualOperator):
    """Products G v; vectors as in ``curvature.vectors``."""

    with_tangents = False
