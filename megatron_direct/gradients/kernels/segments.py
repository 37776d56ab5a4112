"""Sums over the tokens of each sample, where an expert's tokens come in no order.

Which sample a token belongs to is known to the device alone, and so is the number of tokens of a
sample. To ask for either would make the host wait for the device in the middle of a pass. So all
shapes here follow from the numbers of tokens and of samples: the tokens are sorted by sample and
cut into blocks, each of one sample, and the number of blocks has a bound. Every sum takes its terms
in one order, and a sample's tokens are never multiplied into another's sum, not even by zero, so
that a gradient that is not finite stays with its own sample.

Shapes: N tokens, n samples, B blocks of c tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_direct.gradients.hashes import parts_of

# Tokens of a block come in multiples of this: what tensor cores like, and no cost on a CPU.
_MULTIPLE = 16


@dataclass(frozen=True)
class Segments:
    """The tokens of each sample.

    order: [N] the tokens, sorted by sample. counts: [n] tokens of each sample.
    """

    order: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def of(cls, samples: torch.Tensor, num_samples: int) -> Segments:
        """samples: [N] int64 sample of each token."""
        numbers = torch.arange(num_samples, device=samples.device)
        return cls(torch.argsort(samples, stable=True),
                   (samples[:, None] == numbers).sum(0))

    def sums(self, values: torch.Tensor, first: int = 0) -> torch.Tensor:
        """[n, ...] sums over each sample's tokens, of values [m, ...] of the sorted tokens from
        ``first`` on."""
        ends = self.counts.cumsum(0)
        begins, last = ends - self.counts, first + len(values)
        return _segment_sums(values, ends.clamp(first, last) - begins.clamp(first, last))


@dataclass(frozen=True)
class Blocks:
    """The tokens of each sample, in blocks that are filled up with zeros.

    A block has half as many tokens as a sample has on average: with larger ones more of them would
    be zeros, with smaller ones there would be more products to add up. B is at most 3 n.
    """

    tokens: torch.Tensor  # [B, c] int64
    is_filling: torch.Tensor  # [B, c, 1] bool
    per_sample: torch.Tensor  # [n] int64 blocks of each sample; they come in the samples' order

    @classmethod
    def of(cls, segments: Segments) -> Blocks:
        num_tokens, num_samples = len(segments.order), len(segments.counts)
        length = -(-num_tokens // (2 * num_samples * _MULTIPLE)) * _MULTIPLE
        counts = segments.counts
        per_sample = (counts + length - 1) // length
        ends = per_sample.cumsum(0)
        block = torch.arange(num_tokens // length + num_samples, device=counts.device)
        owner = torch.searchsorted(ends, block, right=True).clamp_(max=num_samples - 1)
        place = ((block - ends[owner] + per_sample[owner]) * length)[:, None] + torch.arange(
            length, device=counts.device)  # [B, c] among the tokens of the sample
        first = (counts.cumsum(0) - counts)[owner, None]
        tokens = segments.order[(first + place).clamp_(max=num_tokens - 1)]
        return cls(tokens, (place >= counts[owner, None])[..., None], per_sample)

    def take(self, values: torch.Tensor) -> torch.Tensor:
        """[B, c, width] values [N, width] of each block's tokens, zeros where there are none."""
        taken = values.index_select(0, self.tokens.flatten())
        return taken.unflatten(0, self.tokens.shape).masked_fill_(self.is_filling, 0)

    def add_products(self, sums: torch.Tensor, left: torch.Tensor, right: torch.Tensor,
                     product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        """Adds, to sums [n, a, b] float32, those of left^T right over the tokens of each sample.

        left: [B, c, a], right: [B, c, b] as ``take`` gives them. product(x, y): float32 products
        x^T y of each block. The products of all blocks are held for some rows of a at a time.
        """
        rows = parts_of(sums, len(left) * right.shape[-1])
        for part, of_part in zip(sums.split(rows, 1), left.split(rows, 2), strict=True):
            part += _segment_sums(product(of_part, right), self.per_sample)


def add_products_by_sample(sums: torch.Tensor, samples: torch.Tensor, left: torch.Tensor,
                           right: torch.Tensor,
                           product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """``Blocks.add_products`` of tokens [N, a] and [N, b] of samples [N], to sums [n, a, b]."""
    blocks = Blocks.of(Segments.of(samples, len(sums)))
    blocks.add_products(sums, blocks.take(left), blocks.take(right), product)


def _segment_sums(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """[n, ...] sums over consecutive segments of values [m, ...]; what is left over is not summed.
    """
    return _reduced(values, lengths) if values.is_cuda else _added_one_by_one(values, lengths)


def _reduced(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """``unsafe`` leaves out a check of the lengths, for which the host would wait."""
    return torch.segment_reduce(values.contiguous(), "sum", lengths=lengths, axis=0, unsafe=True)


def _added_one_by_one(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """On a CPU five times as fast, and as deterministic there."""
    owner = torch.repeat_interleave(lengths)
    sums = values.new_zeros(len(lengths), *values.shape[1:])
    return sums.index_add_(0, owner, values[:len(owner)])
