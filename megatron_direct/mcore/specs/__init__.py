"""Layer specs: what a model is built of, and what a model built so is able to do.

A spec is a module of this folder with a :class:`LayerSpec`, and a line in :data:`SPECS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from megatron_direct.mcore import compat
from megatron_direct.mcore.specs import fused, hybrid, local, mamba, transformer_engine
from megatron_direct.mcore.specs.kinds import LayerKind, layers_of


@dataclass(frozen=True)
class LayerSpec:
    """How Megatron builds the layers, and what those are able to do.

    block: (TransformerConfig, virtual pipeline stage) -> Megatron's block submodules, for a
    GPTModel. stack: TransformerConfig -> Megatron's spec of the stack of a HybridModel.
    buildable: a context in which either can be built. finish: called with each chunk built.
    exact_products: every function of it has a second derivative that is known to be right, so that
    Hessian and Gauss-Newton products can be taken.
    """

    block: Callable[[Any, int | None], Any]
    stack: Callable[[Any], Any]
    buildable: Callable[[], AbstractContextManager]
    finish: Callable[[torch.nn.Module], None]
    exact_products: bool = False


SPECS = {
    "local": LayerSpec(local.block_spec, hybrid.stack_spec, compat.models_can_be_built,
                       local.add_up_position_gradients, exact_products=True),
    "fused": LayerSpec(fused.block_spec, fused.stack_spec, compat.models_can_be_built,
                       fused.finish),
    "transformer_engine": LayerSpec(
        transformer_engine.block_spec, transformer_engine.stack_spec, compat.models_can_be_built,
        transformer_engine.finish),
}
# By --transformer-impl: what passes without exact products are made with.
SPEC_OF_IMPLEMENTATION = {"local": "fused", "transformer_engine": "transformer_engine"}


def built_from(chunk: torch.nn.Module) -> LayerSpec | None:
    """The spec that :func:`megatron_direct.mcore.model.build` built it from; None if others did."""
    return getattr(chunk, "layer_spec", None)


def watched_layers(chunk: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, LayerKind]]:
    """The layers with parameters that a chunk of any spec has, each with its kind."""
    yield from layers_of(chunk, (*local.kinds_of_classes(), *mamba.KINDS,
                                 *transformer_engine.kinds_of_classes()))
