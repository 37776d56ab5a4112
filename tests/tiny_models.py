"""A tiny model of each family that the tests run, by name; all have a vocabulary of 48."""

from __future__ import annotations

import dataclasses

import torch

from megatron_direct.config import ModelConfig

VOCAB_SIZE = 48

_sizes = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "vocab_size": VOCAB_SIZE,
          "seq_length": 8, "make_vocab_size_divisible_by": 32}
_untied = {"untie_embeddings_and_output_weights": True}
_gpt2 = _sizes | {"normalization": "LayerNorm", "swiglu": False, "add_bias_linear": True,
                  "position_embedding_type": "learned_absolute"}
_llama = _sizes | {"num_query_groups": 2, "ffn_hidden_size": 24}
_latents = {"multi_latent_attention": True, "kv_lora_rank": 8, "qk_head_dim": 6,
            "qk_pos_emb_head_dim": 4, "v_head_dim": 5, "qk_layernorm": True,
            "rotary_scaling_factor": 40.0, "mscale_all_dim": 1.0}
_mamba = {"num_layers": 4, "hybrid_layer_pattern": "M*M-", "mamba_state_dim": 3,
          "mamba_head_dim": 4, "mamba_num_groups": 2, "mamba_num_heads": 6}
_few_experts = {"num_experts": 4, "moe_ffn_hidden_size": 12}

MODELS = {
    "gpt2-tied": ModelConfig(**_gpt2),
    "gpt2-untied": ModelConfig(**_gpt2 | _untied),
    "neox": ModelConfig(**_gpt2 | _untied | {"position_embedding_type": "rope",
                                             "rotary_percent": 0.5, "bias_gelu_fusion": True}),
    "llama-tied": ModelConfig(**_llama),
    "llama-untied": ModelConfig(**_llama | _untied | {"rotary_base": 500000,
                                                      "use_rope_scaling": True}),
    "starcoder": ModelConfig(**_gpt2 | {"num_query_groups": 1}),
    "qwen3": ModelConfig(**_llama | {"qk_layernorm": True, "kv_channels": 6, "norm_epsilon": 1e-6}),
    "mixtral": ModelConfig(**_llama | _untied | _few_experts),
    "qwen2-moe": ModelConfig(**_llama | _untied | _few_experts | {
        "add_qkv_bias": True, "moe_router_pre_softmax": True,
        "moe_shared_expert_intermediate_size": 20, "moe_shared_expert_gate": True}),
    "minicpm3": ModelConfig(**_sizes | _latents | {
        "q_lora_rank": 10, "ffn_hidden_size": 24, "rope_type": "rope",
        "rotary_scaling_factor": 1.0}),
    "deepseek-v2-lite": ModelConfig(**_sizes | _untied | _latents | _few_experts | {
        "ffn_hidden_size": 24, "moe_layer_freq": "[0]+[1]", "moe_router_pre_softmax": True,
        "moe_shared_expert_intermediate_size": 24}),
    "deepseek-v3": ModelConfig(**_sizes | _untied | _latents | {
        "q_lora_rank": 10, "ffn_hidden_size": 24, "num_experts": 8, "moe_ffn_hidden_size": 8,
        "moe_layer_freq": "([0]*1+[1]*1)", "moe_shared_expert_intermediate_size": 8,
        "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": 2.5, "moe_router_num_groups": 4,
        "moe_router_group_topk": 2, "moe_router_topk": 4}),
    # A GPT as Megatron's HybridModel: its layers are halves of a GPT's.
    "hybrid-tied": ModelConfig(**_llama | {"num_layers": 4, "hybrid_layer_pattern": "*-*-"}),
    "hybrid-experts": ModelConfig(**_llama | _untied | _few_experts | {
        "num_layers": 4, "hybrid_layer_pattern": "*-*E", "moe_router_pre_softmax": True,
        "moe_shared_expert_intermediate_size": 20}),
    "hybrid-latent": ModelConfig(**_sizes | _latents | {  # needs megatron-core 0.19
        "num_layers": 4, "hybrid_layer_pattern": "+-+-", "q_lora_rank": 10,
        "ffn_hidden_size": 24, "rope_type": "rope", "rotary_scaling_factor": 1.0}),
    "nemotron-h": ModelConfig(**_gpt2 | _untied | _mamba | {
        "normalization": "RMSNorm", "add_bias_linear": False, "position_embedding_type": "none",
        "num_query_groups": 2}),
}


def expert_bias(num_experts: int) -> torch.Tensor:
    """What tests set the biases of experts to, which training would have found."""
    return 0.2 * torch.sin(torch.arange(1.0, num_experts + 1))


def has_hybrid_latent_layers() -> bool:
    """Whether this megatron-core has latent attention in hybrid models ("hybrid-latent")."""
    from megatron_direct.mcore import compat

    _, kinds_of_layers = compat.hybrid_stack()
    return "mla_layer" in {field.name for field in dataclasses.fields(kinds_of_layers)}
