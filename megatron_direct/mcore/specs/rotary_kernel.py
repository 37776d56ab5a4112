"""Rotary embeddings of heads, in one pass over them; the same kernel turns gradients back.

Number j of a head and number j + r / 2 are turned together, by an angle of their own; numbers from
r on stay. Shapes: s positions, b samples, c heads, d width of a head, r numbers that turn.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl


def turned(heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """[s, b, c, d] contiguous, of float32 or bfloat16 heads [s, b, c, d] of any strides.

    cosines, sines: [s, 1, 1, r] float32 of the angles, in which the second r / 2 repeat the first.
    """
    return _Turned.apply(heads, *(x.reshape(len(x), -1) for x in (cosines, sines)))


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor,
                ) -> torch.Tensor:
        ctx.save_for_backward(cosines, sines)
        return _by_kernel(heads, cosines, sines, forward=True)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cosines, sines = ctx.saved_tensors
        return _by_kernel(grads[0], cosines, sines, forward=False), None, None


def _by_kernel(heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, forward: bool,
               ) -> torch.Tensor:
    if heads.stride(-1) != 1:
        heads = heads.contiguous()
    length, samples, count, width = heads.shape
    half = cosines.shape[1] // 2
    out = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    if out.numel():
        _kernel[(length, samples)](
            heads, cosines, sines, out, count, width, *heads.stride()[:3], HALF=half,
            HALF_BLOCK=triton.next_power_of_2(half), REST=width - 2 * half,
            REST_BLOCK=triton.next_power_of_2(max(1, width - 2 * half)),
            HEADS_BLOCK=triton.next_power_of_2(count), FORWARD=forward, num_warps=4)
    return out


@triton.jit
def _kernel(heads, cosines, sines, out, count, width, stride_s, stride_b, stride_c,
            HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, REST: tl.constexpr,
            REST_BLOCK: tl.constexpr, HEADS_BLOCK: tl.constexpr, FORWARD: tl.constexpr):
    s, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    head, j = tl.arange(0, HEADS_BLOCK), tl.arange(0, HALF_BLOCK)
    cos = tl.load(cosines + s * (2 * HALF) + j, mask=j < HALF, other=0.0)[None, :]
    sin = tl.load(sines + s * (2 * HALF) + j, mask=j < HALF, other=0.0)[None, :]
    if not FORWARD:
        sin = -sin
    held = (head < count)[:, None] & (j < HALF)[None, :]
    from_here = heads + s * stride_s + b * stride_b + head[:, None] * stride_c
    to_here = out + (s * tl.num_programs(1) + b) * count * width + head[:, None] * width
    x = tl.load(from_here + j[None, :], mask=held, other=0).to(tl.float32)
    y = tl.load(from_here + HALF + j[None, :], mask=held, other=0).to(tl.float32)
    tl.store(to_here + j[None, :], (x * cos - y * sin).to(out.dtype.element_ty), mask=held)
    tl.store(to_here + HALF + j[None, :], (y * cos + x * sin).to(out.dtype.element_ty), mask=held)
    if REST > 0:
        j = tl.arange(0, REST_BLOCK)
        held = (head < count)[:, None] & (j < REST)[None, :]
        at = 2 * HALF + j[None, :]
        tl.store(to_here + at, tl.load(from_here + at, mask=held, other=0), mask=held)
