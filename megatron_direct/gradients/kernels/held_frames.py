"""Frames of the samples of one micro-batch, and the sums of those before it.

A frame takes k times the memory of a sketch, or a good part of that: frames are held for as many
samples as are computed at once, and summed along (row + column) mod k when the next begin.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_direct.gradients.hashes import folded


class HeldFrames:
    """n samples' sums, [n, k], and frames [m, k, columns] of some of them.

    before_summing: called when the frames are about to be summed, for what is still to be added.
    """

    def __init__(self, num_samples: int, size: int, columns: int, device: torch.device,
                 before_summing: Callable[[], None] = lambda: None):
        self._before_summing = before_summing
        self._sums = torch.zeros(num_samples, size, device=device)
        self._first = 0  # the sample of the first frame
        self._frames = torch.empty(0, size, columns, device=device)

    def of(self, first: int, count: int) -> torch.Tensor:
        """[count, k, columns] of these samples; those of an earlier micro-batch are summed up."""
        begin = first - self._first
        if begin < 0 or begin + count > len(self._frames):
            self._sum()
            if len(self._frames) != count:
                self._frames = self._frames.new_zeros(count, *self._frames.shape[1:])
            self._first, begin = first, 0
        return self._frames[begin: begin + count]

    def total(self) -> torch.Tensor:
        """[n, k]"""
        self._sum()
        return self._sums

    def _sum(self) -> None:
        self._before_summing()
        if len(self._frames):
            self._sums[self._first: self._first + len(self._frames)] += folded(self._frames)
            self._frames.zero_()
