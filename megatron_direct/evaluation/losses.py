"""Losses of a model on datasets, document by document."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_direct.config import ModelConfig
from megatron_direct.data.checks import ALL_DATASETS
from megatron_direct.data.indexed import prefix_names
from megatron_direct.data.samples import MicroBatchLimits, Samples
from megatron_direct.mcore import grid, passes
from megatron_direct.runtime import host


def dataset_losses(chunks: Sequence[torch.nn.Module], prefixes: Sequence[str],
                   model: ModelConfig, micro_batch_size: int) -> dict[str, float]:
    """Mean loss per token of each dataset, by its name, and of ``all`` together, on every rank.

    Documents are taken as samples: each from its beginning, cut at the model's sequence length.
    """
    names = prefix_names(list(prefixes))
    losses, total = {}, torch.zeros(2, dtype=torch.float64, device=host.device())
    for prefix in prefixes:
        samples = Samples([prefix], model.seq_length, model.vocab_size)
        sums = torch.zeros(2, dtype=torch.float64, device=host.device())
        for micro_batches in passes.of_samples(chunks, samples, samples.usable,
                                               MicroBatchLimits(micro_batch_size)):
            sample_losses = passes.run_pass(chunks, micro_batches, backward=False)
            labels = torch.stack([batch.loss_mask.sum(1) for batch in micro_batches])
            sums += torch.stack([(sample_losses * labels).double().sum(), labels.double().sum()])
        total += grid.sum_over_data(sums)
        losses[names[prefix]] = float(sums[0] / sums[1])
    if prefixes:
        losses[ALL_DATASETS] = float(total[0] / total[1])
    return losses
