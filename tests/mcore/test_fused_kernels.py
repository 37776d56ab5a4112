"""Kernels for a GPU against what they take the place of: by Triton's interpreter without a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Each side rounds to bfloat16, Megatron's after each step.
BARS = {torch.float32: 1e-5, torch.bfloat16: 2**-5}


def _twice(dtype: torch.dtype, *shape: int) -> list[torch.Tensor]:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    return [values.clone().requires_grad_(), values.clone().requires_grad_()]


def _assert_close_with_gradients(ours: tuple, theirs: tuple, grads: torch.Tensor) -> None:
    """Of (output, input) each, given the gradient of the output."""
    for output, _ in (ours, theirs):
        output.backward(grads)
    bar = BARS[grads.dtype]
    torch.testing.assert_close(ours[0], theirs[0], atol=bar, rtol=bar)
    torch.testing.assert_close(ours[1].grad, theirs[1].grad, atol=bar, rtol=bar)


@pytest.mark.parametrize("dtype", BARS, ids=str)
@pytest.mark.parametrize(("width", "turning"), [(12, 12), (12, 8), (16, 16)])
def test_rotary_embeddings(dtype, width, turning):
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    from megatron_direct.mcore.specs import rotary_kernel

    ours, theirs = _twice(dtype, 9, 2, 3, width + 4)
    angles = 50 * torch.rand(9, 1, 1, turning // 2, device=DEVICE)
    angles = torch.cat([angles, angles], -1)
    found = rotary_kernel.turned(ours[..., 2:-2], angles.cos(), angles.sin())
    expected = _apply_rotary_pos_emb_bshd(theirs[..., 2:-2], angles)
    grads = torch.randn(9, 3, 2, width, device=DEVICE).to(dtype).transpose(1, 2)
    _assert_close_with_gradients((found, ours), (expected, theirs), grads)


@pytest.mark.parametrize("dtype", BARS, ids=str)
@pytest.mark.parametrize("width", [7, 1500])
def test_swiglu(dtype, width):
    from megatron_direct.mcore.specs import swiglu_kernel

    ours, theirs = _twice(dtype, 5, 2, 2 * width)
    found = swiglu_kernel.gated(ours)
    gate, up = theirs.float().chunk(2, dim=-1)
    expected = (torch.nn.functional.silu(gate) * up).to(dtype)
    grads = torch.randn(2, 5, width, device=DEVICE).to(dtype).transpose(0, 1)
    _assert_close_with_gradients((found, ours), (expected, theirs), grads)


@pytest.mark.parametrize("dtype", BARS, ids=str)
@pytest.mark.parametrize("vocabulary", [101, 5000])
def test_losses(dtype, vocabulary):
    from megatron_direct.mcore.specs import cross_entropy_kernel

    ours, theirs = _twice(dtype, 4, 3, vocabulary)
    labels = torch.randint(0, vocabulary, (3, 4), device=DEVICE)
    found = cross_entropy_kernel.token_losses(ours, labels)
    expected = torch.nn.functional.cross_entropy(theirs.float().permute(1, 2, 0), labels,
                                                 reduction="none")
    grads = torch.randn(3, 4, device=DEVICE)
    found.backward(grads)
    expected.backward(grads)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)  # in float32 always
    torch.testing.assert_close(ours.grad, theirs.grad, atol=BARS[dtype] / 4, rtol=BARS[dtype])
