"""A linear sketch S: R^d -> R^k of the whole gradient, hashed from global coordinates.

Entry (r, c) of the matrix called ``name`` is added, with sign s1(r) s2(c), to coordinate
(h1(r) + h2(c)) mod k. The four hashes are drawn for the name, and for the row's and the column's
number in the whole matrix: this is the TensorSketch of Pham and Pagh (KDD 2013), a count sketch
with E <S g, S h> = <g, h>, but for one thing. Its hashes h1 and h2 may send two rows (or columns)
to one bucket, and all entries of the two then collide at once: for a gradient of singular values
sigma_i that adds 2 sum_i sigma_i^4 / |g|^4 to the variance of |S g|^2, in units of a dense
Gaussian's, and true gradients are nearly of rank one in some layers. Ours permute each block of k
rows or columns, so that no two of a block meet.

Since S is linear, the sketch of a sum is the sum of the sketches: each rank sketches its own shard
of a gradient, and one sum over the model's ranks makes the whole.

The gradient of a linear layer, sum_t delta_t a_t^T, is sketched in one of two ways with the same
result (see ``outer_products``); all others entry by entry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_direct.gradients import hashing
from megatron_direct.gradients.kernels import outer_products
from megatron_direct.gradients.pieces import OuterProducts, Piece, RoutedOuterProducts, RowSums
from megatron_direct.mcore.shards import ParameterShard


@dataclass(frozen=True)
class Hashes:
    """h1 and s1 of a shard's rows, h2 and s2 of its columns: what all its entries follow from."""

    row_buckets: torch.Tensor  # [rows] int64, 0 .. k - 1
    row_signs: torch.Tensor  # [rows] float32
    column_buckets: torch.Tensor  # [columns] int64
    column_signs: torch.Tensor  # [columns] float32
    size: int  # k

    def coordinates(self) -> torch.Tensor:
        """[rows, columns] int64 h1(r) + h2(c) of each entry, from 0 to 2 k - 2: see ``folded``."""
        return self.row_buckets[:, None] + self.column_buckets

    def signed(self, matrices: torch.Tensor) -> torch.Tensor:
        """[..., rows, columns] entries times their signs, in float32."""
        return matrices.float() * self.row_signs[:, None] * self.column_signs


class Sketch:
    """S for the parameters in ``shards``, of k = ``size`` coordinates.

    scales: by name, in the shard's shape; a gradient's entries are multiplied by them before they
    are sketched (a diagonal preconditioner). The hashes alone are kept, not the coordinates of
    each entry, so that the memory is that of the parameters' rows and columns.
    """

    def __init__(self, shards: Sequence[ParameterShard], size: int, seed: int,
                 scales: Mapping[str, torch.Tensor] | None = None):
        self.size = size
        self._hashes = {s.name: _draw(s, size, seed) for s in shards}
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
        total = torch.zeros(2 * self.size, device=parts[0].device)
        for part, shard in zip(parts, shards, strict=True):
            if shard.owned:
                hashes = self._hashes[shard.name]
                total.index_add_(0, hashes.coordinates().flatten(),
                                 hashes.signed(shard.as_matrix(part)).flatten())
        return folded(total)


def folded(sums: torch.Tensor) -> torch.Tensor:
    """[..., k] of sums [..., 2 k] by h1 + h2: the mod k, taken once at the end."""
    size = sums.shape[-1] // 2
    return sums[..., :size] + sums[..., size:]


class SketchSums:
    """Sketches of n samples' gradients, summed up piece by piece, in float32.

    What is computed as a spectrum is summed over all layers first, so that one inverse transform a
    sample is enough.
    """

    def __init__(self, hashes: Mapping[str, Hashes], scales: Mapping[str, torch.Tensor],
                 num_samples: int, size: int, device: torch.device):
        self._hashes, self._scales, self._size = hashes, scales, size
        self._entries = torch.zeros(num_samples, 2 * size, device=device)
        self._spectra = torch.zeros(num_samples, size // 2 + 1, dtype=torch.complex64,
                                    device=device)

    def add(self, shard: ParameterShard, piece: Piece, first: int) -> None:
        """Adds the sketches of a piece's gradients to rows ``first``, ``first + 1``, ..."""
        hashes, scale = self._hashes[shard.name], self._scales.get(shard.name)
        rows = slice(first, first + piece.num_samples)
        entries, spectra = self._entries[rows], self._spectra[rows]
        if isinstance(piece, OuterProducts | RoutedOuterProducts):
            outer_products.add_sketches(entries, spectra, piece, hashes, scale)
        elif isinstance(piece, RowSums):
            _add_row_sums(entries, piece, hashes, scale)
        else:
            matrices = piece.matrices()
            values = hashes.signed(matrices if scale is None else matrices * scale)
            entries.index_add_(1, hashes.coordinates().flatten(), values.flatten(1))

    def total(self) -> torch.Tensor:
        """[n, k]"""
        return folded(self._entries) + torch.fft.irfft(self._spectra, n=self._size)


def _add_row_sums(entries: torch.Tensor, piece: RowSums, hashes: Hashes,
                  scale: torch.Tensor | None) -> None:
    """Position by position, since few of an embedding's rows are in a micro-batch."""
    for sample in range(piece.num_samples):
        rows = piece.rows[:, sample]  # [s]
        values = piece.output_grads[:, sample].float() * hashes.column_signs
        values = values * (hashes.row_signs[rows] * piece.held[:, sample])[:, None]
        if scale is not None:
            values = values * scale[rows]
        coordinates = hashes.row_buckets[rows][:, None] + hashes.column_buckets
        entries[sample].scatter_add_(0, coordinates.flatten(), values.flatten())


def _draw(shard: ParameterShard, size: int, seed: int) -> Hashes:
    drawn = []
    for axis, indices in (("row", shard.rows), ("column", shard.columns)):
        drawn.append(hashing.buckets(
            hashing.stream(seed, f"{axis} bucket", shard.name), indices, size))
        drawn.append(hashing.signs(
            hashing.hash64(hashing.stream(seed, f"{axis} sign", shard.name), indices)))
    return Hashes(*drawn, size)
