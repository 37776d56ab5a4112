"""Sketches of every sample's gradient: the pass over the pool."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_direct.data.samples import MicroBatch, MicroBatchLimits, SampleSource
from megatron_direct.gradients.hooks import PieceHooks
from megatron_direct.gradients.pieces import Piece
from megatron_direct.gradients.sketch import Sketch
from megatron_direct.mcore import grid, passes
from megatron_direct.mcore.shards import ParameterShard
from megatron_direct.runtime import host

SAMPLE_LOSSES = ("mean", "sum")


@dataclass(frozen=True)
class GradientModel:
    """A model on its ranks, ready for gradients of samples to be taken.

    shards: of the parameters that count. scales: of the diagonal preconditioner by shard name, or
    None; they are part of the sketch. sample_loss: a sample's gradient is that of the ``mean``, or
    of the ``sum``, of the losses over its own labels. micro_batch: the most that a rank computes at
    once.
    """

    chunks: Sequence[torch.nn.Module]
    shards: Sequence[ParameterShard]
    sketch: Sketch
    scales: Mapping[str, torch.Tensor] | None = None
    sample_loss: str = "mean"
    micro_batch: MicroBatchLimits = MicroBatchLimits(8)


def sketch_samples(model: GradientModel, samples: SampleSource, numbers: np.ndarray,
                   done: np.ndarray | None = None,
                   ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields ([n, k] sketches, [n] sample numbers, [n] mean losses), pass by pass.

    Each data-parallel rank yields its own share; within a copy of the model every rank yields the
    same. done: [samples] bool, True for what need not be computed any more. A pass's rows are
    summed over the model's ranks, and come to the host, while the next pass runs.
    """
    earlier = None
    for on_its_way in _passes(model, samples, numbers, done):
        if earlier is not None:
            yield _on_host(*earlier)
        earlier = on_its_way
    if earlier is not None:
        yield _on_host(*earlier)


def _on_host(copy: host.HostCopy, numbers: np.ndarray,
             ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows = copy.numpy()
    return rows[:, :-1], numbers, rows[:, -1]


def _passes(model: GradientModel, samples: SampleSource, numbers: np.ndarray,
            done: np.ndarray | None) -> Iterator[tuple[host.HostCopy, np.ndarray]]:
    """([n, k + 1] float32 sketches and mean losses, [n] sample numbers)"""
    chunks = model.chunks
    with PieceHooks(chunks, model.shards) as hooks:
        for micro_batches in passes.of_samples(chunks, samples, numbers, model.micro_batch, done):
            yield _one_pass(model, hooks, micro_batches), passes.sample_numbers(micro_batches)


def _one_pass(model: GradientModel, hooks: PieceHooks, micro_batches: Sequence[MicroBatch],
              ) -> host.HostCopy:
    """[n, k + 1] sketches and mean losses, of which the sums over the model are under way."""
    size = micro_batches[0].tokens.shape[0]
    own = grid.own_rows(size)  # an expert sees samples of other ranks, too
    at_once = grid.expert_size() * size
    sums = model.sketch.sums(len(micro_batches) * at_once, micro_batches[0].tokens.device)

    def add(micro_batch: int, shard: ParameterShard, piece: Piece) -> None:
        begins = 0 if piece.num_samples == at_once else own.start
        sums.add(shard, piece, micro_batch * at_once + begins)

    hooks.begin_pass(add)
    weights = None if model.sample_loss == "mean" else [b.num_labels for b in micro_batches]
    losses = passes.run_pass(model.chunks, micro_batches, backward=True, weights=weights,
                             before_forward=hooks.begin)
    hooks.begin_pass(None)
    total = grid.begin_sum_over_model(sums.total())
    which = passes.sample_rows(micro_batches)

    def rows() -> torch.Tensor:
        sketches = total.wait().unflatten(0, (-1, at_once))[:, own].flatten(0, 1)
        return torch.cat([sketches, losses.flatten()[:, None].float()], 1)[host.to_device(which)]

    return host.HostCopy(rows)
