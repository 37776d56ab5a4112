"""Is an operator symmetric, and if not, which layers are likely to blame?

A product that is wrong without an error is usually not symmetric: some function's derivative
lacks a term. For random u and v, <u, H v> and <v, H u> must agree to rounding; with u restricted to
the parameters of one kind of layer, the disagreement points to the layers where it arises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from megatron_direct.curvature.vectors import ParameterSpace
from megatron_direct.errors import UserError

# Rounding of an exact product lies below 100 units (5e-6 in single precision was measured); a
# missing term shows at 1e-2 and above.
TOLERANCE_IN_UNITS = 1000.0

# (kind, mark of its parameters' names); the first that fits. A norm is named after the layer that
# it comes before.
_KINDS = (
    ("norms", "norm"),
    ("embeddings", "embedding."),
    ("attention", "self_attention."),
    ("MLP", "mlp."),
    ("the output layer", "output_layer."),
    ("other layers", ""),
)


def check_symmetry(matvec: Callable[[torch.Tensor], torch.Tensor], space: ParameterSpace, *,
                   seed: int = 0) -> float:
    """The largest |<u, H v> - <v, H u>| / (||u|| ||H v||) seen, u restricted to a kind of layer.

    Takes one product, and one more for each kind of layer in the model. Raises UserError where it
    is more than rounding, naming the kind of layer at which it is largest.
    """
    v = space.random_signs(seed)
    product = matvec(v)
    size = max(space.dot(product, product), torch.finfo(torch.float64).tiny) ** 0.5
    asymmetry = {}
    for kind, u in _restricted(space, space.random_signs(seed + 1)):
        difference = abs(space.dot(u, product) - space.dot(v, matvec(u)))
        asymmetry[kind] = difference / (space.dot(u, u) ** 0.5 * size)
    worst = max(asymmetry, key=lambda kind: asymmetry[kind])
    accepted = TOLERANCE_IN_UNITS * torch.finfo(space.dtype).eps
    if not asymmetry[worst] <= accepted:
        raise UserError(
            f"the curvature operator is not symmetric: <u, H v> and <v, H u> differ by "
            f"{asymmetry[worst]:.1e} of ||u|| ||H v||, but rounding explains only {accepted:.1e}. "
            f"The difference is largest for {worst}: a function of these layers is probably "
            "differentiated wrongly. Build the model for curvature from Megatron's local layer "
            "spec, or use --curvature fisher.")
    return asymmetry[worst]


def _restricted(space: ParameterSpace, vector: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """(kind of layer, the vector with zeros everywhere else), for the kinds the model has."""
    for kind, _ in _KINDS:
        parts = [part if _kind(shard.name) == kind else torch.zeros_like(part)
                 for shard, part in zip(space.shards, space.split(vector), strict=True)]
        restricted = space.join(parts)
        if space.dot(restricted, restricted) > 0:  # summed over ranks: all go on, or none
            yield kind, restricted


def _kind(name: str) -> str:
    return next(kind for kind, mark in _KINDS if mark in name)
