"""A linear sketch S: R^d -> R^k of the whole gradient, hashed from global coordinates.

Entry (r, c) of the matrix called ``name`` is added, with sign s1(r) s2(c), to coordinate
(h1(r) + h2(c)) mod k. The four hashes are drawn for the name, and for the row's and the column's
number in the whole matrix: this is the TensorSketch of Pham and Pagh (KDD 2013), a count sketch
with E <S g, S h> = <g, h>, but for one thing. Its hashes h1 and h2 may send two rows (or columns)
to one bucket, and all entries of the two then collide at once: for a gradient of singular values
sigma_i that adds 2 sum_i sigma_i^4 / |g|^4 to the variance of |S g|^2, in units of a dense
Gaussian's, and true gradients are nearly of rank one in some layers. Ours permute each block of k
rows or columns, so that no two of a block meet: up to k rows and columns nothing is added. The
longer axis of a layer's matrix is hashed to k / 16 buckets: what that costs and saves is in
``hashes``.

Since S is linear, the sketch of a sum is the sum of the sketches: each rank sketches its own shard
of a gradient, and one sum over the model's ranks makes the whole.

How a layer's gradients are hashed is a matter of cost alone: see ``kernels``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from megatron_direct.gradients.hashes import Hashes
from megatron_direct.gradients.kernels import cheapest
from megatron_direct.gradients.kernels.entries import sketch_of_matrix
from megatron_direct.gradients.kernels.kernel import Kernel
from megatron_direct.gradients.pieces import Entries, Piece, RoutedOuterProducts, RowSums
from megatron_direct.mcore.shards import ParameterShard
from megatron_direct.mcore.without_gpu import operations_of_torch
from megatron_direct.runtime import host


class Sketch:
    """S for the parameters in ``shards``, of k = ``size`` coordinates.

    scales: by name, in the shard's shape; a gradient's entries are multiplied by them before they
    are sketched (a diagonal preconditioner). The hashes alone are kept, not the coordinates of
    each entry, so that the memory is that of the parameters' rows and columns.
    """

    def __init__(self, shards: Sequence[ParameterShard], size: int, seed: int,
                 scales: Mapping[str, torch.Tensor] | None = None):
        self.size = size
        self._hashes = {s.name: Hashes.draw(s, size, seed) for s in shards}
        self._scales = {s.name: s.as_matrix(scales[s.name]).float() for s in shards
                        } if scales else {}

    def sums(self, num_samples: int, device: torch.device) -> SketchSums:
        """Sketches [num_samples, k] of zero, to which pieces can be added."""
        return SketchSums(self._hashes, self._scales, num_samples, self.size, device)

    def of_piece(self, shard: ParameterShard, piece: Piece) -> torch.Tensor:
        """[n, k] float32 sketches of a piece's n gradients."""
        sums = self.sums(piece.num_samples, shard.parameter.device)
        sums.add(shard, piece, 0)
        return sums.total()

    def of_vector(self, parts: Sequence[torch.Tensor], shards: Sequence[ParameterShard],
                  ) -> torch.Tensor:
        """[k] sketch of this rank's part of a vector over the parameters (see curvature.vectors).

        Unlike a gradient, a vector is whole on each rank that holds a copy: only owned shards
        count, and no scale is applied. Summed over the model's ranks, it is the sketch of the
        vector.
        """
        total = torch.zeros(self.size, device=host.device())  # of no parts, too
        for part, shard in zip(parts, shards, strict=True):
            if shard.owned:
                total += sketch_of_matrix(shard.as_matrix(part), self._hashes[shard.name])
        return total


class SketchSums:
    """Sketches of n samples' gradients, summed up piece by piece, in float32."""

    def __init__(self, hashes: Mapping[str, Hashes], scales: Mapping[str, torch.Tensor],
                 num_samples: int, size: int, device: torch.device):
        self._hashes, self._scales = hashes, scales
        self._num_samples, self._size, self._device = num_samples, size, device
        self._kernels: dict[type[Kernel], Kernel] = {}  # made when first used

    def add(self, shard: ParameterShard, piece: Piece, first: int) -> None:
        """Adds the sketches of a piece's gradients to rows ``first``, ``first + 1``, ..."""
        if isinstance(piece, RoutedOuterProducts) and not len(piece.inputs):
            return  # an expert that no token came to
        hashes, scale = self._hashes[shard.name], self._scales.get(shard.name)
        if scale is not None and isinstance(piece, Entries | RowSums):
            piece, scale = piece.scaled(scale), None
        kind = cheapest(piece, hashes, self._device.type, scaled=scale is not None)
        if kind not in self._kernels:
            self._kernels[kind] = kind(self._num_samples, self._size, self._device)
        with operations_of_torch():
            self._kernels[kind].add(first, piece, hashes, scale)

    def total(self) -> torch.Tensor:
        """[n, k]"""
        total = torch.zeros(self._num_samples, self._size, device=self._device)
        for kernel in self._kernels.values():
            total += kernel.total()
        return total
