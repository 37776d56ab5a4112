"""Cross-entropy of each token that reads the logits twice, and makes no float32 copy of them.

The forward pass reads them once and keeps the logarithm of each token's sum of exponentials; the
backward pass reads them again and writes their gradient. All arithmetic is in float32. Shapes: s
positions, b samples, v vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_BLOCK = 4096  # numbers at once


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[b, s] float32, of float32 or bfloat16 logits [s, b, v] and labels [b, s] within 0 .. v - 1.
    """
    return _TokenLosses.apply(logits, labels)


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits, labels = logits.contiguous(), labels.contiguous()
        length, samples, vocabulary = logits.shape
        losses, log_sums = torch.empty(
            2, samples, length, dtype=torch.float32, device=logits.device)
        _forward[(length, samples)](logits, labels, losses, log_sums, vocabulary, BLOCK=_BLOCK,
                                    num_warps=8)
        ctx.save_for_backward(logits, labels, log_sums)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, labels, log_sums = ctx.saved_tensors
        length, samples, vocabulary = logits.shape
        logit_grads = torch.empty_like(logits)
        _backward[(length, samples, triton.cdiv(vocabulary, _BLOCK))](
            logits, labels, log_sums, grads[0].float().contiguous(), logit_grads, vocabulary,
            BLOCK=_BLOCK, num_warps=8)
        return logit_grads, None


@triton.jit
def _forward(logits, labels, losses, log_sums, vocabulary, BLOCK: tl.constexpr):
    s, b = tl.program_id(0), tl.program_id(1)
    row = logits + (s.to(tl.int64) * tl.num_programs(1) + b) * vocabulary
    token = b.to(tl.int64) * tl.num_programs(0) + s
    places = tl.arange(0, BLOCK)
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for begin in range(0, vocabulary, BLOCK):
        x = tl.load(row + begin + places, mask=begin + places < vocabulary,
                    other=float("-inf")).to(tl.float32)
        so_far = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - so_far) + tl.sum(tl.exp(x - so_far), 0)
        largest = so_far
    log_sum = largest + tl.log(total)
    label = tl.load(labels + token)
    of_label = tl.load(row + label, mask=(label >= 0) & (label < vocabulary), other=0)
    tl.store(log_sums + token, log_sum)
    tl.store(losses + token, log_sum - of_label.to(tl.float32))


@triton.jit
def _backward(logits, labels, log_sums, loss_grads, logit_grads, vocabulary, BLOCK: tl.constexpr):
    s, b = tl.program_id(0), tl.program_id(1)
    row = (s.to(tl.int64) * tl.num_programs(1) + b) * vocabulary
    token = b.to(tl.int64) * tl.num_programs(0) + s
    places = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    held = places < vocabulary
    x = tl.load(logits + row + places, mask=held, other=float("-inf")).to(tl.float32)
    probability = tl.exp(x - tl.load(log_sums + token))
    is_label = (places == tl.load(labels + token)).to(tl.float32)
    grad = (probability - is_label) * tl.load(loss_grads + token)
    tl.store(logit_grads + row + places, grad.to(logit_grads.dtype.element_ty), mask=held)
