"""D H D against the dense product."""

from __future__ import annotations

import types

import torch

from megatron_direct.curvature.preconditioner import PreconditionedOperator


def test_products_are_those_of_the_matrix_that_is_scaled_from_both_sides():
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    whole = whole + whole.T
    scales = {"b": torch.rand(2, 2, generator=generator), "a": torch.rand(2, generator=generator)}
    space = types.SimpleNamespace(
        shards=[types.SimpleNamespace(name=name) for name in scales], dtype=torch.float64,
        join=lambda parts: torch.cat([part.flatten() for part in parts]))
    operator = types.SimpleNamespace(matvec=lambda vector: whole @ vector, num_samples=9)
    scaled = PreconditionedOperator(operator, space, scales)
    vector = torch.randn(6, generator=generator, dtype=torch.float64)
    diagonal = torch.diag(torch.cat([scales["b"].flatten(), scales["a"]]).double())
    torch.testing.assert_close(scaled.matvec(vector), diagonal @ whole @ diagonal @ vector)
    assert scaled.num_samples == 9  # the rest is the operator's
