"""Transformer Engine's layers, where it is installed.

As Megatron's spec of them, but for the norms in front of linear layers, which are layers of their
own: what a norm fused with a linear layer puts out is seen by nobody, and a sketch would have to
multiply by the weight once more for the norm's gradient. Embedding, output layer, router and loss
are Megatron's. The names of weights in checkpoints are those of Megatron's spec.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import torch

from megatron_direct.errors import UserError
from megatron_direct.mcore import compat
from megatron_direct.mcore.specs import fused, local
from megatron_direct.mcore.specs.kinds import KindsOfClasses, LayerKind


def kinds_of_classes() -> KindsOfClasses:
    """Nothing where Transformer Engine is not installed."""
    from megatron.core.extensions import transformer_engine as megatron_te

    if not megatron_te.HAVE_TE:
        return ()
    import transformer_engine.pytorch as te

    return (
        (megatron_te.TELayerNormColumnParallelLinear, LayerKind.NORM_AND_COLUMN_PARALLEL),
        (megatron_te.TERowParallelLinear, LayerKind.ROW_PARALLEL),
        # TEColumnParallelLinear, and linear layers that are not divided.
        (megatron_te.TELinear, LayerKind.COLUMN_PARALLEL),
        (te.LayerNorm, LayerKind.LAYER_NORM),
        (te.RMSNorm, LayerKind.RMS_NORM),
    )


def block_spec(transformer_config, vp_stage: int | None):
    """The layers that this rank builds of one model chunk.

    Raises UserError where Transformer Engine is not installed.
    """
    from megatron.core.extensions import transformer_engine as megatron_te
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    if not megatron_te.HAVE_TE:
        raise UserError("--transformer-impl transformer_engine: Transformer Engine cannot be "
                        "imported here. Use an image of NGC, which has it, or "
                        "--transformer-impl local.")
    grouped = copy.copy(transformer_config)
    grouped.moe_grouped_gemm = transformer_config.num_moe_experts is not None
    block = get_gpt_decoder_block_spec(grouped, use_transformer_engine=True, vp_stage=vp_stage)
    return dataclasses.replace(block, layer_specs=[_layer(spec) for spec in block.layer_specs])


def stack_spec(transformer_config):
    """There is none: flags that ask for one are refused before."""
    raise AssertionError("hybrid models are built of local layers")


def finish(chunk: torch.nn.Module) -> None:
    """What is fused outside of core attention; and norms are no more in a checkpoint than their
    parameters, as local ones."""
    import transformer_engine.pytorch as te

    fused.fuse_around_attention(chunk)
    for module in chunk.modules():
        if isinstance(module, (te.LayerNorm, te.RMSNorm)):
            module.sharded_state_dict = functools.partial(_parameters_alone, module)


def _layer(spec):
    from megatron.core.extensions import transformer_engine as megatron_te

    norm, linear = megatron_te.TENorm, megatron_te.TEColumnParallelLinear
    parts = spec.submodules
    has_experts = compat.is_mixture_of_experts(parts.mlp)
    mlp = compat.with_submodules(parts.mlp, router=local.router_class()) if has_experts \
        else compat.with_submodules(parts.mlp, linear_fc1=linear)
    return dataclasses.replace(spec, submodules=dataclasses.replace(
        parts, mlp=mlp, input_layernorm=norm, pre_mlp_layernorm=norm,
        self_attention=compat.with_submodules(parts.self_attention, linear_qkv=linear),
        sharded_state_dict_keys_map=local.checkpoint_names(False, has_experts)))


def _parameters_alone(norm: torch.nn.Module, prefix: str = "", sharded_offsets: tuple = (),
                      metadata: dict | None = None, **_unused: Any) -> dict:
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

    return make_sharded_tensors_for_checkpoint(
        dict(norm.named_parameters()), prefix, sharded_offsets=sharded_offsets)
