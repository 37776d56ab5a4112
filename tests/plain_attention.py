"""Attention in plain torch functions, for ``plain_gpt``: x is [positions, width]."""

from __future__ import annotations

import math

import torch


def grouped(plain, weights, prefix, x):
    """Each group's queries, its key and its value, are rows of one matrix, group by group."""
    model = plain.model
    heads = model.num_attention_heads
    groups = model.num_query_groups or heads
    per_group, length = heads // groups, len(x)
    width = model.kv_channels or model.hidden_size // heads
    qkv = plain.linear(weights, prefix + "linear_qkv.", x)
    qkv = qkv.view(length, groups, per_group + 2, width)
    outputs = []
    for group in range(groups):
        key, value = qkv[:, group, per_group], qkv[:, group, per_group + 1]
        key = _placed(plain, weights, prefix + "k_layernorm.", key)
        for head in range(per_group):
            query = _placed(plain, weights, prefix + "q_layernorm.", qkv[:, group, head])
            outputs.append(_attend(query @ key.T / math.sqrt(width), value))
    return torch.cat(outputs, -1)


def latent(plain, weights, prefix, x):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""
    model = plain.model
    heads, rank = model.num_attention_heads, model.kv_lora_rank
    plain_width, placed_width = model.qk_head_dim, model.qk_pos_emb_head_dim
    if model.q_lora_rank is None:
        queries = plain.linear(weights, prefix + "linear_q_proj.", x)
    else:
        compressed = plain.linear(weights, prefix + "linear_q_down_proj.", x)
        queries = _up(plain, weights, prefix + "linear_q_up_proj.", compressed)
    compressed, key_place = plain.linear(weights, prefix + "linear_kv_down_proj.", x).split(
        [rank, placed_width], -1)
    keys_values = _up(plain, weights, prefix + "linear_kv_up_proj.", compressed)
    frequencies, magnitude, score_magnitude = _latent_frequencies(model)
    key_place = magnitude * _rotate(_pairs_apart(key_place), frequencies)
    outputs = []
    for query, key_value in zip(queries.chunk(heads, -1), keys_values.chunk(heads, -1),
                                strict=True):
        query, query_place = query.split([plain_width, placed_width], -1)
        key, value = key_value.split([plain_width, model.v_head_dim], -1)
        query_place = magnitude * _rotate(_pairs_apart(query_place), frequencies)
        scores = query @ key.T + query_place @ key_place.T
        scale = score_magnitude**2 / math.sqrt(plain_width + placed_width)
        outputs.append(_attend(scores * scale, value))
    return torch.cat(outputs, -1)


def _up(plain, weights, prefix, compressed):
    if prefix + "layer_norm_weight" in weights:
        compressed = plain.norm(weights, prefix + "layer_norm_", compressed)
    return plain.linear(weights, prefix, compressed)


def _attend(scores, value):
    future = torch.ones(scores.shape, dtype=torch.bool).triu(1)
    scores = scores.masked_fill(future, -math.inf)
    exponentials = torch.exp(scores - scores.detach().max(-1, keepdim=True).values)
    return exponentials / exponentials.sum(-1, keepdim=True) @ value


def _placed(plain, weights, norm, x):
    """A head's query or key: normalised, if there is a norm for it, and rotated."""
    model = plain.model
    if norm + "weight" in weights:
        x = plain.norm(weights, norm, x)
    if model.position_embedding_type != "rope":
        return x
    width = int(x.shape[-1] * model.rotary_percent)
    frequencies = _frequencies(model.rotary_base, width)
    if model.use_rope_scaling:
        frequencies = _slowed(frequencies, model.rope_scaling_factor)
    return torch.cat([_rotate(x[:, :width], frequencies), x[:, width:]], -1)


def _frequencies(base, width):
    # In single precision, as Megatron has them in every precision; so are the angles.
    return 1.0 / base ** (torch.arange(0, width, 2, dtype=torch.float32) / width)


def _slowed(frequencies, factor):
    """Llama 3.1: what turns more than 4 times over 8,192 positions stays, what turns less than once
    is slowed down by the factor, and the share of it that stays is linear in the turns between."""
    staying = ((8192 * frequencies / (2 * math.pi) - 1) / (4 - 1)).clamp(0, 1)
    return staying * frequencies + (1 - staying) * frequencies / factor


def _rotate(x, frequencies):
    angles = torch.outer(torch.arange(len(x), dtype=torch.float32), frequencies)
    cos, sin = torch.cos(angles).to(x.dtype), torch.sin(angles).to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _pairs_apart(x):
    """Latent attention rotates neighbours (0, 1), (2, 3), ...: all first ones, then all others."""
    return torch.cat([x[:, 0::2], x[:, 1::2]], -1)


def _latent_frequencies(model):
    """(frequencies, factor on rotated parts, root of the factor on scores).

    YaRN (arXiv 2309.00071, section 3.2) for 4,096 original positions: what turns more than 32 times
    over them stays, what turns less than once is stretched, with a ramp between the two.
    """
    width, base, stretch = model.qk_pos_emb_head_dim, model.rotary_base, model.rotary_scaling_factor
    frequencies = _frequencies(base, width)
    if model.rope_type == "rope":
        return frequencies, 1.0, 1.0

    def number_that_turns(times):
        return width * math.log(4096 / (2 * math.pi * times)) / (2 * math.log(base))

    low = max(math.floor(number_that_turns(32)), 0)
    high = min(math.ceil(number_that_turns(1)), width - 1)
    ramp = ((torch.arange(width // 2) - low) / (high - low)).clamp(0, 1)

    def magnitude(scale):
        return 0.1 * scale * math.log(stretch) + 1.0 if stretch > 1 else 1.0

    return (frequencies * (1 - ramp) + frequencies / stretch * ramp,
            magnitude(model.mscale) / magnitude(model.mscale_all_dim),
            magnitude(model.mscale_all_dim))
