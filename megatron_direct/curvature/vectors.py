"""Vectors over the parameters, spread over the ranks exactly as the parameters are.

A vector v in R^d (d parameters) is, on each rank, one flat tensor: this rank's shards, one after
the other in the order of ``parameter_shards``. A replicated parameter is held by several ranks, and
tied embeddings by two stages: all copies are equal, and sums over entries count each entry once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from megatron_direct.curvature.vector_space import VectorSpace
from megatron_direct.gradients import hashing
from megatron_direct.mcore import grid
from megatron_direct.mcore.shards import ParameterShard
from megatron_direct.runtime import host

# Entries of several vectors that are worked on at a time: on a CPU 2 MiB of float64, about a core's
# second cache (measured: a quarter of it takes half as long again, twice of it a tenth longer); on
# a GPU enough that launching the kernels does not count.
_BLOCK_ENTRIES = {"cpu": 1 << 18, "cuda": 1 << 24}


class ParameterSpace(VectorSpace):
    """Inner products, hashed random vectors and repair of partial sums, for one list of shards.

    Operations on many vectors go through them block by block, each a range of entries of all of
    them, so that every vector is read once. Inner products are summed in float64.
    """

    def __init__(self, shards: Sequence[ParameterShard]):
        self.shards = list(shards)
        self._sizes = [shard.parameter.numel() for shard in shards]
        self.device = host.device()
        # A rank may hold none, if the space is one of some parameters only.
        # Vectors over bfloat16 parameters are in float32.
        self.dtype = torch.promote_types(
            shards[0].parameter.dtype if shards else torch.float32, torch.float32)
        # Of combinations. On a GPU float32 may mean TF32, and float64 costs nothing beside memory.
        self._arithmetic = self.dtype if self.device.type == "cpu" else torch.float64
        owned = torch.repeat_interleave(
            torch.tensor([shard.owned for shard in shards], dtype=torch.bool),
            torch.tensor(self._sizes, dtype=torch.int64))
        self._owned = None if bool(owned.all()) else owned.to(self.device)
        count = torch.tensor(float(owned.sum()), dtype=torch.float64, device=self.device)
        self.dimension = int(grid.sum_over_model(count))

    def num_bytes(self) -> int:
        """Of this rank's part of a vector."""
        return sum(self._sizes) * self.dtype.itemsize

    def split(self, vector: torch.Tensor) -> list[torch.Tensor]:
        """A view for each shard, in its parameter's shape."""
        parts = vector.split(self._sizes)
        return [part.view(s.parameter.shape)
                for part, s in zip(parts, self.shards, strict=True)]

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        none = torch.empty(0, dtype=self.dtype, device=self.device)
        return torch.cat([none, *(tensor.reshape(-1).to(self.dtype) for tensor in tensors)])

    def inner_products(self, vectors: Sequence[torch.Tensor], others: Sequence[torch.Tensor],
                       ) -> np.ndarray:
        """[len(vectors), len(others)], in one all-reduce."""
        total = torch.zeros(len(vectors), len(others), dtype=torch.float64, device=self.device)
        for part, block in self._blocks(vectors, torch.float64):
            counted = torch.stack([other[part] for other in others]).double()
            if self._owned is not None:
                counted *= self._owned[part]
            total += block @ counted.t()
        return grid.sum_over_model(total).cpu().numpy()

    def dot(self, u: torch.Tensor, v: torch.Tensor) -> float:
        return float(self.inner_products([u], [v])[0, 0])

    def combine(self, coefficients: np.ndarray, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
        result = [torch.zeros(sum(self._sizes), dtype=self.dtype, device=self.device)]
        self.remove(-coefficients[:, None], vectors, result)
        return result[0]

    def remove(self, coefficients: np.ndarray, vectors: Sequence[torch.Tensor],
               others: list[torch.Tensor]) -> None:
        left = [torch.empty_like(other) for other in others]
        rows = self._on_device(coefficients).t().to(self._arithmetic)
        for part, block in self._blocks(vectors, self._arithmetic):
            for result, other, removed in zip(left, others, rows @ block, strict=True):
                torch.sub(other[part], removed, out=result[part])
        others[:] = left

    def rotate(self, vectors: list[torch.Tensor], rotation: np.ndarray) -> None:
        """In the memory of the first of them."""
        rows = self._on_device(rotation).t()
        for part, block in self._blocks(vectors, torch.float64):
            for vector, row in zip(vectors, rows @ block, strict=False):
                vector[part] = row
        # Other objects: whoever keeps a vector by its identity sees that it is another one.
        vectors[:] = [vector.detach() for vector in vectors[: len(rows)]]

    def reorthonormalise(self, vectors: list[torch.Tensor]) -> None:
        self.rotate(vectors, self._inverse_factor(vectors))

    def _blocks(self, vectors: Sequence[torch.Tensor], dtype: torch.dtype,
                ) -> Iterator[tuple[slice, torch.Tensor]]:
        """(range of entries, those of all vectors [len(vectors), entries])."""
        length = sum(self._sizes)
        width = max(1, _BLOCK_ENTRIES[self.device.type] // len(vectors))
        for first in range(0, length, width):
            part = slice(first, min(first + width, length))
            yield part, torch.stack([vector[part] for vector in vectors]).to(dtype)

    def _on_device(self, matrix: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.array(matrix, order="C")).to(self.device)

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

    def _add_up(self, vector: torch.Tensor, chosen: Sequence[bool], add_up: Callable) -> None:
        """Applies a sum over ranks to the parts of the chosen shards, in place."""
        parts = [part for part, it in zip(self.split(vector), chosen, strict=True) if it]
        if parts:
            whole = add_up(self.join(parts))
            for part, values in zip(parts, whole.split([p.numel() for p in parts]), strict=True):
                part.copy_(values.view_as(part))
