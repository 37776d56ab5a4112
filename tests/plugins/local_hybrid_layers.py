"""Attention and MLP layers of a HybridModel that run without Transformer Engine.

    --spec local_hybrid_layers stack --hybrid-layer-pattern "*-*-"

for Megatron-LM's pretrain_hybrid.py, whose own specs are of Transformer Engine's layers alone.
"""

from __future__ import annotations

import dataclasses

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm


class Stack(HybridStack):
    """Its last norm is torch's, not Transformer Engine's."""

    def __init__(self, config, *arguments, **keywords):
        super().__init__(config, *arguments, **keywords, post_layer_norm=False)
        self.post_layer_norm = True
        if self.post_process:
            self.final_norm = WrappedTorchNorm(config, config.hidden_size, config.layernorm_epsilon)


def _without(spec, **submodules):
    return dataclasses.replace(spec,
                               submodules=dataclasses.replace(spec.submodules, **submodules))


_dense = get_gpt_layer_local_spec(normalization="RMSNorm")
stack = ModuleSpec(module=Stack, submodules=HybridStackSubmodules(
    attention_layer=_without(_dense, pre_mlp_layernorm=IdentityOp, mlp=IdentityOp,
                             mlp_bda=IdentityFuncOp),
    mlp_layer=_without(_dense, input_layernorm=IdentityOp, self_attention=IdentityOp,
                       self_attn_bda=IdentityFuncOp)))
