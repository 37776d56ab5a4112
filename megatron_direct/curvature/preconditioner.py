"""The diagonal scaling by Adam's second moments.

Adam divides a gradient by sqrt(v) + eps, so that the inner product it cares for is
g^T diag(sqrt(v) + eps)^(-1) g'. With either factor multiplied by d = (sqrt(v) + eps)^(-1/2) it is
an ordinary one, and so sketches, projections and the curvature D H D need no other change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from megatron_direct.curvature.vectors import ParameterSpace
from megatron_direct.mcore.checkpoint import load_second_moments
from megatron_direct.mcore.shards import ParameterShard


def adam_scales(checkpoint: Path, chunks: Sequence[torch.nn.Module],
                shards: Sequence[ParameterShard], eps: float) -> dict[str, torch.Tensor]:
    """By shard name, d in the parameter's shape, in float32; all ranks call this.

    Read at any layout. Without Adam's eps the stale moments of what is seldom seen would give the
    largest scales. Where Adam has seen no gradient (v = 0) there is no scale to tell, and d is
    0: such entries, rows of tokens that never occurred, count for nothing. The constant of Adam's
    bias correction is left out; it would multiply all scales alike.
    """
    moments = load_second_moments(checkpoint, chunks, shards)
    return {name: torch.where(v > 0, (v.sqrt() + eps).rsqrt(), 0.0) for name, v in moments.items()}


class PreconditionedOperator:
    """D H D for an operator H and the diagonal D of ``scales``; vectors of a ParameterSpace."""

    def __init__(self, operator, space: ParameterSpace, scales: Mapping[str, torch.Tensor]):
        self._operator = operator
        self._diagonal = space.join([scales[shard.name] for shard in space.shards]).to(space.dtype)

    def __getattr__(self, name: str):
        return getattr(self._operator, name)

    def matvec(self, vector: torch.Tensor) -> torch.Tensor:
        return self._diagonal * self._operator.matvec(self._diagonal * vector)
