"""Sketches by way of the gradient itself: form G of each sample, and add its entries up.

A linear layer's G = sum_t delta_t a_t^T costs t o i multiply-adds and one addition for each of the
o i entries. That wins where layers are narrow, and it is the only way to multiply the entries by a
scale. On a CPU each entry is added at its coordinate h1(r) + h2(c). On a GPU such additions would
be atomic, in an order that changes from run to run: there both axes of G are count-sketched by
gathers, and the k x k result is summed along its coordinates.

Shapes: t tokens of a sample, n samples, i and o the layer's local inputs and outputs, k the size of
the sketch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_direct.gradients.hashes import Hashes, folded, parts_of
from megatron_direct.gradients.kernels.costs import Coefficients
from megatron_direct.gradients.kernels.kernel import Kernel, Work
from megatron_direct.gradients.kernels.segments import Blocks, Segments
from megatron_direct.gradients.pieces import (
    Entries,
    OuterProducts,
    Piece,
    RoutedOuterProducts,
    RowSums,
)

_CALLS = 8  # operations on tensors, about


class ByEntries(Kernel):
    name = "entries"
    applies_scale = True

    def __init__(self, num_samples: int, size: int, device: torch.device):
        self._size = size
        self._gathers = device.type == "cuda"
        # At coordinates before the mod k, so that none of them needs a division.
        self._sums = torch.zeros(num_samples, 2 * size, device=device)

    @staticmethod
    def takes(piece: Piece, device_type: str) -> bool:
        return device_type == "cpu" or not isinstance(piece, RowSums)

    @staticmethod
    def cost(work: Work, costs: Coefficients) -> float:
        if work.lookup:
            return _CALLS * costs.call + (
                work.samples * work.tokens * work.inputs * costs.scattered_entry)
        # Blocks of routed tokens are half as long as a sample on average, and filled up with zeros.
        tokens = work.tokens * 1.25 if work.routed else work.tokens
        entries = work.outputs * work.inputs
        hashing = entries * costs.scattered_entry
        if work.device_type == "cuda":
            size = work.size
            numbers = -(-work.inputs // size) * work.outputs * size + (
                -(-work.outputs // size) * size * size)
            hashing = numbers * costs.gathered + size * size * costs.frame
        return _CALLS * costs.call + work.samples * (
            entries * tokens * costs.multiply_add + hashing)

    def add(self, first: int, piece: Piece, hashes: Hashes,
            scale: torch.Tensor | None = None) -> None:
        sums = self._sums[first: first + piece.num_samples]
        if isinstance(piece, Entries):
            sums[:, :self._size] += hashes.of_vector.count_sketch(piece.grads.float())
        elif isinstance(piece, RowSums):
            _add_rows(sums, piece, hashes)
        else:
            self._add_outer_products(sums, piece, hashes, scale)

    def _add_outer_products(self, sums: torch.Tensor, piece: OuterProducts | RoutedOuterProducts,
                            hashes: Hashes, scale: torch.Tensor | None) -> None:
        inputs, grads = piece.inputs.float(), piece.output_grads.float()
        if not self._gathers:
            inputs, grads = inputs * hashes.columns.signs, grads * hashes.rows.signs
        if isinstance(piece, OuterProducts):
            gradients = _gradients(inputs, grads)
        else:
            gradients = iter([(slice(None), _routed_gradients(inputs, grads, piece))])
        for rows, gradient in gradients:
            if scale is not None:
                gradient *= scale
            if self._gathers:
                sums[rows, :self._size] += sketches(gradient, hashes)
            else:
                _scatter(sums[rows], gradient, hashes)

    def total(self) -> torch.Tensor:
        return self._sums[:, :self._size] + self._sums[:, self._size:]


def sketch_of_matrix(matrix: torch.Tensor, hashes: Hashes) -> torch.Tensor:
    """[k] of one matrix [rows, columns]."""
    if matrix.is_cuda:
        return sketches(matrix[None].float(), hashes)[0]
    sums = matrix.new_zeros(1, 2 * hashes.size, dtype=torch.float32)
    _scatter(sums, hashes.signed(matrix)[None], hashes)
    return sums.view(2, -1).sum(0)


def sketches(matrices: torch.Tensor, hashes: Hashes) -> torch.Tensor:
    """[m, k] of float32 matrices [m, rows, columns], by gathers: always the same last bits."""
    return folded(hashes.rows.count_sketch_of_rows(hashes.columns.count_sketch(matrices)))


def _scatter(sums: torch.Tensor, signed: torch.Tensor, hashes: Hashes) -> None:
    """Adds the entries of matrices [m, o, i], times their signs, at their coordinates [m, 2 k].

    A few rows at a time: the coordinates are recomputed each time, and stay in the cache.
    """
    rows = parts_of(signed, signed.shape[2])
    buckets = hashes.rows.buckets.split(rows)
    for part, row_buckets in zip(signed.split(rows, 1), buckets, strict=True):
        coordinates = (row_buckets[:, None] + hashes.columns.buckets).flatten()
        sums.scatter_add_(1, coordinates.expand(len(sums), -1), part.flatten(1))


def _gradients(inputs: torch.Tensor, grads: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """(samples, their G [m, o, i]), a few samples at a time, of factors [s, n, i] and [s, n, o]."""
    num_samples = inputs.shape[1]
    at_once = parts_of(inputs, inputs.shape[2] * grads.shape[2])
    for first in range(0, num_samples, at_once):
        rows = slice(first, first + at_once)
        yield rows, torch.bmm(grads[:, rows].permute(1, 2, 0), inputs[:, rows].transpose(0, 1))


def _routed_gradients(inputs: torch.Tensor, grads: torch.Tensor, piece: RoutedOuterProducts,
                      ) -> torch.Tensor:
    """[n, o, i] G of all samples, of factors [tokens, i] and [tokens, o]."""
    gradients = inputs.new_zeros(piece.num_samples, grads.shape[1], inputs.shape[1])
    if len(inputs):
        blocks = Blocks.of(Segments.of(piece.samples, piece.num_samples))
        blocks.add_products(gradients, blocks.take(grads), blocks.take(inputs),
                            lambda x, y: torch.bmm(x.mT, y))
    return gradients


def _add_rows(sums: torch.Tensor, piece: RowSums, hashes: Hashes) -> None:
    """Position by position, since few of an embedding's rows are in a micro-batch."""
    signs = hashes.rows.signs[piece.rows] * piece.held  # [s, b]
    values = piece.output_grads.float() * hashes.columns.signs * signs[..., None]
    coordinates = hashes.rows.buckets[piece.rows][..., None] + hashes.columns.buckets
    sums.scatter_add_(1, coordinates.transpose(0, 1).flatten(1), values.transpose(0, 1).flatten(1))
