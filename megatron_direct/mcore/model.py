"""Megatron-Core's GPTModel or HybridModel, built from our settings.

A rank holds one or more *model chunks* (one, unless the pipeline is interleaved), each a model with
some of the layers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_direct import architecture, hybrid_pattern
from megatron_direct.config import Job, ModelConfig
from megatron_direct.mcore import compat
from megatron_direct.mcore.specs import SPEC_OF_IMPLEMENTATION, SPECS, LayerSpec
from megatron_direct.mcore.specs.local import prediction_heads
from megatron_direct.runtime import host


def build(job: Job, *, seed: int = 1234, spec: str | None = None,
          dtype: torch.dtype | None = None) -> list[torch.nn.Module]:
    """This rank's model chunks, with newly initialised weights. Needs grid.model_parallel().

    spec: a name in :data:`megatron_direct.mcore.specs.SPECS`, left out: by the job's
    --transformer-impl; exact curvature products need "local". dtype: of weights and activations;
    left out: as the job says.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(stage_seed)
    model_parallel_cuda_manual_seed(stage_seed, force_reset_rng=True)
    model, num_chunks = job.model, job.num_model_chunks
    dtype = dtype or (torch.bfloat16 if job.precision.bf16 else torch.float32)
    layers = SPECS[spec or SPEC_OF_IMPLEMENTATION[job.layout.transformer_impl]]
    transformer_config = _transformer_config(job, dtype)
    make = _gpt if model.hybrid_layer_pattern is None else _hybrid
    chunks = []
    for number in range(num_chunks):
        vp_stage = number if num_chunks > 1 else None
        with layers.buildable():
            chunk = make(job, transformer_config, layers, vp_stage)
        layers.finish(chunk)
        chunk.layer_spec = layers  # which :func:`megatron_direct.mcore.specs.built_from` looks up
        chunks.append(chunk.to(device=host.device(), dtype=dtype))
    return chunks


def _gpt(job: Job, transformer_config, layers: LayerSpec, vp_stage: int | None):
    from megatron.core.models.gpt import GPTModel

    model, block = job.model, layers.block(transformer_config, vp_stage)
    return GPTModel(
        transformer_layer_spec=block,
        mtp_block_spec=prediction_heads(transformer_config, block, vp_stage),
        rope_scaling=model.use_rope_scaling,
        rope_scaling_factor=model.rope_scaling_factor,
        vp_stage=vp_stage,
        **_of_every_model(model, transformer_config, vp_stage))


def _hybrid(job: Job, transformer_config, layers: LayerSpec, vp_stage: int | None):
    model = job.model
    assert model.hybrid_layer_pattern is not None
    num_stages = job.layout.pipeline_model_parallel_size * job.num_model_chunks
    pattern = hybrid_pattern.in_stages(model.hybrid_layer_pattern, num_stages,
                                       with_heads=bool(model.mtp_num_layers))
    return compat.hybrid_model(
        layers.stack(transformer_config), pattern, vp_stage,
        _of_every_model(model, transformer_config, vp_stage))


def _of_every_model(model: ModelConfig, transformer_config, vp_stage: int | None) -> dict:
    from megatron.core import parallel_state

    return {
        "config": transformer_config,
        "vocab_size": model.padded_vocab_size,
        "max_sequence_length": model.max_position_embeddings or model.seq_length,
        "pre_process": parallel_state.is_pipeline_first_stage(False, vp_stage),
        "post_process": parallel_state.is_pipeline_last_stage(False, vp_stage),
        "share_embeddings_and_output_weights": not model.untie_embeddings_and_output_weights,
        "position_embedding_type": model.position_embedding_type,
        "rotary_base": model.rotary_base,
        "rotary_percent": model.rotary_percent,
    }


def _activation(model: ModelConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    if model.swiglu:
        return torch.nn.functional.silu
    return fused_gelu if model.bias_gelu_fusion else torch.nn.functional.gelu


def fused_gelu(x: torch.Tensor) -> torch.Tensor:
    """What Megatron's fused kernel of bias and GELU computes."""
    return torch.nn.functional.gelu(x, approximate="tanh")


def _transformer_config(job: Job, dtype: torch.dtype):
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    model, layout, num_chunks = job.model, job.layout, job.num_model_chunks
    kind = MLATransformerConfig if model.multi_latent_attention else TransformerConfig
    return kind(
        **_of_latent_attention(model),
        **_of_experts(model),
        **_of_hybrids(model),
        **_of_prediction_heads(model, kind),
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size(model),
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        qk_layernorm=model.qk_layernorm,
        normalization=model.normalization,
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=model.swiglu,
        activation_func=_activation(model),
        add_bias_linear=model.add_bias_linear,
        add_qkv_bias=model.add_qkv_bias,
        init_method_std=model.init_method_std,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=num_chunks if num_chunks > 1 else None,
        sequence_parallel=layout.sequence_parallel,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        expert_tensor_parallel_size=layout.tensor_model_parallel_size,
        moe_token_dispatcher_type=layout.moe_token_dispatcher_type,
        # Between two stages with several chunks each, a batched exchange takes one chunk's message
        # for another's, without a word.
        overlap_p2p_comm=num_chunks > 1,
        batch_p2p_comm=num_chunks == 1,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        attention_softmax_in_fp32=True,
        use_cpu_initialization=not host.has_gpu(),
        # Losses come out of a pass as sums: sample weights and token counts are ours to apply.
        calculate_per_token_loss=True,
        # Fused kernels are left out: they need a GPU, and none has a second derivative.
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )


def _of_latent_attention(model: ModelConfig) -> dict:
    if not model.multi_latent_attention:
        return {}
    names = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim",
             "rotary_base", "rotary_percent", "rotary_scaling_factor", "mscale", "mscale_all_dim")
    return {"rope_type": model.rope_type or "yarn", **{n: getattr(model, n) for n in names}}


def _of_experts(model: ModelConfig) -> dict:
    if model.num_experts is None:
        return {}
    names = ("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size",
             "moe_shared_expert_gate", "moe_router_topk", "moe_router_score_function",
             "moe_router_dtype", "moe_router_pre_softmax", "moe_router_enable_expert_bias",
             "moe_router_topk_scaling_factor", "moe_router_num_groups", "moe_router_group_topk")
    frequency = str(model.moe_layer_freq)
    return {
        "num_moe_experts": model.num_experts,
        "moe_layer_freq": int(frequency) if frequency.isdigit() else [
            int(has_experts) for has_experts in architecture.expert_layers(model)],
        # A balancing loss is one of the whole batch: no sample has a gradient of its own then.
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        **{name: getattr(model, name) for name in names},
    }


def _of_prediction_heads(model: ModelConfig, kind: type) -> dict:
    if not model.mtp_num_layers:
        return {}
    names = ["mtp_num_layers", "mtp_loss_scaling_factor"]
    for name in ("mtp_use_repeated_layer", "mtp_detach_heads"):
        if getattr(model, name):
            compat.require_setting(kind, name)
            names.append(name)
    return {name: getattr(model, name) for name in names}


def _of_hybrids(model: ModelConfig) -> dict:
    if model.hybrid_layer_pattern is None:
        return {}
    names = ("mamba_state_dim", "mamba_head_dim", "mamba_num_groups", "mamba_num_heads")
    return {"is_hybrid_model": True, **{name: getattr(model, name) for name in names}}
