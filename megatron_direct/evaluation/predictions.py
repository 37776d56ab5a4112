"""What a model says of each token: its log-likelihood, and the likeliest token in its place.

The vocabulary is spread over the tensor-parallel ranks, and so are the logits. Only numbers with
one entry per token pass between ranks. Shapes: b samples of a micro-batch, s positions, v entries
of the vocabulary on this rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_direct.data.samples import MicroBatch, MicroBatchLimits, SampleSource
from megatron_direct.mcore import grid, passes
from megatron_direct.runtime import host


@dataclass(frozen=True, eq=False)
class Predictions:
    """Of one sample with n labels: [n] log-likelihood of each, and [n] the likeliest token."""

    log_likelihoods: np.ndarray
    likeliest: np.ndarray


def predict(chunks: Sequence[torch.nn.Module], samples: SampleSource, numbers: np.ndarray,
            micro_batch_size: int, vocab_size: int) -> dict[int, Predictions]:
    """Of this rank's share of the samples, by number; all ranks call this.

    vocab_size: entries of the tokenizer; those behind them are in the softmax, as in training, and
    never the likeliest.
    """
    found = {}
    with torch.no_grad():
        for micro_batches in passes.of_samples(chunks, samples, numbers,
                                               MicroBatchLimits(micro_batch_size)):
            scores = _run(chunks, micro_batches, vocab_size).cpu().numpy()
            for row, sample in _rows(micro_batches):
                count = int(samples.num_labels[sample])
                likelihood, likeliest = scores[:, row, :count]
                found[sample] = Predictions(likelihood, likeliest.astype(np.int64))
    return found


def _rows(micro_batches: Sequence[MicroBatch]) -> Iterator[tuple[int, int]]:
    """(row among all of the pass, sample in it)"""
    rows, numbers = passes.sample_rows(micro_batches), passes.sample_numbers(micro_batches)
    yield from zip(rows.tolist(), numbers.tolist(), strict=True)


def _run(chunks: Sequence[torch.nn.Module], micro_batches: Sequence[MicroBatch], vocab_size: int,
         ) -> torch.Tensor:
    """[2, m b, s] log-likelihoods of the labels and likeliest tokens, in float64."""
    size, length = micro_batches[0].tokens.shape
    scores = torch.zeros(2, len(micro_batches) * size, length, dtype=torch.float64,
                         device=host.device())

    def read(index: int, logits: torch.Tensor) -> None:
        for row in range(size):  # one at a time: in float32 all of them would be much
            scores[:, index * size + row] = _of_sample(
                logits[row].float(), micro_batches[index].labels[row], vocab_size)

    passes.run_logits(chunks, micro_batches, read)
    return grid.share_from_last_stage(scores)


def _of_sample(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """[2, s] from this rank's logits [s, v]; all tensor-parallel ranks call this."""
    first, count = grid.tensor_rank() * logits.shape[1], logits.shape[1]

    def of_all_ranks(values: torch.Tensor) -> torch.Tensor:
        return grid.gather_over_tensor_ranks(values[:, None], 1)

    total = torch.logsumexp(of_all_ranks(torch.logsumexp(logits, 1)), 1)
    own = (labels >= first) & (labels < first + count)
    place = torch.where(own, labels - first, 0)[:, None]
    label = grid.sum_over_tensor_ranks(torch.where(own, logits.gather(1, place)[:, 0], 0.0))
    is_entry = first + torch.arange(count, device=logits.device) < vocab_size
    best, where = torch.where(is_entry, logits, -torch.inf).max(1)
    bests, places = of_all_ranks(best), of_all_ranks(where + first)
    likeliest = places.gather(1, bests.argmax(1, keepdim=True))[:, 0]
    return torch.stack([(label - total).double(), likeliest.double()])
