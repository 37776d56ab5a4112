"""A piece: what one layer contributes, in one micro-batch, to each sample's gradient.

Each kind of layer makes the gradient of one parameter from what passes through the layer, sample
by sample, before any sum over samples. Shapes: s positions, b samples of the micro-batch, i and o a
linear layer's local inputs and outputs, n tokens that were routed to an expert, h width of an
embedding, p entries of a vector.

Every piece answers three questions about the gradients g_1 ... g_b of its parameter:
``inner_products(v)`` is [b], <g_i, v>, in the dtype of v; ``matrices()`` is [b, rows, columns], the
gradients themselves; and sketches are made from either the matrices or the factors. The factors are
float32 or bfloat16, as the passes are.

An expert sees tokens of all samples that ep ranks have in their micro-batches at the time, and its
pieces are of these ep * b samples, in the order (expert-parallel rank, row of its micro-batch).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.nn.functional import embedding, linear


@dataclass(frozen=True)
class OuterProducts:
    """Of a linear layer's weight: g_i = sum_t delta_ti a_ti^T, an o x i matrix."""

    inputs: torch.Tensor  # a: [s, b, i]
    output_grads: torch.Tensor  # delta: [s, b, o]

    @property
    def num_samples(self) -> int:
        return self.inputs.shape[1]

    def part(self, positions: slice) -> OuterProducts:
        return OuterProducts(self.inputs[positions], self.output_grads[positions])

    def matrices(self) -> torch.Tensor:
        return torch.einsum("sbo,sbi->boi", self.output_grads, self.inputs)

    def inner_products(self, vector: torch.Tensor) -> torch.Tensor:
        products = linear(self.inputs.to(vector.dtype), vector) * self.output_grads
        return products.sum((0, 2))


@dataclass(frozen=True)
class RoutedOuterProducts:
    """Of an expert's linear layer: g_i sums over the tokens of sample i that came to the expert.

    ``num_samples`` is ep * b.
    """

    inputs: torch.Tensor  # a: [n, i]
    output_grads: torch.Tensor  # delta: [n, o]
    samples: torch.Tensor  # [n] int64
    num_samples: int

    def matrices(self) -> torch.Tensor:
        sums = self.inputs.new_zeros(
            self.num_samples, self.output_grads.shape[1], self.inputs.shape[1])
        for sample in range(self.num_samples):
            tokens = self.samples == sample
            sums[sample] = self.output_grads[tokens].T @ self.inputs[tokens]
        return sums

    def inner_products(self, vector: torch.Tensor) -> torch.Tensor:
        products = (linear(self.inputs.to(vector.dtype), vector) * self.output_grads).sum(1)
        return products.new_zeros(self.num_samples).index_add_(0, self.samples, products)


@dataclass(frozen=True)
class RowSums:
    """Of an embedding: row r of g_i is the sum of delta_ti over positions t that looked up r."""

    rows: torch.Tensor  # [s, b] local row looked up; any row where ``held`` is False
    held: torch.Tensor  # [s, b] False where the row is another rank's
    output_grads: torch.Tensor  # delta: [s, b, h]
    num_rows: int

    @property
    def num_samples(self) -> int:
        return self.rows.shape[1]

    def part(self, positions: slice) -> RowSums:
        return RowSums(self.rows[positions], self.held[positions], self.output_grads[positions],
                       self.num_rows)

    def scaled(self, scale: torch.Tensor) -> RowSums:
        """The same gradients, their entries multiplied by those of ``scale`` [rows, h]."""
        return replace(self, output_grads=self.output_grads * embedding(self.rows, scale))

    def matrices(self) -> torch.Tensor:
        num_samples, width = self.output_grads.shape[1:]
        sums = self.output_grads.new_zeros(num_samples, self.num_rows, width)
        values = self.output_grads * self.held[..., None]
        for sample in range(num_samples):
            sums[sample].index_add_(0, self.rows[:, sample], values[:, sample])
        return sums

    def inner_products(self, vector: torch.Tensor) -> torch.Tensor:
        products = (embedding(self.rows, vector) * self.output_grads).sum(2)
        return (products * self.held).sum(0)


@dataclass(frozen=True)
class Entries:
    """Of a vector parameter (a norm's weight, a bias): g_i as it is."""

    grads: torch.Tensor  # [b, p]

    @property
    def num_samples(self) -> int:
        return self.grads.shape[0]

    def scaled(self, scale: torch.Tensor) -> Entries:
        """The same gradients, their entries multiplied by those of ``scale`` [p, 1]."""
        return Entries(self.grads * scale[:, 0])

    def matrices(self) -> torch.Tensor:
        return self.grads[..., None]

    def inner_products(self, vector: torch.Tensor) -> torch.Tensor:
        return self.grads.to(vector.dtype) @ vector.reshape(-1)


FactoredPiece = OuterProducts | RoutedOuterProducts | RowSums
Piece = FactoredPiece | Entries
