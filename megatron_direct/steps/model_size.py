"""What a model's shape comes to: parameters, and operations and numbers touched per token.

Counted off the flags, without building it. Norms, biases and routers' bookkeeping are left out:
they are less than a hundredth of all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatron_direct.architecture import ModelConfig, expert_layers, ffn_hidden_size
from megatron_direct.errors import UserError


@dataclass(frozen=True)
class _Linear:
    """copies: experts that have one each; uses: of them by a token."""

    outputs: int
    inputs: int
    copies: int = 1
    uses: int = 1


@dataclass(frozen=True)
class ModelSize:
    """Sums over the whole model.

    dense, experts: parameters of layers; embeddings: of embedding and output layer together.
    multiply_adds: per token, in the linear layers of the blocks; head: in the output layer.
    attention_width: heads times the widths of a key and a value, summed over layers.
    expert_uses: experts that a token passes, summed over layers.
    columns: outputs and inputs of the linear layers that a token passes, the output layer's
    included; linears: how many these are.
    """

    num_layers: int
    hidden_size: int
    vocab_size: int
    dense: int
    experts: int
    embeddings: int
    multiply_adds: int
    head: int
    attention_width: int
    expert_uses: int
    columns: int
    linears: int

    @property
    def parameters(self) -> int:
        return self.dense + self.experts + self.embeddings


@dataclass(frozen=True)
class HeadSize:
    """Of one head of multi-token prediction: a layer, and what joins two tokens before it.

    dense, experts: its parameters; multiply_adds: per token, those of the output layer included.
    """

    dense: int
    experts: int
    multiply_adds: int


def head_size_of(model: ModelConfig) -> HeadSize:
    """Its layer is like the model's last one. Raises UserError for a hybrid model."""
    size, join = size_of(with_last_layers(model, 1)), 2 * model.hidden_size**2
    return HeadSize(size.dense + join, size.experts, size.multiply_adds + join + size.head)


def with_last_layers(model: ModelConfig, count: int) -> ModelConfig:
    """The model without all but its last so many layers, which have experts where any have."""
    changed: dict[str, Any] = {"num_layers": count}
    if model.num_experts is not None:
        changed["moe_layer_freq"] = "+".join(
            f"[{int(has_experts)}]" for has_experts in expert_layers(model)[-count:])
    return replace(model, **changed)


def size_of(model: ModelConfig) -> ModelSize:
    """Of the main loss: without heads of multi-token prediction.

    Raises UserError for a hybrid model, whose layers are not counted."""
    if model.hybrid_layer_pattern:
        raise UserError("time and memory of hybrid models (--hybrid-layer-pattern) are not "
                        "estimated.")
    hidden, vocab = model.hidden_size, model.padded_vocab_size
    dense = experts = multiply_adds = columns = linears = 0
    for has_experts in expert_layers(model):
        for linear in (*_attention(model), *_mlp(model, has_experts)):
            weights = linear.outputs * linear.inputs * linear.copies
            dense, experts = (dense, experts + weights) if linear.copies > 1 else (
                dense + weights, experts)
            multiply_adds += linear.outputs * linear.inputs * linear.uses
            columns += (linear.outputs + linear.inputs) * linear.uses
            linears += linear.uses
    head = vocab * hidden
    return ModelSize(
        model.num_layers, hidden, vocab, dense, experts,
        head * (2 if model.untie_embeddings_and_output_weights else 1), multiply_adds, head,
        model.num_layers * model.num_attention_heads * sum(_head_widths(model)),
        sum(expert_layers(model)) * model.moe_router_topk,
        columns + vocab + hidden, linears + 1)


def _head_widths(model: ModelConfig) -> tuple[int, int]:
    """(of a key, of a value)"""
    if model.multi_latent_attention:
        return model.qk_head_dim + model.qk_pos_emb_head_dim, model.v_head_dim
    width = model.kv_channels or model.hidden_size // model.num_attention_heads
    return width, width


def _attention(model: ModelConfig) -> Iterator[_Linear]:
    hidden, heads = model.hidden_size, model.num_attention_heads
    key, value = _head_widths(model)
    if model.multi_latent_attention:
        if model.q_lora_rank:
            yield _Linear(model.q_lora_rank, hidden)
        yield _Linear(heads * key, model.q_lora_rank or hidden)
        yield _Linear(model.kv_lora_rank + model.qk_pos_emb_head_dim, hidden)
        yield _Linear(heads * (model.qk_head_dim + value), model.kv_lora_rank)
    else:
        yield _Linear((heads + 2 * (model.num_query_groups or heads)) * key, hidden)
    yield _Linear(hidden, heads * value)


def _mlp(model: ModelConfig, has_experts: bool) -> Iterator[_Linear]:
    hidden, gates = model.hidden_size, 2 if model.swiglu else 1
    if not has_experts:
        width = ffn_hidden_size(model)
        yield _Linear(gates * width, hidden)
        yield _Linear(hidden, width)
        return
    assert model.num_experts is not None
    yield _Linear(model.num_experts, hidden)
    width = model.moe_ffn_hidden_size or ffn_hidden_size(model)
    yield _Linear(gates * width, hidden, model.num_experts, model.moe_router_topk)
    yield _Linear(hidden, width, model.num_experts, model.moe_router_topk)
    shared = model.moe_shared_expert_intermediate_size
    if shared:
        yield _Linear(gates * shared, hidden)
        yield _Linear(hidden, shared)
