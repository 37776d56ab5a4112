"""Sketches by way of matrix products of the count-sketched factors.

The convolution of two count sketches is the sum of their outer product along (row + column) mod k.
So C1(x)^T C2(y), one product for all tokens of a sample, is a k x k *frame*; the frames of all
layers add up, and a sample's frame is summed along its coordinates once, at the end. A token costs
2 k^2 operations per layer, whatever its width, in the products that a GPU is best at: bfloat16
factors are multiplied as they are, and every sum is in float32. It is for the matrices whose axes
both have k buckets, such as the vocabulary's.

Two things keep the memory traffic down, which is what else it costs: frames are held for the
samples of one micro-batch at a time, and the factors of several layers are buffered, side by side
along the tokens, so that one product adds them all to the frames.

Shapes: t tokens of a sample, n samples, k the size of the sketch.
"""

from __future__ import annotations

import torch

from megatron_direct.gradients.hashes import Hashes
from megatron_direct.gradients.kernels.buffer import FactorBuffer, product
from megatron_direct.gradients.kernels.costs import Coefficients
from megatron_direct.gradients.kernels.factors import count_sketched
from megatron_direct.gradients.kernels.held_frames import HeldFrames
from megatron_direct.gradients.kernels.kernel import Kernel, Work, factor_dtype
from megatron_direct.gradients.kernels.segments import add_products_by_sample
from megatron_direct.gradients.pieces import Entries, Piece, RoutedOuterProducts

# Tokens of a sample that are buffered for one product. To read and write a frame takes an H100 as
# long as to multiply the factors of 1,700 tokens: with 4,096 the products take most of the time. On
# a CPU they are so slow that a buffer makes no difference.
BUFFERED_TOKENS = {"cpu": 0, "cuda": 4096}
_CALLS = 6  # operations on tensors for a layer, about


class ByFrames(Kernel):
    name = "frames"

    def __init__(self, num_samples: int, size: int, device: torch.device):
        self._buffer = FactorBuffer(BUFFERED_TOKENS[device.type])
        self._held = HeldFrames(num_samples, size, size, device, self._buffer.flush)

    @staticmethod
    def takes(piece: Piece, hashes: Hashes, device_type: str) -> bool:
        return not isinstance(piece, Entries) and hashes.narrowed is None

    @staticmethod
    def cost(work: Work, costs: Coefficients) -> float:
        tokens, frames = work.tokens, 1.0
        if work.routed:
            # Blocks are filled up, and have products of their own.
            tokens, frames = 1.25 * tokens, 4.0
        elif buffered := BUFFERED_TOKENS[work.device_type]:
            frames = min(1.0, tokens / buffered)
        return _CALLS * costs.call + work.samples * (
            work.tokens * work.gathered * costs.gathered
            + work.size**2 * (tokens * work.multiply_add(costs) + frames * costs.frame))

    def add(self, first: int, piece: Piece, hashes: Hashes,
            scale: torch.Tensor | None = None) -> None:
        assert scale is None, "factors cannot be scaled entry by entry"
        assert not isinstance(piece, Entries), "refused by takes()"
        dtype = factor_dtype(piece)
        frames = self._held.of(first, piece.num_samples)
        if isinstance(piece, RoutedOuterProducts):
            _add_routed(frames, piece, hashes, dtype)
        else:
            left, right = self._buffer.reserve(frames, len(piece.output_grads), dtype)
            count_sketched(piece, hashes, left.transpose(0, 1), right.transpose(0, 1))

    def total(self) -> torch.Tensor:
        return self._held.total()


def _add_routed(frames: torch.Tensor, piece: RoutedOuterProducts, hashes: Hashes,
                dtype: torch.dtype) -> None:
    left = hashes.rows.count_sketch(piece.output_grads.to(dtype))
    right = hashes.columns.count_sketch(piece.inputs.to(dtype))
    add_products_by_sample(frames, piece.samples, left, right, product)
