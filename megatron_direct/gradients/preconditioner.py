"""The diagonal scaling by Adam's second moments.

Adam divides a gradient by sqrt(v), so that the inner product it cares for is
g^T diag(v)^(-1/2) g'. With either factor multiplied by d = v^(-1/4) it is an ordinary one, and so
sketches, projections and the curvature D H D need no other change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from megatron_direct.curvature.vectors import ParameterSpace
from megatron_direct.errors import UserError
from megatron_direct.model import ParameterShard, checkpoint_metadata

_KEY = "optimizer.state.exp_avg_sq."


def adam_scales(checkpoint: Path, chunks: Sequence[torch.nn.Module],
                shards: Sequence[ParameterShard]) -> dict[str, torch.Tensor]:
    """By shard name, d = v^(-1/4) in the parameter's shape, in float32; all ranks call this.

    Read at any layout. Where Adam has seen no gradient (v = 0) there is no scale to tell, and d is
    0: such entries, rows of tokens that never occurred, count for nothing. The constant of Adam's
    bias correction is left out; it would multiply all scales alike.

    Raises UserError for a checkpoint without moments of every parameter.
    """
    from megatron.core import dist_checkpointing

    stored = dist_checkpointing.load_tensors_metadata(str(checkpoint))
    names = {id(shard.parameter): shard.name for shard in shards}
    wanted = {}
    for chunk in chunks:
        sharded = chunk.sharded_state_dict(metadata=checkpoint_metadata())
        for local_name, parameter in chunk.named_parameters():
            if id(parameter) in names:
                entry = sharded[local_name]
                wanted[names[id(parameter)]] = dataclasses.replace(
                    entry, key=_KEY + entry.key,
                    data=torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False))
    missing = [name for name, entry in wanted.items() if entry.key not in stored]
    if missing:
        raise UserError(
            f"{checkpoint} holds no second moments of Adam for {missing[0]} and {len(missing) - 1} "
            "other parameters, which --precondition adam needs. Save it with its optimizer (with "
            "Megatron-LM and the distributed optimizer: --dist-ckpt-optim-fully-reshardable), or "
            "leave --precondition out.")
    loaded = dist_checkpointing.load(dict(wanted), str(checkpoint))  # and what all ranks share
    moments = {name: loaded[name] for name in wanted}
    return {name: torch.where(v > 0, v, torch.inf).pow(-0.25) for name, v in moments.items()}


class PreconditionedOperator:
    """D H D for an operator H and the diagonal D of ``scales``; vectors of a ParameterSpace."""

    def __init__(self, operator, space: ParameterSpace, scales: Mapping[str, torch.Tensor]):
        self._operator = operator
        self._diagonal = space.join([scales[shard.name] for shard in space.shards]).to(space.dtype)

    def __getattr__(self, name: str):
        return getattr(self._operator, name)

    def matvec(self, vector: torch.Tensor) -> torch.Tensor:
        return self._diagonal * self._operator.matvec(self._diagonal * vector)
