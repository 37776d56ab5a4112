"""Products of count-sketched factors, and a buffer that makes one product of many layers' factors.

Shapes: n samples, t tokens of each, k the size of the sketch.
"""

from __future__ import annotations

import torch


class FactorBuffer:
    """Count-sketched factors, side by side along the tokens, until one product adds them all."""

    def __init__(self, num_tokens: int):
        self._num_tokens = num_tokens
        self._factors: torch.Tensor | None = None  # [2, n, tokens, k]: left and right
        self._frames: torch.Tensor | None = None  # that they are to be added to
        self._filled = 0

    def reserve(self, frames: torch.Tensor, num_tokens: int, dtype: torch.dtype) -> torch.Tensor:
        """[2, n, num_tokens, k] places for the factors of one layer, to be written at once."""
        if not self._has_room(frames, num_tokens, dtype):
            self.flush()
            room = max(num_tokens, self._num_tokens)
            shape = (2, len(frames), room, frames.shape[-1])
            factors = self._factors
            if factors is None or factors.shape != shape or factors.dtype != dtype:
                factors = self._factors = None  # given back before the next is made
                self._factors = torch.empty(shape, dtype=dtype, device=frames.device)
            self._frames = frames
        assert self._factors is not None
        places = self._factors[:, :, self._filled: self._filled + num_tokens]
        self._filled += num_tokens
        return places

    def _has_room(self, frames: torch.Tensor, num_tokens: int, dtype: torch.dtype) -> bool:
        return (self._frames is not None and self._factors is not None
                and self._factors.dtype == dtype
                and self._frames.data_ptr() == frames.data_ptr()
                and len(self._frames) == len(frames)
                and self._filled + num_tokens <= self._factors.shape[2])

    def flush(self) -> None:
        if self._frames is not None and self._factors is not None:
            left, right = self._factors[:, :, :self._filled]
            add_product(self._frames, left, right)
        self._filled, self._frames = 0, None


def add_product(frames: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Adds left^T right to float32 frames [n, a, b]; left: [n, t, a], right: [n, t, b]."""
    if left.is_cuda and left.dtype == torch.bfloat16:
        torch.baddbmm(frames, left.mT, right, torch.float32, out=frames)
    else:
        frames.baddbmm_(left.mT.float(), right.float())


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """[n, a, b] float32 left^T right."""
    if left.is_cuda and left.dtype == torch.bfloat16:
        return torch.bmm(left.mT, right, out_dtype=torch.float32)
    return torch.bmm(left.mT.float(), right.float())
