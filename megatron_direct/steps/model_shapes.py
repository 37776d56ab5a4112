"""Models to plan for, by the flags that describe them, as published with their weights."""

from __future__ import annotations

from typing import Any

from megatron_direct.config import ModelConfig

_LLAMA: dict[str, Any] = {"seq_length": 4096, "vocab_size": 128256, "rotary_base": 500000}

MODEL_SHAPES = {
    # Llama 3.2 1B
    "1b": ModelConfig(num_layers=16, hidden_size=2048, ffn_hidden_size=8192,
                      num_attention_heads=32, num_query_groups=8, **_LLAMA),
    # Llama 3.1 8B
    "8b": ModelConfig(num_layers=32, hidden_size=4096, ffn_hidden_size=14336,
                      num_attention_heads=32, num_query_groups=8,
                      untie_embeddings_and_output_weights=True, **_LLAMA),
    # Llama 3.1 70B
    "70b": ModelConfig(num_layers=80, hidden_size=8192, ffn_hidden_size=28672,
                       num_attention_heads=64, num_query_groups=8,
                       untie_embeddings_and_output_weights=True, **_LLAMA),
    # DeepSeek-V3, without multi-token prediction; 61 layers, as 64 so that stages divide them
    "deepseek-v3": ModelConfig(
        num_layers=64, hidden_size=7168, ffn_hidden_size=18432, num_attention_heads=128,
        seq_length=4096, vocab_size=129280, untie_embeddings_and_output_weights=True,
        multi_latent_attention=True, q_lora_rank=1536, kv_lora_rank=512, qk_head_dim=128,
        qk_pos_emb_head_dim=64, v_head_dim=128, qk_layernorm=True, num_experts=256,
        moe_layer_freq="[0]*3+[1]*61", moe_ffn_hidden_size=2048,
        moe_shared_expert_intermediate_size=2048, moe_router_topk=8,
        moe_router_score_function="sigmoid"),
}
