"""Hooks that see each sample's gradient pass by, layer by layer.

``PieceHooks`` sits on every layer that has parameters. In a forward pass it notes the layer's
input; when the gradient with respect to the layer's output comes by in the backward pass, both
together make a piece (see ``pieces``), which is handed to ``consume`` at once and dropped. The
parameters themselves are frozen meanwhile, so that no weight gradient is computed.

Under sequence parallelism a linear layer's input, or the gradient of its output, is spread over the
tensor-parallel ranks by position. It is gathered here as Megatron gathers it in its own backward
pass. A norm's gradient stays a partial sum, since every sum over the model's ranks adds it up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from megatron_direct import parallel
from megatron_direct.errors import UserError
from megatron_direct.gradients.pieces import Entries, OuterProducts, Piece, RowSums
from megatron_direct.model import ParameterShard


class PieceHooks:
    """A context in which passes over ``chunks`` call ``consume(micro_batch, shard, piece)``.

    ``begin(micro_batch)`` tells which micro-batch comes next (``run_pass(before_forward=begin)``).
    Pieces come in the backward pass's order, for every shard with ``adds_gradient``; pieces of one
    shard may come more than once a micro-batch (tied embeddings), and then add up.

    Raises UserError on entry if a parameter belongs to a layer that no hook knows.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], shards: Sequence[ParameterShard],
                 consume: Callable[[int, ParameterShard, Piece], None]):
        self._chunks = chunks
        self._shards = {id(shard.parameter): shard for shard in shards}
        self._consume = consume
        self._micro_batch = 0
        self._handles: list = []

    def begin(self, micro_batch: int) -> None:
        self._micro_batch = micro_batch

    def __enter__(self) -> PieceHooks:
        layers = [layer for chunk in self._chunks for layer in _layers(chunk)]
        self._require_covered(layers)
        self._frozen = [shard.parameter for shard in self._shards.values()
                        if shard.parameter.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        for layer, watch in layers:
            self._handles.append(layer.register_forward_hook(
                self._hook(watch), with_kwargs=True))
        return self

    def __exit__(self, *_exception) -> None:
        while self._handles:
            self._handles.pop().remove()
        for parameter in self._frozen:
            parameter.requires_grad_(True)

    def _require_covered(self, layers) -> None:
        covered = {id(parameter) for layer, _ in layers
                   for parameter in layer.parameters(recurse=False)}
        missing = [shard.name for key, shard in self._shards.items() if key not in covered]
        if missing:
            raise UserError(
                f"no gradient hook covers {', '.join(missing)}: a layer of a kind that this "
                "version does not know. Selection needs a model of linear layers, embeddings and "
                "norms.")

    def _hook(self, watch):
        def forward_hook(layer, arguments, keywords, output):
            tensor = output[0] if isinstance(output, tuple) else output
            if not torch.is_grad_enabled():
                return
            if not tensor.requires_grad:  # the embeddings: nothing below them needs a gradient
                tensor.requires_grad_(True)
            micro_batch, pieces = self._micro_batch, watch(layer, arguments, keywords)

            def gradient_hook(output_grad):
                with torch.no_grad():
                    for parameter, piece in pieces(output_grad.detach()):
                        shard = self._shards.get(id(parameter))
                        if shard is not None and shard.adds_gradient:
                            self._consume(micro_batch, shard, piece)

            tensor.register_hook(gradient_hook)

        return forward_hook


def _layers(chunk: torch.nn.Module) -> list[tuple[torch.nn.Module, Callable]]:
    """(layer, what to watch of it) for every layer of a chunk that a hook knows."""
    from megatron.core.tensor_parallel.layers import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
    )

    kinds = (
        (ColumnParallelLinear, _watch_column_parallel),
        (RowParallelLinear, _watch_row_parallel),
        (VocabParallelEmbedding, _watch_vocab_parallel),
        (torch.nn.Embedding, _watch_embedding),
        ((torch.nn.RMSNorm, torch.nn.LayerNorm), _watch_norm),
    )
    return [(layer, watch) for layer in chunk.modules() for kind, watch in kinds
            if isinstance(layer, kind)]


def _watch_column_parallel(layer, arguments, keywords):
    """Input whole (gathered, if spread by position), output a slice of the columns."""
    inputs = arguments[0].detach()
    weight = arguments[1] if len(arguments) > 1 else keywords.get("weight")
    weight = layer.weight if weight is None else weight

    def pieces(output_grads):
        whole = parallel.gather_over_tensor_ranks(inputs, 0) if layer.sequence_parallel else inputs
        yield weight, OuterProducts(whole, output_grads)
        if layer.bias is not None:
            yield layer.bias, Entries(output_grads.sum(0))

    return pieces


def _watch_row_parallel(layer, arguments, keywords):
    """Input a slice of the columns, output whole (or spread by position)."""
    inputs = arguments[0].detach()

    def pieces(output_grads):
        if layer.bias is not None:
            # Added after the sum over ranks: spread by position it is a partial sum, and marked so.
            yield layer.bias, Entries(output_grads.sum(0))
        if layer.sequence_parallel:
            output_grads = parallel.gather_over_tensor_ranks(output_grads, 0)
        yield layer.weight, OuterProducts(inputs, output_grads)

    return pieces


def _watch_vocab_parallel(layer, arguments, keywords):
    tokens = arguments[0]  # [b, s]

    def pieces(output_grads):
        if layer.reduce_scatter_embeddings:  # [s / tp, b, h]
            output_grads = parallel.gather_over_tensor_ranks(output_grads, 0)
        else:  # [b, s, h]
            output_grads = output_grads.transpose(0, 1)
        rows = tokens.t() - layer.vocab_start_index
        held = (rows >= 0) & (rows < layer.num_embeddings_per_partition)
        yield layer.weight, RowSums(rows * held, held, output_grads, layer.weight.shape[0])

    return pieces


def _watch_embedding(layer, arguments, keywords):
    """An embedding held whole by every tensor-parallel rank (learned positions): [b, s] in."""
    rows = arguments[0].t()

    def pieces(output_grads):
        held = torch.ones_like(rows, dtype=torch.bool)
        yield layer.weight, RowSums(rows, held, output_grads.transpose(0, 1), layer.weight.shape[0])

    return pieces


def _watch_norm(layer, arguments, keywords):
    """y = x_hat * weight (+ bias), x_hat the normalised input."""
    inputs = arguments[0].detach()

    def pieces(output_grads):
        dims = tuple(range(-len(layer.normalized_shape), 0))
        if isinstance(layer, torch.nn.LayerNorm):
            centred = inputs - inputs.mean(dims, keepdim=True)
            yield layer.bias, Entries(output_grads.sum(0))
        else:
            centred = inputs
        eps = torch.finfo(inputs.dtype).eps if layer.eps is None else layer.eps
        normalised = centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
        yield layer.weight, Entries((output_grads * normalised).sum(0))

    return pieces
