"""The empirical Fisher of the validation samples, as an operator: F = (1/M) sum_i g_i g_i^T.

g_i is the gradient of sample i's mean loss. A product takes two first-order passes: the first takes
c_i = <g_i, v> from hooks, the second is the backward pass of (1/M) sum_i c_i loss_i, whose
gradient is F v. So it runs with every kernel that has a gradient. F is positive semi-definite, and
its rank is at most M.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from megatron_direct.curvature.vectors import ParameterSpace
from megatron_direct.data.samples import MicroBatch, MicroBatchLimits, Samples
from megatron_direct.errors import UserError
from megatron_direct.gradients.hooks import PieceHooks
from megatron_direct.mcore import grid, passes


class FisherOperator:
    """Products F v over ``numbers`` of ``samples``; vectors as in ``curvature.vectors``."""

    def __init__(self, chunks: Sequence[torch.nn.Module], space: ParameterSpace, samples: Samples,
                 numbers: np.ndarray, micro_batch: MicroBatchLimits):
        if len(numbers) == 0:
            raise UserError("the validation set holds no samples: curvature needs at least one. "
                            "Check --valid-data-path.")
        self.space = space
        self.num_samples = len(numbers)
        self._chunks = chunks
        # Kept: the tokens of the validation set are small beside one vector.
        self._passes = list(passes.of_samples(chunks, samples, numbers, micro_batch))

    def matvec(self, vector: torch.Tensor) -> torch.Tensor:
        product = torch.zeros_like(vector)
        for micro_batches, inner in zip(self._passes, self.inner_products(vector), strict=True):
            product += self._weighted_gradient(micro_batches, inner / self.num_samples)
        return self.space.sum_over_data(self.space.add_partial_sums(product))

    def inner_products(self, vector: torch.Tensor) -> list[torch.Tensor]:
        """<g_i, v> of this data-parallel rank's samples: [micro-batches, b] a pass, zero for
        padding rows; in one all-reduce of them all."""
        if not self._passes:
            return []
        matrices = {shard.name: shard.as_matrix(part) for shard, part in
                    zip(self.space.shards, self.space.split(vector), strict=True)}
        shares, losses = [], []
        with PieceHooks(self._chunks, self.space.shards, dtype=self.space.dtype) as hooks:
            for micro_batches in self._passes:
                size = grid.expert_size() * micro_batches[0].tokens.shape[0]
                shares.append(vector.new_zeros(len(micro_batches), size))
                losses.append(self._add_share(shares[-1], hooks, micro_batches, matrices))
        self._require_finite(losses)
        totals = grid.sum_over_model(torch.cat([share.flatten() for share in shares]))
        parts = totals.split([share.numel() for share in shares])
        return [part.view_as(share)[:, grid.own_rows(share.shape[1] // grid.expert_size())]
                for part, share in zip(parts, shares, strict=True)]

    def _add_share(self, total: torch.Tensor, hooks: PieceHooks,
                   micro_batches: Sequence[MicroBatch], parts: Mapping[str, torch.Tensor],
                   ) -> torch.Tensor:
        """Adds this rank's part of <g_i, v> to total, [micro-batches, b]; returns the losses.

        With expert parallelism b counts the samples of all ranks that share the experts. parts: of
        v, by name, as matrices.
        """
        size = micro_batches[0].tokens.shape[0]
        own = grid.own_rows(size)

        def add(micro_batch, shard, piece):
            products = piece.inner_products(parts[shard.name])
            rows = slice(None) if len(products) > size else own
            total[micro_batch, rows] += products

        hooks.begin_pass(add)
        return passes.run_pass(self._chunks, micro_batches, backward=True,
                               before_forward=hooks.begin)

    def _weighted_gradient(self, micro_batches: Sequence[MicroBatch], weights: torch.Tensor,
                           ) -> torch.Tensor:
        """This rank's part of the gradient of sum_i weights_i loss_i."""
        for chunk in self._chunks:
            chunk.zero_grad()
        passes.run_pass(self._chunks, micro_batches, backward=True, weights=list(weights))
        gradients = [torch.zeros_like(s.parameter) if s.parameter.grad is None else s.parameter.grad
                     for s in self.space.shards]
        for chunk in self._chunks:
            chunk.zero_grad()
        return self.space.join(gradients)

    def _require_finite(self, losses: Sequence[torch.Tensor]) -> None:
        """When all passes are queued, since the host waits for what it looks at."""
        for micro_batches, of_pass in zip(self._passes, losses, strict=True):
            bad = passes.not_finite(of_pass, micro_batches)
            if len(bad):
                raise UserError(f"the loss of validation sample {bad[0]} is not finite. Remove the "
                                "sample from the validation set, or check the checkpoint.")
