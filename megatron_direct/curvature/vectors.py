"""Vectors over the parameters, spread over the ranks exactly as the parameters are.

A vector v in R^d (d parameters) is, on each rank, one flat tensor: this rank's shards, one after
the other in the order of ``parameter_shards``. A replicated parameter is held by several ranks, and
tied embeddings by two stages: all copies are equal, and sums over entries count each entry once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_direct.gradients import hashing
from megatron_direct.mcore import grid
from megatron_direct.mcore.shards import ParameterShard
from megatron_direct.runtime import host


class ParameterSpace:
    """Inner products, hashed random vectors and repair of partial sums, for one list of shards."""

    def __init__(self, shards: Sequence[ParameterShard]):
        self.shards = list(shards)
        self._sizes = [shard.parameter.numel() for shard in shards]
        self.device = host.device()
        # A rank may hold none, if the space is one of some parameters only.
        # Vectors over bfloat16 parameters are in float32.
        self.dtype = torch.promote_types(
            shards[0].parameter.dtype if shards else torch.float32, torch.float32)
        owned = torch.repeat_interleave(
            torch.tensor([shard.owned for shard in shards], dtype=torch.bool),
            torch.tensor(self._sizes, dtype=torch.int64))
        self._owned = None if bool(owned.all()) else owned.to(self.device)
        count = torch.tensor(float(owned.sum()), dtype=torch.float64, device=self.device)
        self.dimension = int(grid.sum_over_model(count))

    def split(self, vector: torch.Tensor) -> list[torch.Tensor]:
        """A view for each shard, in its parameter's shape."""
        parts = vector.split(self._sizes)
        return [part.view(s.parameter.shape)
                for part, s in zip(parts, self.shards, strict=True)]

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        none = torch.empty(0, dtype=self.dtype, device=self.device)
        return torch.cat([none, *(tensor.reshape(-1).to(self.dtype) for tensor in tensors)])

    def block_dot(self, basis: Sequence[torch.Tensor], vector: torch.Tensor) -> np.ndarray:
        """[len(basis)] float64 inner products, in one all-reduce."""
        counted = vector if self._owned is None else vector * self._owned
        local = torch.stack([_dot64(b, counted) for b in basis])
        return grid.sum_over_model(local).cpu().numpy()

    def dot(self, u: torch.Tensor, v: torch.Tensor) -> float:
        return float(self.block_dot([u], v)[0])

    def random_signs(self, seed: int) -> torch.Tensor:
        """A vector of +1 and -1 (Rademacher), the same in every layout."""
        parts = []
        for shard in self.shards:
            rows = hashing.hash64(hashing.stream(seed, "entry", shard.name), shard.rows)
            entries = hashing.hash64(0, rows[:, None] ^ hashing.hash64(1, shard.columns)[None])
            parts.append(hashing.signs(entries).reshape(-1))
        return self.join(parts)

    def add_partial_sums(self, vector: torch.Tensor) -> torch.Tensor:
        """Makes a vector of gradients whole, in place.

        After a backward pass of bare chunks the gradients of some replicated parameters are sums
        over the rank's own slice of the sequence or own heads, and those of tied embeddings sums
        over their own stage.
        """
        self._add_up(vector, [shard.is_partial for shard in self.shards],
                     grid.sum_over_tensor_ranks)
        self._add_up(vector, [getattr(shard.parameter, "shared_embedding", False)
                              for shard in self.shards], grid.sum_over_embedding_stages)
        return vector

    def sum_over_data(self, vector: torch.Tensor) -> torch.Tensor:
        """Sum over the data-parallel ranks, in place.

        An expert-parallel rank's gradients of its experts are sums over all samples of the ranks
        it shares the experts with: over these it is not summed again.
        """
        local = [shard.of_local_experts for shard in self.shards]
        if not any(local):
            return grid.sum_over_data(vector)
        self._add_up(vector, local, grid.sum_over_copies_of_experts)
        self._add_up(vector, [not it for it in local], grid.sum_over_data)
        return vector

    def _add_up(self, vector: torch.Tensor, chosen: Sequence[bool], add_up) -> None:
        """Applies a sum over ranks to the parts of the chosen shards, in place."""
        parts = [part for part, it in zip(self.split(vector), chosen, strict=True) if it]
        if parts:
            whole = add_up(self.join(parts))
            for part, values in zip(parts, whole.split([p.numel() for p in parts]), strict=True):
                part.copy_(values.view_as(part))


def _dot64(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """<u, v> summed in float64, in blocks that keep the float64 copies small."""
    total = torch.zeros((), dtype=torch.float64, device=u.device)
    for a, b in zip(u.split(1 << 22), v.split(1 << 22), strict=True):
        total += a.double() @ b.double()
    return total
