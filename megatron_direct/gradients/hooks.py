"""Hooks that see each sample's gradient pass by, layer by layer.

``PieceHooks`` sits on every layer that has parameters. In a forward pass it notes the layer's
input; when the gradient with respect to the layer's output comes by in the backward pass, both
together make a piece (see ``pieces``), which is handed to ``consume`` at once and dropped. The
parameters themselves are frozen meanwhile, so that no weight gradient is computed.

The model's spec says of which kind each layer is; ``_WATCHES`` says what is noted of each kind.
``watch(layer, arguments, keywords, output)`` is called after the layer's forward pass, and returns
a function that turns the gradient of the output into (parameter, piece) pairs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from megatron_direct.errors import UserError
from megatron_direct.gradients import experts, layers, mamba, transformer_engine
from megatron_direct.gradients.pieces import Piece
from megatron_direct.mcore.shards import ParameterShard
from megatron_direct.mcore.specs import watched_layers
from megatron_direct.mcore.specs.kinds import LayerKind

_WATCHES: Mapping[LayerKind, Callable] = {
    LayerKind.COLUMN_PARALLEL: layers.column_parallel,
    LayerKind.ROW_PARALLEL: layers.row_parallel,
    LayerKind.VOCAB_PARALLEL_EMBEDDING: layers.vocab_parallel_embedding,
    LayerKind.EMBEDDING: layers.embedding,
    LayerKind.LAYER_NORM: functools.partial(layers.norm, True),
    LayerKind.RMS_NORM: functools.partial(layers.norm, False),
    LayerKind.NORM_AND_COLUMN_PARALLEL: transformer_engine.norm_and_column_parallel,
}


def _watched(chunk: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, Callable]]:
    """(layer, watch) for each layer with parameters of its own."""
    for layer, kind in watched_layers(chunk):
        if kind is LayerKind.EXPERTS:
            yield from experts.watched(layer)
        elif kind is LayerKind.MAMBA_MIXER:
            yield from mamba.watched(layer)
        else:
            yield layer, _WATCHES[kind]


Consumer = Callable[[int, ParameterShard, Piece], None]


class PieceHooks:
    """A context in which passes over ``chunks`` call ``consume(micro_batch, shard, piece)``.

    It may stay open for many passes: ``begin_pass(consume)`` names what the pieces of the next pass
    go to; with None, forward passes go by unwatched. ``begin(micro_batch)`` says which micro-batch
    comes next (``run_pass(before_forward=hooks.begin)``). Pieces come in the backward pass's order,
    for every shard of ``shards`` with ``adds_gradient``; pieces of one shard may come more than
    once per micro-batch (tied embeddings), and then add up. dtype: of the pieces; None: as the
    model computes them.

    Raises UserError on entry if a parameter belongs to a layer that no hook supports, or if the
    gradients of samples depend on one another.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], shards: Sequence[ParameterShard],
                 consume: Consumer | None = None, dtype: torch.dtype | None = None):
        self._chunks = chunks
        self._shards = {id(shard.parameter): shard for shard in shards}
        self._consume = consume
        self._dtype = dtype
        self._micro_batch = 0
        self._handles: list = []
        self._frozen: list[torch.nn.Parameter] = []

    def begin_pass(self, consume: Consumer | None) -> None:
        self._consume, self._micro_batch = consume, 0

    def begin(self, micro_batch: int) -> None:
        self._micro_batch = micro_batch

    def __enter__(self) -> PieceHooks:
        watched = [pair for chunk in self._chunks for pair in _watched(chunk)]
        self._require_covered([layer for layer, _ in watched])
        self._frozen = [parameter for chunk in self._chunks for parameter in chunk.parameters()
                        if parameter.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        for layer, watch in watched:
            # In front of hooks that change the output: theirs is not the layer's own.
            self._handles.append(layer.register_forward_hook(
                self._hook(watch), with_kwargs=True, prepend=True))
        return self

    def __exit__(self, *_exception) -> None:
        while self._handles:
            self._handles.pop().remove()
        while self._frozen:
            self._frozen.pop().requires_grad_(True)

    def _require_covered(self, watched: Sequence[torch.nn.Module]) -> None:
        covered = {id(parameter) for layer in watched
                   for parameter in layer.parameters(recurse=False)}
        missing = [shard.name for key, shard in self._shards.items() if key not in covered]
        if missing:
            raise UserError(
                f"no gradient hook covers {', '.join(missing)}, whose kind of layer is not "
                "supported. Selection needs a model of linear layers, embeddings, "
                "norms, experts and Mamba layers.")

    def _hook(self, watch):
        def forward_hook(layer, arguments, keywords, output):
            if self._consume is None or not torch.is_grad_enabled():
                return
            tensor = output[0] if isinstance(output, tuple) else output
            if not tensor.requires_grad:  # the embeddings: nothing below them needs a gradient
                tensor.requires_grad_(True)
            consume, micro_batch = self._consume, self._micro_batch
            pieces = watch(layer, arguments, keywords, output)

            def gradient_hook(output_grad):
                with torch.no_grad():
                    for parameter, piece in pieces(output_grad.detach()):
                        shard = self._shards.get(id(parameter))
                        if shard is not None and shard.adds_gradient:
                            consume(micro_batch, shard, _cast(piece, self._dtype))

            tensor.register_hook(gradient_hook)

        return forward_hook


def _cast(piece: Piece, dtype: torch.dtype | None) -> Piece:
    """The piece, its floating-point tensors in a dtype."""
    if dtype is None:
        return piece
    tensors: dict[str, Any] = {
        name: value.to(dtype) for name, value in vars(piece).items()
        if torch.is_tensor(value) and value.is_floating_point()}
    return dataclasses.replace(piece, **tensors)
