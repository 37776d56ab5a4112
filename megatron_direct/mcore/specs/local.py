"""The layers of a GPTModel: Megatron's local layer spec, and what has to be replaced in it.

- Megatron's own torch norms refuse sequence parallelism.
- DotProductAttention takes no values of another width than its keys', which latent attention has.
- The router's linear map calls Transformer Engine, also where it is missing.
- Latent attention's position key is one for all heads, computed once and used by each
  tensor-parallel rank for its own heads. With the local spec's column-parallel projection Megatron
  does not add up the gradients that come back from the ranks, and training would go astray
  without a word.
- The names of norms in checkpoints are made those of Transformer Engine's spec, in which a norm is
  a part of the linear layer behind it, for layers of every kind: one checkpoint serves both.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from megatron_direct.mcore import compat
from megatron_direct.mcore.specs.kinds import KindsOfClasses, LayerKind


def kinds_of_classes() -> KindsOfClasses:
    """Megatron's own layers, and torch's norms and embeddings."""
    from megatron.core.tensor_parallel.layers import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
    )
    from megatron.core.transformer.moe.moe_layer import MoELayer

    return (
        (ColumnParallelLinear, LayerKind.COLUMN_PARALLEL),
        (RowParallelLinear, LayerKind.ROW_PARALLEL),
        (VocabParallelEmbedding, LayerKind.VOCAB_PARALLEL_EMBEDDING),
        (torch.nn.Embedding, LayerKind.EMBEDDING),
        (torch.nn.LayerNorm, LayerKind.LAYER_NORM),
        (torch.nn.RMSNorm, LayerKind.RMS_NORM),
        (MoELayer, LayerKind.EXPERTS),
    )


def block_spec(transformer_config, vp_stage: int | None, core_attention: type | None = None):
    """The layers that this rank builds of one model chunk.

    core_attention: the class of what maps queries, keys and values to a layer's context; left out:
    Megatron's own, which writes down all scores.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    block = get_gpt_decoder_block_spec(
        transformer_config, use_transformer_engine=False,
        normalization=transformer_config.normalization, vp_stage=vp_stage)
    return TransformerBlockSubmodules(
        layer_specs=[_layer(spec, transformer_config, core_attention)
                     for spec in block.layer_specs],
        layer_norm=norm_class(transformer_config))


def prediction_heads(transformer_config, block, vp_stage: int | None):
    """Megatron's spec of the heads for multi-token prediction that this rank builds, or None.

    block: the layers of the model; a head has one like the last of them.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec

    if not transformer_config.mtp_num_layers:
        return None
    heads = get_gpt_mtp_block_spec(
        transformer_config, block, use_transformer_engine=False, vp_stage=vp_stage)
    if heads is None:
        return None
    norm = norm_class(transformer_config)
    return dataclasses.replace(heads, layer_specs=[
        compat.with_submodules(spec, enorm=norm, hnorm=norm, layer_norm=norm)
        for spec in heads.layer_specs])


def one_layer(transformer_config, has_experts: bool, core_attention: type | None):
    """One layer, of attention and an MLP or experts."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    spec = get_gpt_layer_local_spec(
        num_experts=transformer_config.num_moe_experts if has_experts else None,
        moe_grouped_gemm=False,
        qk_layernorm=transformer_config.qk_layernorm,
        multi_latent_attention=transformer_config.multi_latent_attention,
        normalization=transformer_config.normalization)
    return _layer(spec, transformer_config, core_attention)


def add_up_position_gradients(chunk: Any) -> None:
    """Makes latent attention's position key right under tensor (and so sequence) parallelism.

    Its down projection hands on whole columns of this rank's slice of the sequence. From there
    Megatron gathers the key's positions itself, and adds up its gradients on the way back.
    """
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention

    def hand_on_whole_columns(_layer, _arguments, output):
        columns, bias = output
        whole = mappings.gather_from_tensor_model_parallel_region(columns)
        return mappings.scatter_to_sequence_parallel_region(whole), bias

    if chunk.config.tensor_model_parallel_size > 1:
        for module in chunk.modules():
            if isinstance(module, MLASelfAttention):
                module.linear_kv_down_proj.register_forward_hook(hand_on_whole_columns)


def _layer(spec, config, core_attention: type | None):
    parts = spec.submodules
    attention_class, attention = parts.self_attention.module, {}
    if config.multi_latent_attention:
        attention_class = compat.latent_self_attention()
    if core_attention is not None or config.multi_latent_attention:
        attention["core_attention"] = core_attention or latent_attention()
    if config.qk_layernorm:
        if config.multi_latent_attention:
            attention.update(q_layernorm=norm_class(config), kv_layernorm=norm_class(config))
        else:  # of heads, which are spread over the ranks: never of a slice of the sequence
            attention.update(q_layernorm=_torch_norm(config), k_layernorm=_torch_norm(config))
    mlp, has_experts = parts.mlp, compat.is_mixture_of_experts(parts.mlp)
    if has_experts:
        mlp = compat.with_submodules(mlp, router=router_class())
    return dataclasses.replace(spec, submodules=dataclasses.replace(
        parts,
        mlp=mlp,
        input_layernorm=norm_class(config),
        pre_mlp_layernorm=norm_class(config),
        self_attention=dataclasses.replace(
            compat.with_submodules(parts.self_attention, **attention), module=attention_class),
        sharded_state_dict_keys_map=checkpoint_names(
            config.multi_latent_attention, has_experts)))


def checkpoint_names(latent_attention: bool, has_experts: bool) -> dict[str, str]:
    """{beginning of a norm's name: what Transformer Engine's spec has in its place}."""
    names = {}
    if latent_attention:
        names["self_attention.q_layernorm."] = "self_attention.linear_q_up_proj.layer_norm_"
        names["self_attention.kv_layernorm."] = "self_attention.linear_kv_up_proj.layer_norm_"
    else:
        names["input_layernorm."] = "self_attention.linear_qkv.layer_norm_"
    if not has_experts:
        names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return names


def norm_class(config) -> type:
    """Of what is spread by sequence, if anything is."""
    if not config.sequence_parallel:
        return _torch_norm(config)
    return _SequenceParallelRMSNorm if config.normalization == "RMSNorm" \
        else _SequenceParallelLayerNorm


def _torch_norm(config) -> type:
    return _RMSNorm if config.normalization == "RMSNorm" else _LayerNorm


class _RMSNorm(torch.nn.RMSNorm):
    def __init__(self, config, hidden_size: int, eps: float | None = None, **_unused):
        super().__init__(hidden_size, eps=config.layernorm_epsilon if eps is None else eps)


class _LayerNorm(torch.nn.LayerNorm):
    def __init__(self, config, hidden_size: int, eps: float | None = None, **_unused):
        super().__init__(hidden_size, eps=config.layernorm_epsilon if eps is None else eps)


class _SequenceParallelRMSNorm(_RMSNorm):
    """Over a slice of the sequence: its weight's gradient is a partial sum."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        _mark_sequence_parallel(self)


class _SequenceParallelLayerNorm(_LayerNorm):
    """Over a slice of the sequence: its parameters' gradients are partial sums."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        _mark_sequence_parallel(self)


def _mark_sequence_parallel(norm: torch.nn.Module) -> None:
    for parameter in norm.parameters():
        parameter.sequence_parallel = True  # type: ignore[attr-defined]


@functools.cache  # one class for all models: torch.compile compiles anew for another
def latent_attention() -> Any:
    """Megatron's attention, for values of any width."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    class LatentAttention(DotProductAttention):
        """Values have a width of their own, ``v_channels``."""

        def __init__(self, *arguments, k_channels=None, v_channels=None, **keywords):
            super().__init__(*arguments, **keywords)
            if v_channels is not None:
                self.hidden_size_per_partition = (
                    v_channels * self.num_attention_heads_per_partition)

    return LatentAttention


def router_class() -> type:
    """Megatron's, which multiplies without Transformer Engine."""
    from megatron.core.transformer.moe.router import TopKRouter

    dtypes = {"fp32": torch.float32, "fp64": torch.float64}

    class Router(TopKRouter):
        def gating(self, input):
            dtype = dtypes.get(self.config.moe_router_dtype, input.dtype)
            bias = None if self.bias is None else self.bias.to(dtype)
            return torch.nn.functional.linear(input.to(dtype), self.weight.to(dtype), bias)

        def routing(self, logits, padding_mask=None):
            # Megatron compiles the count of the tokens an expert gets: half a minute for nothing.
            with torch.compiler.set_stance("force_eager"):
                return super().routing(logits, padding_mask)

    return Router
