"""Sketches of every sample's gradient: the pass over the pool."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from megatron_direct.data.samples import Samples
from megatron_direct.gradients.hooks import PieceHooks
from megatron_direct.gradients.sketch import Sketch
from megatron_direct.mcore import grid, passes
from megatron_direct.mcore.model import ParameterShard

SAMPLE_LOSSES = ("mean", "sum")


def sketch_samples(chunks: Sequence[torch.nn.Module], shards: Sequence[ParameterShard],
                   sketch: Sketch, samples: Samples, numbers: np.ndarray, micro_batch_size: int,
                   *, sample_loss: str = "mean", first_pass: int = 0,
                   ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields ([n, k] sketches, [n] sample numbers, [n] mean losses), pass by pass.

    Each data-parallel rank yields its own share, from its pass ``first_pass`` on; within a copy of
    the model every rank yields the same. The gradient is that of the mean (or the sum) of a
    sample's losses over its own labels.
    """
    for micro_batches in passes.of_samples(chunks, samples, numbers, micro_batch_size, first_pass):
        size = micro_batches[0].tokens.shape[0]
        own = grid.own_rows(size)  # an expert sees samples of other ranks, too
        at_once = grid.expert_size() * size
        sums = sketch.sums(len(micro_batches) * at_once, micro_batches[0].tokens.device)

        def add(micro_batch, shard, piece, sums=sums, own=own, at_once=at_once):
            begins = 0 if piece.num_samples == at_once else own.start
            sums.add(shard, piece, micro_batch * at_once + begins)

        weights = None if sample_loss == "mean" else [b.num_labels for b in micro_batches]
        with PieceHooks(chunks, shards, add) as hooks:
            losses = passes.run_pass(chunks, micro_batches, backward=True, weights=weights,
                                       before_forward=hooks.begin)
        total = grid.sum_over_model(sums.total()).unflatten(0, (-1, at_once))[:, own]
        kept = passes.sample_rows(micro_batches)
        yield (total.flatten(0, 1)[kept].cpu().numpy(),
               np.concatenate([batch.samples for batch in micro_batches]),
               losses.flatten()[kept].float().cpu().numpy())
