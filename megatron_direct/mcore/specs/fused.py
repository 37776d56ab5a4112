"""The layers of ``local``, with an attention that holds no s x s matrix.

Core attention is torch's ``scaled_dot_product_attention``: flash attention in bfloat16 on a GPU, a
memory-efficient kernel in float32, and a blocked one on the CPU. Each keeps queries, keys, values,
output and one number per query for the backward pass, so that memory grows linearly with the
sequence. None of them has a second derivative. On a GPU rotary embeddings, SwiGLU and the loss are
kernels of our own, each one pass over what torch's operations read and write several times.
Everything else, and every name in a checkpoint, is ``local``'s; its norms are torch's, which are
single kernels on a GPU already.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention, silu

from megatron_direct.mcore.specs import hybrid, local
from megatron_direct.runtime import gpu_kernels

# The kernels for GPUs take heads of such widths; with others torch falls back to a matrix of all
# scores, without a word. Columns of zeros change neither scores nor outputs.
_WIDTH_MULTIPLE = 8


def block_spec(transformer_config, vp_stage: int | None):
    """The layers that this rank builds of one model chunk."""
    return local.block_spec(transformer_config, vp_stage, core_attention=_fused_attention())


def stack_spec(transformer_config):
    """The layers of a hybrid model."""
    return hybrid.stack_spec(transformer_config, core_attention=_fused_attention())


def finish(chunk: torch.nn.Module) -> None:
    """What is fused outside of core attention, and the turning of queries and keys in it."""
    from megatron.core.transformer.attention import SelfAttention

    local.add_up_position_gradients(chunk)
    for module in chunk.modules():
        if isinstance(module, SelfAttention):
            module.register_forward_pre_hook(_hand_angles_on, with_kwargs=True)
    fuse_around_attention(chunk)


def fuse_around_attention(chunk: torch.nn.Module) -> None:
    """Activations of MLPs, and the loss."""
    from megatron.core.transformer.mlp import MLP

    for module in chunk.modules():
        if (isinstance(module, MLP) and module.config.gated_linear_unit
                and module.config.activation_func is silu):
            _fuse_activation(module)
    if hasattr(chunk, "compute_language_model_loss"):
        _fuse_loss(chunk)


def _hand_angles_on(attention: Any, arguments: tuple, keywords: dict) -> tuple[tuple, dict]:
    """Leaves rotary embeddings to core attention, which has a kernel for them."""
    angles = keywords.get("rotary_pos_emb")
    attention.core_attention.turn = None
    if (torch.is_tensor(angles) and gpu_kernels.apply_to(angles)
            and not attention.config.rotary_interleaved):
        angles = angles.float()
        attention.core_attention.turn = angles.cos(), angles.sin()
        keywords = {**keywords, "rotary_pos_emb": None}
    return arguments, keywords


def _fuse_activation(mlp: Any) -> None:
    """By Megatron's way for Transformer Engine, in which the activation takes both halves."""
    mlp.config = copy.copy(mlp.config)
    mlp.config.use_te_activation_func = True
    mlp.activation_func = _swiglu


def _swiglu(halves: torch.Tensor) -> torch.Tensor:
    """[..., f] of [..., 2 f]"""
    if gpu_kernels.apply_to(halves):
        from megatron_direct.mcore.specs import swiglu_kernel

        return swiglu_kernel.gated(halves)
    gate, up = halves.chunk(2, dim=-1)
    return silu(gate) * up


def _fuse_loss(chunk: Any) -> None:
    by_megatron = chunk.compute_language_model_loss

    def token_losses(labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """[b, s] of labels [b, s] and logits [s, b, v], where no rank holds a part of v alone."""
        if chunk.config.tensor_model_parallel_size > 1 or not gpu_kernels.apply_to(logits):
            return by_megatron(labels, logits)
        from megatron_direct.mcore.specs import cross_entropy_kernel

        return cross_entropy_kernel.token_losses(logits, labels)

    chunk.compute_language_model_loss = token_losses


@functools.cache  # one class for all models: torch.compile compiles anew for another
def _fused_attention() -> type:
    base: Any = local.latent_attention()

    class FusedAttention(base):
        """Causal attention of [s, b, heads, c] queries, [s, b, groups, c] keys and [s, b, groups,
        d] values; returns [s, b, heads * d]. turn: (cosines, sines) of the angles by which queries
        and keys have still to be turned, or None."""

        turn: tuple[torch.Tensor, torch.Tensor] | None = None

        def forward(self, query, key, value, attention_mask, *, attn_mask_type=None, **options):
            assert attention_mask is None and not any(
                option is not None for option in options.values()), options
            scale = self.softmax_scale * (self.scale_mask_softmax.scale or 1.0)
            if self.turn is not None:
                from megatron_direct.mcore.specs import rotary_kernel

                query, key = (rotary_kernel.turned(x, *self.turn) for x in (query, key))
                self.turn = None
            return causal_attention(query, key, value, scale)

    return FusedAttention


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                     scale: float) -> torch.Tensor:
    """[s, b, heads * d] from [s, b, heads, c], [s, b, groups, c] and [s, b, groups, d]."""
    value_width, repeats = value.shape[-1], query.shape[2] // key.shape[2]
    width = max(query.shape[-1], value_width)
    width += -width % _WIDTH_MULTIPLE
    query, key, value = (_widened(x, width).permute(1, 2, 0, 3) for x in (query, key, value))
    takes_groups = _takes_groups(query)
    if repeats > 1 and not takes_groups:
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    context = scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale,
        enable_gqa=repeats > 1 and takes_groups)
    return context[..., :value_width].permute(2, 0, 1, 3).flatten(2)


def _widened(heads: torch.Tensor, width: int) -> torch.Tensor:
    """With columns of zeros; torch's own pad copies what is wide enough already."""
    missing = width - heads.shape[-1]
    return pad(heads, (0, missing)) if missing else heads


def _takes_groups(query: torch.Tensor) -> bool:
    """Whether the kernel lets heads share keys: flash attention does, the one for float32 on a GPU
    does not."""
    return not query.is_cuda or query.dtype in (torch.bfloat16, torch.float16)
