"""Sketches by way of products in which one axis of a layer keeps its own width.

The longer axis of a layer's matrix has q = k / 16 buckets (see ``hashes``). The factor along it is
count-sketched, and the other factor stays as it is, w numbers wide: their product over all tokens
of a sample, P, is w x q. It costs w q multiply-adds a token, where G itself would cost those of all
its entries. The rows of P, times their signs, are then added to those rows of a *frame*, k x q,
that are their buckets. The frames of all layers add up, and a sample's is summed along
(row + column) mod k at the end.

Shapes: t tokens of a sample, n samples, k the size of the sketch.
"""

from __future__ import annotations

import torch

from megatron_direct.gradients.hashes import AxisHash, Hashes, num_narrow_buckets
from megatron_direct.gradients.kernels.buffer import product
from megatron_direct.gradients.kernels.costs import Coefficients
from megatron_direct.gradients.kernels.held_frames import HeldFrames
from megatron_direct.gradients.kernels.kernel import Kernel, Work, factor_dtype, whole_blocks
from megatron_direct.gradients.kernels.segments import add_products_by_sample
from megatron_direct.gradients.pieces import OuterProducts, Piece, RoutedOuterProducts

_CALLS = 8  # operations on tensors for a layer, about
# Up to so many buckets a GPU multiplies bfloat16 by a matrix of signs, which takes it about as long
# as to read the factor.
_MOST_BY_PRODUCT = 256


class ByKeptAxis(Kernel):
    name = "kept axis"

    def __init__(self, num_samples: int, size: int, device: torch.device):
        self._held = HeldFrames(num_samples, size, num_narrow_buckets(size), device)

    @staticmethod
    def takes(piece: Piece, hashes: Hashes, device_type: str) -> bool:
        return hashes.narrowed is not None and isinstance(
            piece, OuterProducts | RoutedOuterProducts)

    @staticmethod
    def cost(work: Work, costs: Coefficients) -> float:
        kept, narrowed, buckets = work.outputs, work.inputs, work.input_buckets
        if work.output_buckets < buckets:
            kept, narrowed, buckets = narrowed, kept, work.output_buckets
        blocks = 1.25 if work.routed else 1.0  # of tokens, filled up with zeros
        # P is written, read, and added to the frame: twice a frame's traffic for each entry.
        return _CALLS * costs.call + work.samples * (
            work.tokens * whole_blocks(narrowed, buckets) * costs.gathered
            + kept * buckets * (blocks * work.tokens * work.multiply_add(costs) + 2 * costs.frame))

    def add(self, first: int, piece: Piece, hashes: Hashes,
            scale: torch.Tensor | None = None) -> None:
        assert scale is None, "factors cannot be scaled entry by entry"
        assert isinstance(piece, OuterProducts | RoutedOuterProducts), "refused by takes()"
        dtype = factor_dtype(piece)
        kept, narrowed = hashes.rows, hashes.columns
        left, right = piece.output_grads.to(dtype), piece.inputs.to(dtype)
        if hashes.narrowed is hashes.rows:
            kept, narrowed, left, right = narrowed, kept, right, left
        products = _products(left, _count_sketch(narrowed, right), piece)
        kept.add_count_sketch_of_rows(self._held.of(first, piece.num_samples), products)

    def total(self) -> torch.Tensor:
        return self._held.total()


def _products(left: torch.Tensor, right: torch.Tensor, piece: OuterProducts | RoutedOuterProducts,
              ) -> torch.Tensor:
    """[n, w, q] float32 sums over each sample's tokens."""
    if isinstance(piece, OuterProducts):
        return product(left.transpose(0, 1), right.transpose(0, 1))
    sums = torch.zeros(piece.num_samples, left.shape[1], right.shape[1], device=left.device)
    add_products_by_sample(sums, piece.samples, left, right, product)
    return sums


def _count_sketch(axis: AxisHash, values: torch.Tensor) -> torch.Tensor:
    if values.is_cuda and values.dtype == torch.bfloat16 and axis.size <= _MOST_BY_PRODUCT:
        return count_sketch_by_product(axis, values)
    return axis.count_sketch(values)


def count_sketch_by_product(axis: AxisHash, values: torch.Tensor) -> torch.Tensor:
    """[..., size] as ``AxisHash.count_sketch`` of bfloat16 values, by a product with signs."""
    sums = product(values.flatten(0, -2).mT[None], axis.matrix(values.dtype)[None])[0]
    return sums.to(values.dtype).unflatten(0, values.shape[:-1])
