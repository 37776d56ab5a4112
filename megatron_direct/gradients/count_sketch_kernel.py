"""The count sketch of a factor in one pass over it, on a GPU.

A program takes two tokens and all k buckets. It goes over the factor in slices of k numbers, reads
each slice in order, and picks its numbers for the buckets in shared memory, where reading in no
order costs little. Two tokens' bfloat16 numbers travel as the halves of one 32-bit word, so that
they are picked together. Every sum is in float32 and in one order.

Shapes: s positions, b samples, w the width of the factor, k the size of the sketch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_MOST_BUCKETS = 8192  # what shared memory and registers of a program hold
_BUCKETS_PER_WARP = 256


def slices_table(buckets: torch.Tensor, signs: torch.Tensor, size: int) -> torch.Tensor | None:
    """[slices, rounds, k] which number of a slice goes to a bucket: s(i) (1 + i), zero for none.

    buckets, signs: [w] of ``AxisHash``. rounds: the most numbers of a slice that share a bucket: 1
    for whole blocks of k indices. None if k is more than the kernel takes.
    """
    if size > _MOST_BUCKETS:
        return None
    width = len(buckets)
    index = torch.arange(width, device=buckets.device)
    slice_of = index // size
    cell = slice_of * size + buckets  # where the numbers of one round meet
    order = torch.argsort(cell, stable=True)
    in_order = cell[order]
    place = torch.arange(width, device=buckets.device) - torch.searchsorted(in_order, in_order)
    rounds = int(place.max()) + 1
    table = torch.zeros(-(-width // size), rounds, size, dtype=torch.int16, device=buckets.device)
    table[slice_of[order], place, buckets[order]] = (
        signs * (1 + index % size)).to(torch.int16)[order]
    return table


def write_count_sketches(values: torch.Tensor, table: torch.Tensor, places: torch.Tensor) -> None:
    """Into places [s, b, k] of any strides, float32 or bfloat16, of values [s, b, w], either."""
    if values.stride(-1) != 1:
        values = values.contiguous()
    slices, rounds, size = table.shape
    width, packed = values.shape[-1], values.dtype == torch.bfloat16
    if packed:
        values = values.view(torch.int16)
    rows = values.shape[0] * values.shape[1]
    if not rows:
        return
    block = triton.next_power_of_2(size)
    _kernel[(triton.cdiv(rows, 2),)](
        values, table, places, rows, values.shape[1], slices, *values.stride()[:2],
        *places.stride(), width, SIZE=size, BLOCK=block,
        SOURCE=min(block, triton.next_power_of_2(width)), ROUNDS=rounds, PACKED=packed,
        num_warps=max(1, min(16, block // _BUCKETS_PER_WARP)))


@triton.jit(do_not_specialize=["rows", "samples", "slices"])  # one compilation for all of them
def _kernel(values, table, places, rows, samples, slices, values_s, values_b, places_s, places_b,
            places_k, width, SIZE: tl.constexpr, BLOCK: tl.constexpr, SOURCE: tl.constexpr,
            ROUNDS: tl.constexpr, PACKED: tl.constexpr):
    first = 2 * tl.program_id(0)
    second = tl.minimum(first + 1, rows - 1)  # an odd last row is computed twice, and written once
    s, b = (first // samples).to(tl.int64), (first % samples).to(tl.int64)
    t, c = (second // samples).to(tl.int64), (second % samples).to(tl.int64)
    of_first = values + s * values_s + b * values_b
    of_second = values + t * values_s + c * values_b
    buckets, numbers = tl.arange(0, BLOCK), tl.arange(0, SOURCE)
    is_bucket = buckets < SIZE
    sums = tl.zeros((BLOCK,), tl.float32)
    sums_of_second = tl.zeros((BLOCK,), tl.float32)
    for piece in range(slices):
        column = piece * SIZE + numbers
        held = (numbers < SIZE) & (column < width)
        x = tl.load(of_first + column, mask=held, other=0)
        y = tl.load(of_second + column, mask=held, other=0)
        if PACKED:
            x = (x.to(tl.int32) & 0xFFFF) | (y.to(tl.int32) << 16)
        for turn in tl.static_range(ROUNDS):
            code = tl.load(table + (piece * ROUNDS + turn) * SIZE + buckets, mask=is_bucket,
                           other=0).to(tl.int32)
            number = tl.maximum(tl.abs(code) - 1, 0)
            sign = (code > 0).to(tl.float32) - (code < 0).to(tl.float32)
            picked = tl.gather(x, number, 0)
            if PACKED:  # a bfloat16 is the upper half of the same float32
                sums += sign * (picked << 16).to(tl.float32, bitcast=True)
                sums_of_second += sign * (picked & -65536).to(tl.float32, bitcast=True)
            else:
                sums += sign * picked
                sums_of_second += sign * tl.gather(y, number, 0)
    out = places + s * places_s + b * places_b + buckets * places_k
    tl.store(out, sums.to(places.dtype.element_ty), mask=is_bucket)
    out = places + t * places_s + c * places_b + buckets * places_k
    tl.store(out, sums_of_second.to(places.dtype.element_ty), mask=is_bucket & (second > first))
