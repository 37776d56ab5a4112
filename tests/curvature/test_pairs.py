"""Derivatives of activations, against autograd, and the fused GELU against Megatron's own."""

from __future__ import annotations

import pytest
import torch
from ranks import run_on_ranks

from megatron_direct.curvature import pairs
from megatron_direct.mcore.model import fused_gelu

FUNCTIONS = {torch.nn.functional.silu: pairs.silu, torch.nn.functional.gelu: pairs.gelu,
             fused_gelu: pairs.tanh_gelu}


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_value_and_two_derivatives(function):
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64, requires_grad=True)
    value = function(x)
    first, = torch.autograd.grad(value.sum(), x, create_graph=True)
    second, = torch.autograd.grad(first.sum(), x)
    for found, expected in zip(FUNCTIONS[function](x.detach()), (value, first, second),
                               strict=True):
        torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-13)


def _of_megatron() -> float:
    """The largest difference from Megatron's kernel, which rounds sqrt(2 / pi) to eight digits."""
    from megatron.core.fusions.fused_bias_gelu import bias_gelu

    x, bias = torch.linspace(-6, 6, 1001, dtype=torch.float64), torch.tensor([0.25])
    return float((bias_gelu(bias, x) - fused_gelu(x + bias)).abs().max())


def test_the_fused_gelu_is_megatrons():
    assert run_on_ranks(1, _of_megatron)[0] < 1e-7
