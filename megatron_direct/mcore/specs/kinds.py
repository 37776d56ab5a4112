"""Kinds of layers: what a spec says of each layer it builds, so that others need not know Megatron.

A hook on a layer (:mod:`megatron_direct.gradients.hooks`) goes by its kind alone. A layer of a new
kind is a line here, its class in the spec that builds it, and its hook.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator

import torch


class LayerKind(enum.Enum):
    """Kinds of layers with parameters, by how they divide them and what they compute."""

    COLUMN_PARALLEL = "a linear layer whose outputs are divided over the tensor-parallel ranks"
    ROW_PARALLEL = "a linear layer whose inputs are divided"
    VOCAB_PARALLEL_EMBEDDING = "an embedding whose rows are divided"
    EMBEDDING = "an embedding that every rank holds whole"
    LAYER_NORM = "a norm that takes the mean off"
    RMS_NORM = "a norm that does not"
    NORM_AND_COLUMN_PARALLEL = "a norm and the column-parallel layer after it, in one"
    MAMBA_MIXER = "what stands between the linear layers of a Mamba layer"
    EXPERTS = "a mixture of experts: router, experts and shared experts"


KindsOfClasses = tuple[tuple[type, LayerKind], ...]


def layers_of(chunk: torch.nn.Module, kinds: KindsOfClasses,
              ) -> Iterator[tuple[torch.nn.Module, LayerKind]]:
    """(layer, kind) by the first class that a layer is of; a mixture of experts is one layer."""
    for name, layer in chunk.named_modules():
        if ".local_experts." in name:
            continue
        kind = next((kind for of, kind in kinds if isinstance(layer, of)), None)
        if kind is not None:
            yield layer, kind
