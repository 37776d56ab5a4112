"""Vectors over the parameters, spread over the ranks exactly as the parameters are.

A vector v in R^d (d parameters) is, on each rank, one flat tensor: this rank's shards, one after
the other in the order of ``parameter_shards``. A replicated parameter is held by several ranks, and
tied embeddings by two stages: all copies are equal, and sums over entries count each entry once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_direct import hashing, parallel
from megatron_direct.model import ParameterShard


class ParameterSpace:
    """Inner products, hashed random vectors and repair of partial sums, for one list of shards."""

    def __init__(self, shards: Sequence[ParameterShard]):
        self.shards = list(shards)
        self._sizes = [shard.parameter.numel() for shard in shards]
        first = shards[0].parameter
        self.dtype, self.device = first.dtype, first.device
        owned = torch.repeat_interleave(
            torch.tensor([shard.owned for shard in shards]), torch.tensor(self._sizes))
        self._owned = None if bool(owned.all()) else owned.to(self.device)
        count = torch.tensor(float(owned.sum()), dtype=torch.float64, device=self.device)
        self.dimension = int(parallel.sum_over_model(count))

    def split(self, vector: torch.Tensor) -> list[torch.Tensor]:
        """A view for each shard, in its parameter's shape."""
        parts = vector.split(self._sizes)
        return [part.view(s.parameter.shape)
                for part, s in zip(parts, self.shards, strict=True)]

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat([tensor.reshape(-1) for tensor in tensors])

    def block_dot(self, basis: Sequence[torch.Tensor], vector: torch.Tensor) -> np.ndarray:
        """[len(basis)] float64 inner products, in one all-reduce."""
        counted = vector if self._owned is None else vector * self._owned
        local = torch.stack([_dot64(b, counted) for b in basis])
        return parallel.sum_over_model(local).cpu().numpy()

    def dot(self, u: torch.Tensor, v: torch.Tensor) -> float:
        return float(self.block_dot([u], v)[0])

    def random_signs(self, seed: int) -> torch.Tensor:
        """A vector of +1 and -1 (Rademacher), the same in every layout."""
        parts = []
        for shard in self.shards:
            rows = hashing.hash64(hashing.stream(seed, "entry", shard.name), shard.rows)
            entries = hashing.hash64(0, rows[:, None] ^ hashing.hash64(1, shard.columns)[None])
            parts.append(hashing.signs(entries).reshape(-1))
        return torch.cat(parts).to(self.dtype)

    def add_partial_sums(self, vector: torch.Tensor) -> torch.Tensor:
        """Makes a vector of gradients whole, in place.

        After a backward pass of bare chunks the gradients of sequence-parallel norms are summed
        over their own slice of the sequence, and those of tied embeddings over their own stage.
        """
        for mark, add_up in (("sequence_parallel", parallel.sum_over_tensor_ranks),
                             ("shared_embedding", parallel.sum_over_embedding_stages)):
            parts = [part for part, shard in zip(self.split(vector), self.shards, strict=True)
                     if getattr(shard.parameter, mark, False)]
            if parts:
                whole = add_up(self.join(parts))
                for part, values in zip(parts, whole.split([p.numel() for p in parts]),
                                        strict=True):
                    part.copy_(values.view_as(part))
        return vector


def _dot64(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """<u, v> summed in float64, in blocks that keep the float64 copies small."""
    total = torch.zeros((), dtype=torch.float64, device=u.device)
    for a, b in zip(u.split(1 << 22), v.split(1 << 22), strict=True):
        total += a.double() @ b.double()
    return total
