"""The layers of a HybridModel: halves of ``local``'s, and Mamba layers.

Megatron's only spec of a hybrid model is of Transformer Engine's layers. Here each layer is
``local``'s, with attention or MLP alone; the names of weights in checkpoints are those of
Transformer Engine's spec, as ``local``'s are.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_direct.errors import UserError
from megatron_direct.mcore import compat
from megatron_direct.mcore.specs import local, mamba

# What not all supported versions have: what it is, and where it came.
_SINCE = {
    "mla_layer": "latent attention (--hybrid-layer-pattern with +). Install 0.19",
    "mtp_block_spec": "prediction heads. Leave them out with --mtp-num-layers 0, or install 0.17",
}


def stack_spec(transformer_config, core_attention: type | None = None):
    """Megatron's spec of the stack of layers; core_attention: as ``local.block_spec``'s."""
    from megatron.core.transformer.spec_utils import ModuleSpec

    stack, kinds_of_layers = compat.hybrid_stack()
    dense = local.one_layer(transformer_config, False, core_attention)
    layers = {"attention_layer": _attention_alone(dense), "mlp_layer": _mlp_alone(dense),
              "mamba_layer": mamba.one_layer(transformer_config)}
    if transformer_config.multi_latent_attention:
        layers["mla_layer"] = layers.pop("attention_layer")
    if transformer_config.num_moe_experts is not None:
        layers["moe_layer"] = _mlp_alone(
            local.one_layer(transformer_config, True, core_attention))
    if transformer_config.mtp_num_layers:
        layers["mtp_block_spec"] = _prediction_heads(local.norm_class(transformer_config))
    known = {field.name for field in dataclasses.fields(kinds_of_layers)}
    for missing in layers.keys() - known:
        raise UserError(f"the HybridModel of megatron-core {compat.version()} has no "
                        f"{_SINCE[missing]} or later.")
    return ModuleSpec(module=_stack_with_norm(stack, transformer_config),
                      submodules=kinds_of_layers(**layers))


def _prediction_heads(norm: type):
    """Megatron builds each head's layers from the pattern, and of the kinds that the stack has."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear
    from megatron.core.transformer.multi_token_prediction import (
        MultiTokenPredictionBlock,
        MultiTokenPredictionBlockSubmodules,
        MultiTokenPredictionLayer,
        MultiTokenPredictionLayerSubmodules,
    )
    from megatron.core.transformer.spec_utils import ModuleSpec

    head = ModuleSpec(module=MultiTokenPredictionLayer,
                      submodules=MultiTokenPredictionLayerSubmodules(
                          enorm=norm, hnorm=norm, layer_norm=norm, eh_proj=ColumnParallelLinear))
    return ModuleSpec(module=MultiTokenPredictionBlock,
                      submodules=MultiTokenPredictionBlockSubmodules(layer_specs=[head]))


def _attention_alone(spec):
    from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp

    return dataclasses.replace(spec, submodules=dataclasses.replace(
        spec.submodules, pre_mlp_layernorm=IdentityOp, mlp=IdentityOp, mlp_bda=IdentityFuncOp))


def _mlp_alone(spec):
    from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp

    return dataclasses.replace(spec, submodules=dataclasses.replace(
        spec.submodules, input_layernorm=IdentityOp, self_attention=IdentityOp,
        self_attn_bda=IdentityFuncOp))


def _stack_with_norm(stack: Any, transformer_config) -> type:
    """Megatron's stack, whose last norm is Transformer Engine's, with one of ``local``'s."""
    norm = local.norm_class(transformer_config)

    class Stack(stack):
        def __init__(self, *arguments, **keywords):
            super().__init__(*arguments, **keywords, post_layer_norm=False)
            self.post_layer_norm = True
            if self.post_process:
                self.final_norm = norm(transformer_config, transformer_config.hidden_size,
                                       transformer_config.layernorm_epsilon)

    return Stack
