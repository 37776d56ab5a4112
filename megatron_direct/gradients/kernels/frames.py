"""Sketches by way of matrix products of the count-sketched factors.

The convolution of two count sketches is the sum of their outer product along (row + column) mod k.
So C1(x)^T C2(y), one product for all tokens of a sample, is a k x k *frame*; the frames of all
layers add up, and a sample's frame is summed along its coordinates once, at the end. A token costs
2 k^2 operations per layer, whatever its width, in the products that a GPU is best at: bfloat16
factors are multiplied as they are, and every sum is in float32.

Three things keep the memory traffic down, which is what else it costs:

- Frames are held for the samples of one micro-batch at a time, and summed when the next begins.
- The factors of several layers are buffered, side by side along the tokens, so that one product
  adds them all to the frames.
- An axis that is much narrower than k can stay as it is, if no two of its indices share a bucket:
  the product is then of the axis's own width, and its rows are added to those rows of the frame
  that are their buckets. Every layer has buckets of its own, so such a product is its layer's alone
  and is not buffered. On a CPU its entries are added at their coordinates, row + column, and no
  frame is made: to fill one with zeros and to sum it takes longer than a narrow layer's product.

Shapes: t tokens of a sample, n samples, k the size of the sketch.
"""

from __future__ import annotations

import torch

from megatron_direct.gradients.hashes import AxisHash, Hashes, folded
from megatron_direct.gradients.kernels import costs as cost_tables
from megatron_direct.gradients.kernels.buffer import FactorBuffer, product
from megatron_direct.gradients.kernels.costs import Coefficients
from megatron_direct.gradients.kernels.entries import scatter
from megatron_direct.gradients.kernels.factors import count_sketched
from megatron_direct.gradients.kernels.kernel import Kernel, Work, factor_dtype
from megatron_direct.gradients.kernels.segments import Blocks, Segments
from megatron_direct.gradients.pieces import Entries, OuterProducts, Piece, RoutedOuterProducts

# Tokens of a sample that are buffered for one product. To read and write a frame takes an H100 as
# long as to multiply the factors of 1,700 tokens: with 4,096 the products take most of the time. On
# a CPU they are so slow that a buffer makes no difference.
BUFFERED_TOKENS = {"cpu": 0, "cuda": 4096}
_CALLS = 6  # operations on tensors for a layer, about


class ByFrames(Kernel):
    name = "frames"

    def __init__(self, num_samples: int, size: int, device: torch.device):
        self._size = size
        self._sums = torch.zeros(num_samples, size, device=device)
        self._scatters = device.type == "cpu"
        # At coordinates before the mod k.
        self._scattered = torch.zeros(num_samples if self._scatters else 0, 2 * size, device=device)
        self._costs = cost_tables.of(device.type)
        self._buffer = FactorBuffer(BUFFERED_TOKENS[device.type])
        self._first = 0  # the sample of the first frame
        self._frames = torch.empty(0, size, size, device=device)

    @staticmethod
    def takes(piece: Piece, device_type: str) -> bool:
        return not isinstance(piece, Entries)

    @staticmethod
    def cost(work: Work, costs: Coefficients) -> float:
        whole = _cost_of_whole_frames(work, costs)
        return min(whole, _cost_of_own_width(work, costs)) if _may_stay(work) else whole

    def add(self, first: int, piece: Piece, hashes: Hashes,
            scale: torch.Tensor | None = None) -> None:
        assert scale is None, "factors cannot be scaled entry by entry"
        assert not isinstance(piece, Entries), "refused by takes()"
        dtype = factor_dtype(piece)
        if isinstance(piece, OuterProducts) and self._keeps_an_axis(piece, hashes):
            self._add_at_own_width(first, piece, hashes, dtype)
            return
        frames = self._frames_of(first, piece.num_samples)
        if isinstance(piece, RoutedOuterProducts):
            _add_routed(frames, piece, hashes, dtype)
        else:
            left, right = self._buffer.reserve(frames, len(piece.output_grads), dtype)
            count_sketched(piece, hashes, left.transpose(0, 1), right.transpose(0, 1))

    def _add_at_own_width(self, first: int, piece: OuterProducts, hashes: Hashes,
                          dtype: torch.dtype) -> None:
        kept, products = _at_own_width(piece, hashes, dtype)
        if self._scatters:
            scatter(self._scattered[first: first + piece.num_samples],
                    lambda rows: products[:, rows], kept.buckets, torch.arange(self._size))
        else:
            self._frames_of(first, piece.num_samples).index_add_(1, kept.buckets, products)

    def total(self) -> torch.Tensor:
        self._sum_frames()
        if not self._scatters:
            return self._sums
        return self._sums + self._scattered[:, :self._size] + self._scattered[:, self._size:]

    def _frames_of(self, first: int, count: int) -> torch.Tensor:
        """[count, k, k] frames of these samples; those of an earlier micro-batch are summed up."""
        begin = first - self._first
        if begin < 0 or begin + count > len(self._frames):
            self._sum_frames()
            if len(self._frames) != count:
                self._frames = self._frames.new_zeros(count, self._size, self._size)
            self._first, begin = first, 0
        return self._frames[begin: begin + count]

    def _sum_frames(self) -> None:
        self._buffer.flush()
        if len(self._frames):
            self._sums[self._first: self._first + len(self._frames)] += folded(self._frames)
            self._frames.zero_()

    def _keeps_an_axis(self, piece: OuterProducts, hashes: Hashes) -> bool:
        work = Work.of(piece, hashes)
        return (_may_stay(work) and narrower_axis(hashes).rounds == 1 and
                _cost_of_own_width(work, self._costs) < _cost_of_whole_frames(work, self._costs))


def _add_routed(frames: torch.Tensor, piece: RoutedOuterProducts, hashes: Hashes,
                dtype: torch.dtype) -> None:
    blocks = Blocks.of(Segments.of(piece.samples, piece.num_samples))
    left = hashes.rows.count_sketch(piece.output_grads.to(dtype))
    right = hashes.columns.count_sketch(piece.inputs.to(dtype))
    blocks.add_products(frames, blocks.take(left), blocks.take(right), product)


def _at_own_width(piece: OuterProducts, hashes: Hashes, dtype: torch.dtype,
                  ) -> tuple[AxisHash, torch.Tensor]:
    """(narrower axis, products [n, its width, k]): rows and columns may change places."""
    kept, other = hashes.rows, hashes.columns
    kept_values, other_values = piece.output_grads.to(dtype), piece.inputs.to(dtype)
    if kept is not narrower_axis(hashes):
        kept, other = other, kept
        kept_values, other_values = other_values, kept_values
    left = (kept_values * kept.signs.to(dtype)).transpose(0, 1)
    right = left.new_empty(*left.shape[:2], other.size)
    other.write_count_sketch(other_values, right.transpose(0, 1))
    return kept, product(left, right)


def narrower_axis(hashes: Hashes) -> AxisHash:
    return hashes.rows if hashes.rows.width <= hashes.columns.width else hashes.columns


def _may_stay(work: Work) -> bool:
    """Whether an axis is narrow enough for a product of its own width."""
    return min(work.outputs, work.inputs) < work.size and not (work.lookup or work.routed)


def _cost_of_whole_frames(work: Work, costs: Coefficients) -> float:
    tokens, frames = work.tokens, 1.0
    if work.routed:
        tokens, frames = 1.25 * tokens, 4.0  # blocks are filled up, and have products of their own
    elif buffered := BUFFERED_TOKENS[work.device_type]:
        frames = min(1.0, tokens / buffered)
    return _CALLS * costs.call + work.samples * (
        work.tokens * work.gathered * costs.gathered
        + work.size**2 * (tokens * _multiply_add(work, costs) + frames * costs.frame))


def _cost_of_own_width(work: Work, costs: Coefficients) -> float:
    width = min(work.outputs, work.inputs)
    gathered = work.gathered - work.size + width
    # On a GPU the product is written, read, and added to rows of the frame: twice its traffic.
    added = costs.scattered_entry if work.device_type == "cpu" else 2 * costs.frame
    return (_CALLS + 2) * costs.call + work.samples * (
        work.tokens * gathered * costs.gathered
        + width * work.size * (work.tokens * _multiply_add(work, costs) + added))


def _multiply_add(work: Work, costs: Coefficients) -> float:
    return costs.bf16_multiply_add if work.bf16 else costs.multiply_add
