"""The yardstick: a plain decoder in torch, as fast as a team's own training pass would be.

Pre-norm layers of RMSNorm, rotary embeddings, causal attention by torch's
``scaled_dot_product_attention`` (flash attention in bfloat16 on a GPU), SwiGLU and tied embeddings;
weights and activations in one dtype. Shapes: b sequences, s positions, h width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional


@dataclass(frozen=True)
class Shape:
    """Of a model and of its micro-batch. at_once: sequences of a micro-batch."""

    name: str
    layers: int
    width: int
    heads: int
    groups: int
    ffn: int
    vocabulary: int
    tokens: int
    at_once: int


class Decoder(nn.Module):
    """``loss(tokens, labels)``: mean cross-entropy of [b, s] labels."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype):
        super().__init__()
        with torch.device(device):
            self.embedding = nn.Embedding(shape.vocabulary, shape.width, dtype=dtype)
            self.layers = nn.ModuleList(_Layer(shape, dtype) for _ in range(shape.layers))
            self.norm = nn.RMSNorm(shape.width, dtype=dtype)
            self.register_buffer("angles", _angles(shape), persistent=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def compile(self, backend: str) -> Decoder:
        """Layer by layer, so that one compilation serves all of them, and the head with the loss.
        """
        for layer in self.layers:
            layer.forward = torch.compile(layer.forward, dynamic=False, backend=backend)
        self.head = torch.compile(self.head, dynamic=False, backend=backend)
        return self

    def loss(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = layer(hidden, self.angles)
        return self.head(hidden, labels)

    def head(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = functional.linear(self.norm(hidden), self.embedding.weight)
        return functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


class _Layer(nn.Module):
    def __init__(self, shape: Shape, dtype: torch.dtype):
        super().__init__()
        self.heads, self.groups = shape.heads, shape.groups
        self.head_width = shape.width // shape.heads
        columns = (shape.heads + 2 * shape.groups) * self.head_width
        self.attention_norm = nn.RMSNorm(shape.width, dtype=dtype)
        self.qkv = nn.Linear(shape.width, columns, bias=False, dtype=dtype)
        self.out = nn.Linear(shape.width, shape.width, bias=False, dtype=dtype)
        self.mlp_norm = nn.RMSNorm(shape.width, dtype=dtype)
        self.gate_up = nn.Linear(shape.width, 2 * shape.ffn, bias=False, dtype=dtype)
        self.down = nn.Linear(shape.ffn, shape.width, bias=False, dtype=dtype)

    def forward(self, hidden: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.attention_norm(hidden)).unflatten(-1, (-1, self.head_width))
        query, key, value = (part.transpose(1, 2) for part in qkv.split(
            [self.heads, self.groups, self.groups], dim=2))
        context = functional.scaled_dot_product_attention(
            _rotated(query, angles), _rotated(key, angles), value, is_causal=True,
            enable_gqa=self.groups != self.heads)
        hidden = hidden + self.out(context.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.mlp_norm(hidden)).chunk(2, dim=-1)
        return hidden + self.down(functional.silu(gate) * up)


def _angles(shape: Shape) -> torch.Tensor:
    """[s, head width / 2]"""
    width = shape.width // shape.heads
    speeds = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    return torch.arange(shape.tokens, dtype=torch.float32)[:, None] * speeds


def _rotated(heads: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """[b, heads, s, c]"""
    cos, sin = angles.cos().to(heads.dtype), angles.sin().to(heads.dtype)
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
