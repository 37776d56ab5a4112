"""What a kernel is: one way to hash the gradients of a layer, with sums of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from megatron_direct.gradients.hashes import Hashes
from megatron_direct.gradients.kernels.costs import Coefficients
from megatron_direct.gradients.pieces import (
    Entries,
    FactoredPiece,
    OuterProducts,
    Piece,
    RoutedOuterProducts,
    RowSums,
)


@dataclass(frozen=True)
class Work:
    """The shapes of a piece, which is all that the choice of a kernel depends on.

    tokens: of one sample; of routed ones, the mean. outputs, inputs: the shard's rows and columns,
    and of how many buckets each. size: k. device_type: cpu or cuda. lookup: an embedding's rows are
    looked up. routed: the tokens of all samples come in no order.
    """

    tokens: float
    outputs: int
    inputs: int
    output_buckets: int
    input_buckets: int
    size: int
    samples: int
    device_type: str
    bf16: bool = False
    lookup: bool = False
    routed: bool = False

    @classmethod
    def of(cls, piece: FactoredPiece, hashes: Hashes) -> Work:
        routed = isinstance(piece, RoutedOuterProducts)
        samples = piece.num_samples
        return cls(tokens=len(piece.output_grads) / samples if routed else len(piece.output_grads),
                   outputs=hashes.rows.width, inputs=hashes.columns.width,
                   output_buckets=hashes.rows.size, input_buckets=hashes.columns.size,
                   size=hashes.size, samples=samples,
                   device_type="cuda" if piece.output_grads.is_cuda else "cpu",
                   bf16=factor_dtype(piece) == torch.bfloat16,
                   lookup=isinstance(piece, RowSums), routed=routed)

    @property
    def gathered(self) -> int:
        """Numbers gathered per token to count-sketch both factors: each axis in whole blocks."""
        outputs = 1 if self.lookup else self.outputs
        return (whole_blocks(outputs, self.output_buckets)
                + whole_blocks(self.inputs, self.input_buckets))

    def multiply_add(self, costs: Coefficients) -> float:
        return costs.bf16_multiply_add if self.bf16 else costs.multiply_add


def whole_blocks(width: int, buckets: int) -> int:
    """Numbers of an axis that is filled up to whole blocks of its buckets."""
    return -(-width // buckets) * buckets


class Kernel(ABC):
    """Sketches [n, k] of n samples' gradients, to which pieces are added.

    A new kernel is a subclass in a file of its own, named in ``KERNELS``.
    """

    name: str
    applies_scale = False  # whether it can multiply a gradient's entries by factors of their own

    @staticmethod
    @abstractmethod
    def takes(piece: Piece, hashes: Hashes, device_type: str) -> bool:
        """Whether pieces of this kind and of a matrix of such hashes can be added there."""

    @staticmethod
    @abstractmethod
    def cost(work: Work, costs: Coefficients) -> float:
        """Nanoseconds that adding a piece takes: a sum of counts times coefficients."""

    @abstractmethod
    def __init__(self, num_samples: int, size: int, device: torch.device):
        """Sums of zero."""

    @abstractmethod
    def add(self, first: int, piece: Piece, hashes: Hashes,
            scale: torch.Tensor | None = None) -> None:
        """Adds the sketches of a piece's gradients to rows ``first``, ``first + 1``, ...

        scale: [rows, columns] factors of the gradients' entries; only where ``applies_scale``.
        """

    @abstractmethod
    def total(self) -> torch.Tensor:
        """[n, k] float32 sums of all that was added."""


def factor_dtype(piece: Piece) -> torch.dtype:
    """bfloat16 for a piece that is all of it in bfloat16, else float32."""
    tensors = [piece.grads] if isinstance(piece, Entries) else [piece.output_grads]
    if isinstance(piece, OuterProducts | RoutedOuterProducts):
        tensors.append(piece.inputs)
    in_bf16 = all(tensor.dtype == torch.bfloat16 for tensor in tensors)
    return torch.bfloat16 if in_bf16 else torch.float32
