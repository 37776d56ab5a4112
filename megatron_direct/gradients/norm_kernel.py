"""The gradients of a norm's weight and bias, sample by sample, in one pass over its tokens.

y = x_hat * weight (+ bias): the weight's gradient is the sum of x_hat * dy over a sample's tokens,
the bias's that of dy. A program sums some of a sample's tokens, in float32 and in one order; what
the programs found is added up by torch. Shapes: s positions, b samples, c heads, h width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_TOKENS = 32  # of a program
_NUMBERS_AT_ONCE = 4096
WIDEST = 16384  # what a program's registers hold


def sums_over_tokens(inputs: torch.Tensor, output_grads: torch.Tensor, eps: float, centred: bool,
                     ) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[b, h] float32 gradients of the weight, and of the bias if ``centred``.

    inputs, output_grads: [s, b, h] or [s, b, c, h], float32 or bfloat16, of any strides.
    """
    if inputs.dim() == 3:
        inputs, output_grads = inputs[:, :, None], output_grads[:, :, None]
    inputs, output_grads = (x if x.stride(-1) == 1 else x.contiguous()
                            for x in (inputs, output_grads))
    length, samples, heads, width = inputs.shape
    programs = triton.cdiv(length * heads, _TOKENS)
    found = inputs.new_empty(2 if centred else 1, programs, samples, width, dtype=torch.float32)
    block = triton.next_power_of_2(width)
    rows = max(1, min(_TOKENS, _NUMBERS_AT_ONCE // block))
    _kernel[(programs, samples)](
        inputs, output_grads, found, length * heads, heads, *inputs.stride()[:3],
        *output_grads.stride()[:3], found[0].numel(), width, eps, CENTRED=centred, BLOCK=block,
        ROWS=rows, TOKENS=_TOKENS, num_warps=8)
    totals = found.sum(1)
    return totals[0], totals[1] if centred else None


@triton.jit(do_not_specialize=["tokens", "of_bias"])
def _kernel(inputs, output_grads, found, tokens, heads, input_s, input_b, input_c, grad_s, grad_b,
            grad_c, of_bias, width, eps, CENTRED: tl.constexpr, BLOCK: tl.constexpr,
            ROWS: tl.constexpr, TOKENS: tl.constexpr):
    b = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_column = columns < width
    of_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    of_outputs = tl.zeros((ROWS, BLOCK), tl.float32)
    for begin in range(0, TOKENS, ROWS):
        token = tl.program_id(0) * TOKENS + begin + tl.arange(0, ROWS)
        held = (token < tokens)[:, None] & is_column[None, :]
        s, c = (token // heads).to(tl.int64), (token % heads).to(tl.int64)
        at = (s * input_s + b * input_b + c * input_c)[:, None] + columns[None, :]
        x = tl.load(inputs + at, mask=held, other=0).to(tl.float32)
        at = (s * grad_s + b * grad_b + c * grad_c)[:, None] + columns[None, :]
        dy = tl.load(output_grads + at, mask=held, other=0).to(tl.float32)
        if CENTRED:
            x = tl.where(held, x - (tl.sum(x, 1) / width)[:, None], 0.0)
            of_outputs += dy
        x *= tl.rsqrt(tl.sum(x * x, 1) / width + eps)[:, None]
        of_weight += x * dy
    place = found + (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + b) * width + columns
    tl.store(place, tl.sum(of_weight, 0), mask=is_column)
    if CENTRED:
        tl.store(place + of_bias, tl.sum(of_outputs, 0), mask=is_column)
