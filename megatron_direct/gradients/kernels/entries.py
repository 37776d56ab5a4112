"""Sketches by way of the gradient itself: form G of each sample, and add its entries up.

A linear layer's G = sum_t delta_t a_t^T costs t o i multiply-adds and one addition for each of the
o i entries. That wins where layers are narrow, and it is the only way to multiply the entries by a
scale. On a CPU each entry is added at its coordinate h1(r) + h2(c). On a GPU such additions would
be atomic, in an order that changes from run to run: there both axes of G are count-sketched by
gathers, and the result, as large as the product of their buckets, is summed along its coordinates.

Shapes: t tokens of a sample, n samples, i and o the layer's local inputs and outputs, k the size of
the sketch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from megatron_direct.gradients.hashes import Hashes, folded, parts_of
from megatron_direct.gradients.kernels.costs import Coefficients
from megatron_direct.gradients.kernels.kernel import Kernel, Work, whole_blocks
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
    def takes(piece: Piece, hashes: Hashes, device_type: str) -> bool:
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
            outputs, inputs = work.output_buckets, work.input_buckets
            numbers = (work.outputs * whole_blocks(work.inputs, inputs)
                       + whole_blocks(work.outputs, outputs) * inputs)
            hashing = numbers * costs.gathered + outputs * inputs * costs.frame
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
        if not self._gathers:
            left = piece.output_grads.float() * hashes.rows.signs
            right = piece.inputs.float() * hashes.columns.signs
            gradients = _Gradients.of(left, right, piece)
            scatter(sums, lambda rows: _scaled(gradients.rows(rows), scale, rows),
                    hashes.rows.buckets, hashes.columns.buckets)
            return
        gradients = _Gradients.of(piece.output_grads.float(), piece.inputs.float(), piece)
        # Numbers of a sample, while G is hashed.
        gathered = hashes.rows.rounds * hashes.rows.size * hashes.columns.size
        for samples, gradient in gradients.whole(gathered):
            gradient = _scaled(gradient, scale, slice(None))
            sums[samples, :self._size] += sketches(gradient, hashes)

    def total(self) -> torch.Tensor:
        return self._sums[:, :self._size] + self._sums[:, self._size:]


def sketch_of_matrix(matrix: torch.Tensor, hashes: Hashes) -> torch.Tensor:
    """[k] of one matrix [rows, columns]."""
    if matrix.is_cuda:
        return sketches(matrix[None].float(), hashes)[0]
    sums = matrix.new_zeros(1, 2 * hashes.size, dtype=torch.float32)
    scatter(sums, lambda rows: (matrix[rows].float() * hashes.rows.signs[rows, None]
                                * hashes.columns.signs)[None],
            hashes.rows.buckets, hashes.columns.buckets)
    return sums.view(2, -1).sum(0)


def sketches(matrices: torch.Tensor, hashes: Hashes) -> torch.Tensor:
    """[m, k] of float32 matrices [m, rows, columns], by gathers: always the same last bits."""
    return folded(hashes.rows.count_sketch_of_rows(hashes.columns.count_sketch(matrices)))


def scatter(sums: torch.Tensor, signed_rows: Callable[[slice], torch.Tensor],
            of_rows: torch.Tensor, of_columns: torch.Tensor) -> None:
    """Adds entries of n matrices [o, i] at coordinates of_rows [o] + of_columns [i] of sums
    [n, 2 k], on a CPU.

    signed_rows(rows): [n, rows, i] entries of a few rows, times their signs. With a few at a time,
    they and their coordinates stay in the cache.
    """
    at_once = parts_of(sums, len(sums) * len(of_columns))
    for first in range(0, len(of_rows), at_once):
        rows = slice(first, first + at_once)
        coordinates = of_rows[rows, None] + of_columns
        entries = signed_rows(rows).flatten(1)
        sums.scatter_add_(1, coordinates.flatten().expand_as(entries), entries)


def _scaled(gradient: torch.Tensor, scale: torch.Tensor | None, rows: slice) -> torch.Tensor:
    return gradient if scale is None else gradient.mul_(scale[rows])


@dataclass(frozen=True)
class _Gradients:
    """G of each sample, formed where it is asked for.

    left, right: [n, t, o] and [n, t, i]; of routed tokens, the factors of blocks.
    """

    left: torch.Tensor
    right: torch.Tensor
    num_samples: int
    blocks: Blocks | None = None

    @classmethod
    def of(cls, grads: torch.Tensor, inputs: torch.Tensor,
           piece: OuterProducts | RoutedOuterProducts) -> _Gradients:
        if isinstance(piece, OuterProducts):
            return cls(grads.transpose(0, 1), inputs.transpose(0, 1), piece.num_samples)
        blocks = Blocks.of(Segments.of(piece.samples, piece.num_samples))
        return cls(blocks.take(grads), blocks.take(inputs), piece.num_samples, blocks)

    def rows(self, rows: slice) -> torch.Tensor:
        """[n, rows, i] some rows of all of them."""
        left = self.left[:, :, rows]
        if self.blocks is None:
            return torch.bmm(left.mT, self.right)
        gradients = left.new_zeros(self.num_samples, left.shape[2], self.right.shape[2])
        self.blocks.add_products(gradients, left, self.right, lambda x, y: torch.bmm(x.mT, y))
        return gradients

    def whole(self, beside: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """(samples, their whole G), a few at a time. beside: numbers that the caller makes of one.

        Which blocks are a sample's is known to the device alone: those G are formed all at once.
        """
        routed = self.rows(slice(None)) if self.blocks is not None else None
        at_once = parts_of(self.left, max(self.left.shape[2] * self.right.shape[2], beside))
        for first in range(0, self.num_samples, at_once):
            samples = slice(first, first + at_once)
            yield samples, (routed[samples] if routed is not None else
                            torch.bmm(self.left[samples].mT, self.right[samples]))


def _add_rows(sums: torch.Tensor, piece: RowSums, hashes: Hashes) -> None:
    """Position by position, since few of an embedding's rows are in a micro-batch."""
    signs = hashes.rows.signs[piece.rows] * piece.held  # [s, b]
    buckets = hashes.rows.buckets[piece.rows]
    at_once = parts_of(sums, piece.output_grads[0].numel())
    for first in range(0, len(signs), at_once):
        part = slice(first, first + at_once)
        values = piece.output_grads[part].float() * hashes.columns.signs * signs[part, :, None]
        coordinates = buckets[part, :, None] + hashes.columns.buckets
        sums.scatter_add_(1, coordinates.transpose(0, 1).flatten(1),
                          values.transpose(0, 1).flatten(1))
