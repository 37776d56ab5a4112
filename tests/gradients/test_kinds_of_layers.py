"""Kinds of layers that no tiny model has, and settings under which samples have no gradients."""

from __future__ import annotations

import pytest
import torch
from ranks import Layout, on_layout
from tiny_models import MODELS

from megatron_direct.config import Job
from megatron_direct.errors import UserError
from megatron_direct.gradients import transformer_engine
from megatron_direct.gradients.hooks import PieceHooks
from megatron_direct.mcore import model as models
from megatron_direct.mcore.shards import parameter_shards


class _NormAndLinear(torch.nn.Module):
    """A norm and a linear layer with the parameters that Transformer Engine's fused layer has."""

    eps, sequence_parallel = 1e-5, False

    def __init__(self, normalization: str, zero_centered: bool):
        super().__init__()
        self.normalization, self.zero_centered_gamma = normalization, zero_centered
        generator = torch.Generator().manual_seed(0)
        for name, shape in (("weight", (5, 4)), ("bias", (5,)), ("layer_norm_weight", (4,)),
                            ("layer_norm_bias", (4,))):
            self.register_parameter(name, torch.nn.Parameter(
                torch.randn(shape, generator=generator, dtype=torch.float64)))

    def forward(self, x):
        scale = self.layer_norm_weight + (1 if self.zero_centered_gamma else 0)
        if self.normalization == "LayerNorm":
            z = torch.nn.functional.layer_norm(x, (4,), scale, self.layer_norm_bias, self.eps)
        else:
            z = torch.nn.functional.rms_norm(x, (4,), scale, self.eps)
        return torch.nn.functional.linear(z, self.weight, self.bias)


def _of_norm_and_linear(_model, _layout, normalization, zero_centered):
    """[(name, per-sample gradients by the hook, by autograd)]."""
    layer = _NormAndLinear(normalization, zero_centered)
    generator = torch.Generator().manual_seed(1)
    x, output_grads = (torch.randn(3, 2, width, generator=generator, dtype=torch.float64)
                       for width in (4, 5))
    watch = transformer_engine.norm_and_column_parallel(layer, (x,), {}, None)
    with torch.no_grad():
        found = {id(parameter): piece.matrices() for parameter, piece in watch(output_grads)}
    compared = []
    for name, parameter in layer.named_parameters():
        truth = [torch.autograd.grad((layer(x[:, b]) * output_grads[:, b]).sum(), parameter,
                                     allow_unused=True)[0] for b in range(2)]
        if truth[0] is None:  # RMSNorm has no bias
            assert id(parameter) not in found
            continue
        compared.append((name, found[id(parameter)].flatten(1).numpy(),
                         torch.stack(truth).flatten(1).numpy()))
    return compared


@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("zero_centered", [False, True])
def test_a_fused_norm_and_linear_layer(normalization, zero_centered):
    compared, = on_layout(Layout(), _of_norm_and_linear, MODELS["llama-tied"], normalization,
                          zero_centered)
    assert {"weight", "bias", "layer_norm_weight"} <= {name for name, *_ in compared}
    for name, found, truth in compared:
        assert abs(found - truth).max() < 1e-12, name


def _refusals(model, layout):
    chunks = models.build(Job(model, layout))
    shards = parameter_shards(chunks)
    for field, value, match in (
            ("moe_aux_loss_coeff", 0.01, "--moe-aux-loss-coeff 0"),
            ("moe_z_loss_coeff", 1e-3, "no --moe-z-loss-coeff"),
            ("moe_expert_capacity_factor", 1.0, "no --moe-expert-capacity-factor"),
            ("moe_input_jitter_eps", 0.1, "no --moe-input-jitter-eps"),
            ("moe_router_load_balancing_type", "sinkhorn", "--moe-router-load-balancing-type"),
            ("moe_shared_expert_overlap", True, "no --moe-shared-expert-overlap"),
            ("add_bias_linear", True, "--disable-bias-linear")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chunks[0].config, field, value)
            with pytest.raises(UserError, match=match), \
                    PieceHooks(chunks, shards, lambda *_: None):
                pass


def test_routing_that_ties_samples_together_is_refused():
    on_layout(Layout(), _refusals, MODELS["mixtral"])


def _exact_products(model, layout):
    from megatron_direct.curvature.requirements import require_exact_products

    with pytest.raises(UserError) as caught:
        require_exact_products(models.build(Job(model, layout)))
    return str(caught.value)


def test_exact_products_of_experts_are_refused():
    message, = on_layout(Layout(), _exact_products, MODELS["mixtral"])
    assert "no --num-experts" in message and "--curvature fisher" in message
