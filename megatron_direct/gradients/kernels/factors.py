"""The count-sketched factors of a layer's gradient: what two of the kernels multiply.

The gradient of a sample is sum_t x_t y_t^T, and the sketch of x y^T is the circular convolution of
the count sketches of x and of y. For a linear layer x and y are the gradient of the output and the
input; for an embedding x is one where row r was looked up and zero elsewhere. Shapes: s positions,
b samples, k the size of the sketch.
"""

from __future__ import annotations

import torch

from megatron_direct.gradients.hashes import AxisHash, Hashes
from megatron_direct.gradients.pieces import OuterProducts, RowSums


def count_sketched(piece: OuterProducts | RowSums, hashes: Hashes, left: torch.Tensor,
                   right: torch.Tensor) -> None:
    """Writes the count sketches of x and y into [s, b, k] places, in the places' dtype."""
    if isinstance(piece, OuterProducts):
        hashes.rows.write_count_sketch(piece.output_grads.to(left.dtype), left)
        hashes.columns.write_count_sketch(piece.inputs.to(right.dtype), right)
    else:
        _one_hot(piece, hashes.rows, left)
        hashes.columns.write_count_sketch(piece.output_grads.to(right.dtype), right)


def _one_hot(piece: RowSums, rows: AxisHash, out: torch.Tensor) -> None:
    signs = rows.signs[piece.rows] * piece.held
    out.zero_()
    out.scatter_(-1, rows.buckets[piece.rows][..., None], signs.to(out.dtype)[..., None])
