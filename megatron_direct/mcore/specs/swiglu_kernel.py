"""SwiGLU in one pass over what it takes, and its gradient in another.

y = silu(a) * b, where a and b are the halves of the last axis: [..., 2 f] in and [..., f] out. All
arithmetic is in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_BLOCK = 1024


def gated(halves: torch.Tensor) -> torch.Tensor:
    """[..., f] of float32 or bfloat16 [..., 2 f]."""
    return _Gated.apply(halves)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, halves: torch.Tensor) -> torch.Tensor:
        halves = halves.contiguous()
        ctx.save_for_backward(halves)
        width = halves.shape[-1] // 2
        out = halves.new_empty(*halves.shape[:-1], width)
        if out.numel():
            _forward[_grid(out)](halves, out, width, BLOCK=_BLOCK)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        halves, out_grads = ctx.saved_tensors[0], grads[0].contiguous()
        half_grads = torch.empty_like(halves)
        if half_grads.numel():
            _backward[_grid(out_grads)](halves, out_grads, half_grads, out_grads.shape[-1],
                                        BLOCK=_BLOCK)
        return half_grads


def _grid(out: torch.Tensor) -> tuple[int, int]:
    width = out.shape[-1]
    return out.numel() // width, triton.cdiv(width, _BLOCK)


@triton.jit
def _forward(halves, out, width, BLOCK: tl.constexpr):
    row, j = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(halves + 2 * row * width + j, mask=j < width, other=0).to(tl.float32)
    b = tl.load(halves + (2 * row + 1) * width + j, mask=j < width, other=0).to(tl.float32)
    y = a * tl.sigmoid(a) * b
    tl.store(out + row * width + j, y.to(out.dtype.element_ty), mask=j < width)


@triton.jit
def _backward(halves, out_grads, half_grads, width, BLOCK: tl.constexpr):
    row, j = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(halves + 2 * row * width + j, mask=j < width, other=0).to(tl.float32)
    b = tl.load(halves + (2 * row + 1) * width + j, mask=j < width, other=0).to(tl.float32)
    dy = tl.load(out_grads + row * width + j, mask=j < width, other=0).to(tl.float32)
    gate = tl.sigmoid(a)
    da, db = dy * b * gate * (1 + a * (1 - gate)), dy * a * gate
    out = half_grads.dtype.element_ty
    tl.store(half_grads + 2 * row * width + j, da.to(out), mask=j < width)
    tl.store(half_grads + (2 * row + 1) * width + j, db.to(out), mask=j < width)
