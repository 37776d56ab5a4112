"""Samples: the documents of a list of indexed datasets, one after the other, and batches of them.

Sample i is document ``i - first[d]`` of dataset d. A model with sequence length L sees its first
L + 1 tokens: L inputs, each with the next token as its label. The rest is *cut*, and
counted; a document of fewer than two tokens has no label, is not a sample, and is counted too.

Shapes: b samples of a micro-batch, s positions (all samples padded to the longest of the pass).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_direct.data import indexed
from megatron_direct.data.cards import corrupted_documents
from megatron_direct.errors import UserError
from megatron_direct.runtime import host


@dataclass(frozen=True)
class MicroBatch:
    """samples: [<= b] sample numbers; the rows behind them are padding, with no labels."""

    samples: np.ndarray
    tokens: torch.Tensor  # [b, s] int64
    labels: torch.Tensor  # [b, s] int64
    loss_mask: torch.Tensor  # [b, s] float32, 1 where a label counts
    position_ids: torch.Tensor  # [b, s] int64

    @property
    def num_labels(self) -> torch.Tensor:
        """[b] labels of each sample; 1 for padding rows, so that it can be divided by."""
        return self.loss_mask.sum(1).clamp(min=1)


@dataclass(frozen=True)
class PassShape:
    """How samples are cut into passes, and which of them a data-parallel rank computes.

    share, num_shares: this rank's, of so many. s is a multiple of ``length_multiple``; a pass is
    filled with empty micro-batches to a multiple of ``count_multiple``. in_step: all shares have
    equally many passes, and the passes of one number are of one shape in all of them.
    """

    micro_batch_size: int
    micro_batches_per_pass: int = 1
    share: int = 0
    num_shares: int = 1
    length_multiple: int = 1
    count_multiple: int = 1
    in_step: bool = False


class SampleSource:
    """Samples of any origin, by number, and micro-batches of them. A subclass has

    num_labels: [samples] positions that the model sees of each sample;
    tokens(sample): its num_labels + 1 tokens;
    first_label(sample): the first position whose label counts.
    """

    num_labels: np.ndarray

    def tokens(self, sample: int) -> np.ndarray:
        raise NotImplementedError

    def first_label(self, sample: int) -> int:
        return 0

    def passes(self, numbers: np.ndarray, shape: PassShape, done: np.ndarray | None = None,
               ) -> Iterator[list[MicroBatch]]:
        """Every sample of ``numbers`` once, in passes of equally shaped micro-batches.

        Samples of like length share a micro-batch. Which samples do depends on ``numbers`` and the
        micro-batch size alone; share r of n takes every n-th micro-batch, so that the layout
        changes nothing but who computes what. done: [samples] bool, True for what need not be
        computed any more: it leaves its place in a micro-batch empty, so that the others are
        computed as they would have been, and a pass with nothing left is left out.
        """
        plan = plan_micro_batches(self.num_labels, numbers, shape.micro_batch_size)
        at_once = shape.micro_batches_per_pass * shape.num_shares
        for start in range(0, len(plan), at_once):
            of_all = plan[start: start + at_once]
            group = of_all[shape.share:: shape.num_shares]
            seen, count = (of_all, -(-len(of_all) // shape.num_shares)) if shape.in_step else (
                group, len(group))
            if count == 0:
                return
            if done is not None and all(done[ids].all() for ids in seen):
                continue
            longest = max(int(self.num_labels[ids].max()) for ids in seen)
            length = -(-longest // shape.length_multiple) * shape.length_multiple
            count = -(-count // shape.count_multiple) * shape.count_multiple
            group += [np.empty(0, np.int64)] * (count - len(group))
            if done is not None:
                group = [ids[~done[ids]] for ids in group]
            yield [self._micro_batch(ids, shape.micro_batch_size, length) for ids in group]

    def _micro_batch(self, samples: np.ndarray, size: int, length: int) -> MicroBatch:
        tokens = np.zeros((size, length), np.int64)
        labels = np.zeros((size, length), np.int64)
        mask = np.zeros((size, length), np.float32)
        for row, sample in enumerate(samples):
            text = self.tokens(sample)
            tokens[row, : len(text) - 1] = text[:-1]
            labels[row, : len(text) - 1] = text[1:]
            mask[row, self.first_label(sample): len(text) - 1] = 1.0
        positions = torch.arange(length, device=host.device()).expand(size, length)
        on_device = [host.to_device(torch.from_numpy(array)) for array in (tokens, labels, mask)]
        return MicroBatch(samples, on_device[0], on_device[1], on_device[2], positions)


class Samples(SampleSource):
    """The documents of ``prefixes`` as samples of at most ``seq_length`` labels."""

    def __init__(self, prefixes: Sequence[str], seq_length: int, vocab_size: int | None = None):
        if len(set(prefixes)) < len(prefixes):
            twice = sorted({p for p in prefixes if list(prefixes).count(p) > 1})
            raise UserError(f"{', '.join(twice)} is listed twice. List each dataset once.")
        self.prefixes = list(prefixes)
        self.seq_length = seq_length
        self.vocab_size = vocab_size
        self.datasets = [indexed.open_indexed(prefix) for prefix in prefixes]
        self.document_lengths = [indexed.document_lengths(d) for d in self.datasets]
        self.first = np.concatenate(
            [[0], np.cumsum([len(lengths) for lengths in self.document_lengths])]).astype(np.int64)
        all_lengths = np.concatenate([np.empty(0, np.int64), *self.document_lengths])
        self.num_labels = np.minimum(np.maximum(all_lengths - 1, 0), seq_length)
        self.usable = np.flatnonzero(self.num_labels > 0)
        self.num_cut = int(np.sum(all_lengths > seq_length + 1))
        self.num_cut_tokens = int(np.sum(np.maximum(all_lengths - seq_length - 1, 0)))

    def __len__(self) -> int:
        """Documents, the unusable ones included."""
        return int(self.first[-1])

    @property
    def num_unusable(self) -> int:
        return len(self) - len(self.usable)

    @functools.cached_property
    def corrupted(self) -> np.ndarray:
        """[samples] whether a trial shuffled its tokens on purpose, as the datasets' cards say."""
        result = np.zeros(len(self), dtype=bool)
        for prefix, first, last in zip(self.prefixes, self.first[:-1], self.first[1:],
                                       strict=True):
            result[first + corrupted_documents(prefix, int(last - first))] = True
        return result

    def dataset_of(self, samples: np.ndarray) -> np.ndarray:
        """[n] the number of the dataset that each sample is in."""
        return np.searchsorted(self.first, samples, side="right") - 1

    def tokens(self, sample: int) -> np.ndarray:
        """The sample's tokens, at most seq_length + 1."""
        number = int(self.dataset_of(np.array(sample)))
        tokens = indexed.document_tokens(
            self.datasets[number], int(sample - self.first[number]), self.seq_length + 1)
        if self.vocab_size is not None and len(tokens):
            for token in (tokens.max(), tokens.min()):
                if not 0 <= token < self.vocab_size:
                    raise UserError(
                        f"{self.prefixes[number]} holds token {token}, but the model's vocabulary "
                        f"has {self.vocab_size} entries. Was it made with another tokenizer? "
                        "Rebuild it with the model's.")
        return tokens


def plan_micro_batches(num_labels: np.ndarray, samples: np.ndarray, size: int) -> list[np.ndarray]:
    """Samples sorted by length, then by number, cut into micro-batches."""
    order = samples[np.lexsort((samples, num_labels[samples]))]
    return [order[start: start + size] for start in range(0, len(order), size)]
