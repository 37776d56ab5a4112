"""One pass of Megatron's pipeline schedule over micro-batches of samples.

The loss of a pass is sum_i weight_i * loss_i over its samples, loss_i being the mean loss of the
labels of sample i: whoever wants a mean, a gradient of one kind or another, or nothing but the
losses chooses the weights. The same code drives one rank, tensor parallel ranks and pipelines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from megatron_direct.data.samples import MicroBatch, MicroBatchLimits, PassShape, SampleSource
from megatron_direct.mcore import grid
from megatron_direct.runtime import host


def of_samples(chunks: Sequence[torch.nn.Module], samples: SampleSource, numbers: np.ndarray,
               micro_batch: MicroBatchLimits, done: np.ndarray | None = None,
               ) -> Iterator[list[MicroBatch]]:
    """This data-parallel rank's share of the samples, in passes that suit the layout.

    A pipeline of p stages is busy m / (m + p - 1) of the time with m micro-batches: 4 p of them
    keep it busy 4/5 of the time. The interleaved schedule takes multiples of p only. Ranks that
    share experts exchange tokens all the time, and go through equal passes in step. done: [samples]
    bool, what need not be computed any more. The tokens of a pass are read while the one before it
    is computed.
    """
    layout: Any = chunks[0].config
    stages = layout.pipeline_model_parallel_size
    return _read_ahead(samples.passes(numbers, PassShape(
        micro_batch,
        micro_batches_per_pass=1 if stages == 1 else 4 * stages,
        share=grid.data_rank(),
        num_shares=grid.data_size(),
        length_multiple=layout.tensor_model_parallel_size if layout.sequence_parallel else 1,
        count_multiple=stages,
        in_step=layout.expert_model_parallel_size > 1), done))


def _read_ahead(found: Iterator[list[MicroBatch]]) -> Iterator[list[MicroBatch]]:
    with ThreadPoolExecutor(1, "read-ahead") as reader:
        following = reader.submit(next, found, None)
        while (micro_batches := following.result()) is not None:
            following = reader.submit(next, found, None)
            yield micro_batches


def run_pass(
    chunks: Sequence[torch.nn.Module],
    micro_batches: Sequence[MicroBatch],
    *,
    backward: bool,
    weights: Sequence[torch.Tensor] | None = None,
    before_forward: Callable[[int], None] = lambda index: None,
    stacked: int = 1,
) -> torch.Tensor:
    """Forward, and backward if asked for, over one pass.

    chunks: this rank's model chunks, bare (not wrapped in DistributedDataParallel).
    weights: one [b] tensor a micro-batch; left out: all 1.
    before_forward: called with a micro-batch's number as each chunk begins with it, so that hooks
        know whose activations they see.
    stacked: activations that a chunk passes on as one, stacked along the sequence.

    Returns the samples' losses, [micro-batches, b], in float32 at least, on every rank of the copy
    of the model.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    count, size = len(micro_batches), micro_batches[0].tokens.shape[0]
    config: Any = chunks[0].config
    losses = torch.zeros(count, size, device=host.device(), dtype=torch.promote_types(
        config.params_dtype, torch.float32))

    def forward_step(iterator, chunk):
        index = next(iterator)
        batch = micro_batches[index]
        before_forward(index)
        output = chunk(batch.tokens, batch.position_ids, None, labels=batch.labels)

        def weighted_loss(token_losses):
            sample_losses = (token_losses * batch.loss_mask).sum(1) / batch.num_labels
            losses[index] = sample_losses.detach()
            total = sample_losses.sum() if weights is None else sample_losses @ weights[index]
            return total, torch.ones((), dtype=torch.int), {}

        return output, weighted_loss

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(range(count)) for _ in chunks],
        model=list(chunks),
        num_microbatches=count,
        seq_length=stacked * micro_batches[0].tokens.shape[1],
        micro_batch_size=size,
        forward_only=not backward,
    )
    return grid.share_from_last_stage(losses)


def run_logits(chunks: Sequence[torch.nn.Module], micro_batches: Sequence[MicroBatch],
               read: Callable[[int, torch.Tensor], None]) -> None:
    """Forward over one pass, without labels.

    read: called on the last stage with the number of a micro-batch and its logits [b, s, v], this
    tensor-parallel rank's part of the vocabulary.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def forward_step(iterator, chunk):
        index = next(iterator)
        batch = micro_batches[index]
        output = chunk(batch.tokens, batch.position_ids, None)

        def take(logits):
            read(index, logits)
            return logits.new_zeros(()), torch.ones((), dtype=torch.int), {}

        return output, take

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(range(len(micro_batches))) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(micro_batches),
        seq_length=micro_batches[0].tokens.shape[1],
        micro_batch_size=micro_batches[0].tokens.shape[0],
        forward_only=True,
    )


def sample_rows(micro_batches: Sequence[MicroBatch]) -> torch.Tensor:
    """Positions, among all [micro-batches x b] rows of a pass, of those that hold a sample."""
    size = micro_batches[0].tokens.shape[0]
    return torch.cat([index * size + torch.arange(len(batch.samples))
                      for index, batch in enumerate(micro_batches)])


def sample_numbers(micro_batches: Sequence[MicroBatch]) -> np.ndarray:
    """[n] of the samples in the rows that :func:`sample_rows` gives."""
    return np.concatenate([batch.samples for batch in micro_batches])


def not_finite(values: torch.Tensor, micro_batches: Sequence[MicroBatch]) -> np.ndarray:
    """Numbers of the samples whose value is not; values: [micro-batches, b] of a pass."""
    bad = ~torch.isfinite(values.flatten().cpu()[sample_rows(micro_batches)])
    return sample_numbers(micro_batches)[bad.numpy()]
