"""A linear sketch S: R^d -> R^k of the whole gradient, hashed from global coordinates.

Entry (r, c) of the matrix called ``name`` is added, with sign s1(r) s2(c), to coordinate
(h1(r) + h2(c)) mod k. The four hashes are drawn for the name, and for the row's and the column's
number in the whole matrix: this is the TensorSketch of Pham and Pagh (KDD 2013), a count sketch
with E <S g, S h> = <g, h>. Since S is linear, the sketch of a sum is the sum of the sketches: each
rank sketches its own shard of a gradient, and one sum over the model's ranks makes the whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_direct import hashing
from megatron_direct.gradients.pieces import Piece, RowSums
from megatron_direct.model import ParameterShard


class Sketch:
    """S for the parameters in ``shards``.

    The coordinates and signs of a shard's entries are kept (12 bytes an entry), since drawing them
    again for every micro-batch costs more than the scatter itself.
    """

    def __init__(self, shards: Sequence[ParameterShard], size: int, seed: int):
        self.size = size
        self._coordinates = {s.name: _coordinates(s, size, seed) for s in shards}

    def of_piece(self, shard: ParameterShard, piece: Piece) -> torch.Tensor:
        """[b, k] sketches of a piece's b gradients, in float32."""
        coordinates, signs = self._coordinates[shard.name]
        if isinstance(piece, RowSums):  # few of an embedding's rows are in a micro-batch
            width = piece.output_grads.shape[-1]
            rows = piece.rows.t()  # [b, s]
            coordinates, signs = coordinates.view(-1, width)[rows], signs.view(-1, width)[rows]
            values = piece.output_grads.transpose(0, 1).float() * signs * piece.held.t()[..., None]
            sketches = values.new_zeros(len(rows), self.size)
            return sketches.scatter_add_(1, coordinates.flatten(1), values.flatten(1))
        gradients = piece.matrices().flatten(1).float()
        sketches = gradients.new_zeros(len(gradients), self.size)
        return sketches.index_add_(1, coordinates, gradients * signs)

    def of_vector(self, parts: Sequence[torch.Tensor], shards: Sequence[ParameterShard],
                  ) -> torch.Tensor:
        """[k] sketch of this rank's part of a vector over the parameters (see curvature.vectors).

        Unlike a gradient, a vector is whole on each rank that holds a copy: only owned shards
        count. Summed over the model's ranks, it is the sketch of the vector.
        """
        total = torch.zeros(self.size, dtype=torch.float32, device=parts[0].device)
        for part, shard in zip(parts, shards, strict=True):
            if shard.owned:
                coordinates, signs = self._coordinates[shard.name]
                total.index_add_(0, coordinates, part.reshape(-1).float() * signs)
        return total


def _coordinates(shard: ParameterShard, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """([entries] int64 sketch coordinates, [entries] float32 signs) of a shard, row by row."""
    row_hash = hashing.hash64(hashing.stream(seed, "row", shard.name), shard.rows)
    column_hash = hashing.hash64(hashing.stream(seed, "column", shard.name), shard.columns)
    coordinates = (hashing.buckets(row_hash, size)[:, None]
                   + hashing.buckets(column_hash, size)[None, :]) % size
    signs = hashing.signs(row_hash)[:, None] * hashing.signs(column_hash)[None, :]
    return coordinates.reshape(-1), signs.reshape(-1)
