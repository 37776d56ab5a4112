"""Samples: the documents of a list of indexed datasets, one after the other, and batches of them.

Sample i is document ``i - first[d]`` of dataset d. A model with sequence length L sees its first
L + 1 tokens: L inputs, each with the next token as its label. The rest is *cut*, and
counted; a document of fewer than two tokens has no label, is not a sample, and is counted too.

Shapes: b samples of a micro-batch, s positions (all samples padded to the longest of the pass).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_direct.data import indexed
from megatron_direct.data.cards import corrupted_documents
from megatron_direct.data.sources import UNKNOWN, read_sources
from megatron_direct.errors import UserError
from megatron_direct.runtime import digests, host, sharing
from megatron_direct.runtime.sharing import ArrayMaker

# Samples that are sorted by length at once: hundreds of micro-batches for each of a thousand
# ranks, out of a few GB of tokens.
_STRETCH = 1 << 18
_BLOCK = 1 << 22  # samples of which a vector is made at once


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
class MicroBatchLimits:
    """The most of a micro-batch: samples, and positions that they take when all are padded to the
    longest of them. tokens: 0 for no such limit; a sample that is longer is alone."""

    samples: int
    tokens: int = 0

    def rows(self, longest: int) -> int:
        """b, where the longest sample has so many labels.

        The positions' limit is rounded down to three binary digits: so samples of like length have
        micro-batches of one shape, of which passes are made.
        """
        if not self.tokens:
            return self.samples
        fitting = max(1, self.tokens // max(1, longest))
        unit = 1 << max(0, fitting.bit_length() - 3)
        return min(self.samples, fitting // unit * unit)


@dataclass(frozen=True)
class PassShape:
    """How samples are cut into passes, and which of them a data-parallel rank computes.

    share, num_shares: this rank's, of so many. s is a multiple of ``length_multiple``; a pass is
    filled with empty micro-batches to a multiple of ``count_multiple``. in_step: all shares have
    equally many passes, and the passes of one number are of one shape in all of them.
    """

    micro_batch: MicroBatchLimits
    micro_batches_per_pass: int = 1
    share: int = 0
    num_shares: int = 1
    length_multiple: int = 1
    count_multiple: int = 1
    in_step: bool = False


@dataclass(frozen=True)
class Cut:
    """samples: longer than the sequence length; tokens: of them that no model sees."""

    samples: int
    tokens: int


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

        Samples of like length, out of a stretch of ``numbers``, share a micro-batch. Which samples
        do depends on ``numbers`` and the micro-batch's limits alone; share r of n takes every n-th
        micro-batch, so that the layout changes nothing but who computes what. done: [samples] bool,
        True for what need not be computed any more: it leaves its place in a micro-batch empty, so
        that the others are computed as they would have been, and a pass with nothing left is left
        out.
        """
        plan = micro_batches(self.num_labels, numbers, shape.micro_batch)
        at_once = shape.micro_batches_per_pass * shape.num_shares
        for size, of_all in _grouped(plan, at_once):
            group = of_all[shape.share:: shape.num_shares]
            seen, count = (of_all, -(-len(of_all) // shape.num_shares)) if shape.in_step else (
                group, len(group))
            if count == 0:
                continue
            if done is not None and all(done[ids].all() for ids in seen):
                continue
            longest = max(int(self.num_labels[ids].max()) for ids in seen)
            length = -(-longest // shape.length_multiple) * shape.length_multiple
            count = -(-count // shape.count_multiple) * shape.count_multiple
            group += [np.empty(0, np.int64)] * (count - len(group))
            if done is not None:
                group = [ids[~done[ids]] for ids in group]
            yield [self._micro_batch(ids, size, length) for ids in group]

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
    """The documents of ``prefixes`` as samples of at most ``seq_length`` labels.

    usable: [.] int64, ascending, of those that have a label. Both it and num_labels are made by
    ``make_array``: sharing.node_array, called on all ranks, holds them once on each node.
    """

    def __init__(self, prefixes: Sequence[str], seq_length: int, vocab_size: int | None = None,
                 make_array: ArrayMaker = sharing.private_array):
        if len(set(prefixes)) < len(prefixes):
            twice = sorted({p for p in prefixes if list(prefixes).count(p) > 1})
            raise UserError(f"{', '.join(twice)} is listed twice. List each dataset once.")
        self.prefixes = list(prefixes)
        self.seq_length = seq_length
        self.vocab_size = vocab_size
        self.datasets = [indexed.open_indexed(prefix) for prefix in prefixes]
        self.first = np.concatenate(
            [[0], np.cumsum([indexed.num_documents(d) for d in self.datasets])]).astype(np.int64)
        self.num_labels = make_array(len(self), np.int32, self._fill_num_labels)
        num_usable = sum(int(np.count_nonzero(self.num_labels[block] > 0))
                         for block in self._blocks())
        self.usable = make_array(num_usable, np.int64, self._fill_usable)

    def _fill_num_labels(self, num_labels: np.ndarray) -> None:
        for dataset, first, last in zip(self.datasets, self.first, self.first[1:], strict=False):
            lengths = indexed.document_lengths(dataset)
            num_labels[first:last] = np.clip(lengths - 1, 0, self.seq_length)

    def _fill_usable(self, usable: np.ndarray) -> None:
        found = 0
        for block in self._blocks():
            here = block.start + np.flatnonzero(self.num_labels[block] > 0)
            usable[found: found + len(here)] = here
            found += len(here)

    def _blocks(self) -> Iterator[slice]:
        return (slice(start, start + _BLOCK) for start in range(0, len(self), _BLOCK))

    def __len__(self) -> int:
        """Documents, the unusable ones included."""
        return int(self.first[-1])

    @property
    def num_unusable(self) -> int:
        return len(self) - len(self.usable)

    @functools.cached_property
    def cut(self) -> Cut:
        """What the sequence length cuts off."""
        cut_off = [np.maximum(indexed.document_lengths(dataset) - self.seq_length - 1, 0)
                   for dataset in self.datasets]
        return Cut(sum(int(np.count_nonzero(tokens)) for tokens in cut_off),
                   sum(int(tokens.sum()) for tokens in cut_off))

    @functools.cached_property
    def corrupted(self) -> np.ndarray:
        """[samples] whether a trial shuffled its tokens on purpose, as the datasets' cards say."""
        result = np.zeros(len(self), dtype=bool)
        stretches = itertools.pairwise(self.first.tolist())
        for prefix, (first, last) in zip(self.prefixes, stretches, strict=True):
            result[first + corrupted_documents(prefix, last - first)] = True
        return result

    @functools.cached_property
    def sources(self) -> np.ndarray | None:
        """[samples] int64 number of the source of each, UNKNOWN where the dataset has none; None
        where no dataset has."""
        of_each = [(read_sources(prefix, last - first), last - first) for prefix, (first, last)
                   in zip(self.prefixes, itertools.pairwise(self.first.tolist()), strict=True)]
        if all(numbers is None for numbers, _ in of_each):
            return None
        return np.concatenate([np.full(count, UNKNOWN, np.int64) if numbers is None else numbers
                               for numbers, count in of_each])

    def sources_of(self, samples: np.ndarray) -> np.ndarray | None:
        """[n] the number of the source of each, as :attr:`sources`."""
        return None if self.sources is None else self.sources[samples]

    @functools.cached_property
    def sources_digest(self) -> str | None:
        return None if self.sources is None else digests.digest(self.sources.tobytes())

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


def _grouped(plan: Iterator[tuple[int, np.ndarray]], at_once: int,
             ) -> Iterator[tuple[int, list[np.ndarray]]]:
    """(b, at most ``at_once`` micro-batches that follow one another and have b rows)"""
    for size, alike in itertools.groupby(plan, key=lambda planned: planned[0]):
        while group := [ids for _, ids in itertools.islice(alike, at_once)]:
            yield size, group


def micro_batches(num_labels: np.ndarray, samples: np.ndarray, limits: MicroBatchLimits,
                  ) -> Iterator[tuple[int, np.ndarray]]:
    """(b, the samples of a micro-batch of b rows), made as they are asked for.

    A stretch of the samples at a time is sorted by length, then by number: so nothing is ever as
    long as the list, and samples that are computed at one time lie near one another on the disk.
    The first begins with the longest, so that a pass that does not fit into memory fails at once;
    every other one is sorted the other way round, so that lengths do not jump between two.
    """
    stretch = max(1, _STRETCH // limits.samples) * limits.samples
    for number, start in enumerate(range(0, len(samples), stretch)):
        here = samples[start: start + stretch]
        order = here[np.lexsort((here, num_labels[here]))]
        if number % 2 == 0:
            order = order[::-1]
        yield from _cut(order, num_labels, limits)


def _cut(order: np.ndarray, num_labels: np.ndarray, limits: MicroBatchLimits,
         ) -> Iterator[tuple[int, np.ndarray]]:
    """order: samples, by length."""
    lengths, which = np.unique(num_labels[order], return_inverse=True)
    rows = np.array([limits.rows(int(length)) for length in lengths])[which]
    for alike in np.split(np.arange(len(order)), np.flatnonzero(np.diff(rows)) + 1):
        size = int(rows[alike[0]])
        yield from ((size, order[alike[first: first + size]])
                    for first in range(0, len(alike), size))

