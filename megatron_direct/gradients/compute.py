"""Sketches of every sample's gradient: the pass over the pool."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from megatron_direct import parallel, schedule
from megatron_direct.data.samples import Samples
from megatron_direct.gradients.hooks import PieceHooks
from megatron_direct.gradients.sketch import Sketch
from megatron_direct.model import ParameterShard


def sketch_samples(chunks: Sequence[torch.nn.Module], shards: Sequence[ParameterShard],
                   sketch: Sketch, samples: Samples, numbers: np.ndarray, micro_batch_size: int,
                   ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields ([n, k] sketches, [n] sample numbers, [n] losses), pass by pass.

    Each data-parallel rank yields its own share; within a copy of the model every rank yields the
    same. The gradient is that of a sample's mean loss over its own labels.
    """
    for micro_batches in schedule.passes(chunks, samples, numbers, micro_batch_size):
        size = micro_batches[0].tokens.shape[0]
        total = torch.zeros(len(micro_batches), size, sketch.size,
                            device=micro_batches[0].tokens.device)

        def add(micro_batch, shard, piece, total=total):
            total[micro_batch] += sketch.of_piece(shard, piece)

        with PieceHooks(chunks, shards, add) as hooks:
            losses = schedule.run_pass(chunks, micro_batches, backward=True,
                                       before_forward=hooks.begin)
        parallel.sum_over_model(total)
        kept = schedule.sample_rows(micro_batches)
        yield (total.flatten(0, 1)[kept].cpu().numpy(),
               np.concatenate([batch.samples for batch in micro_batches]),
               losses.flatten()[kept].float().cpu().numpy())
