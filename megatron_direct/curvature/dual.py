"""Exact second-order products by reverse over forward differentiation, through Megatron's passes.

L(theta) is the mean loss of all label tokens, v a direction, and phi(theta) = <grad L(theta), v>
its derivative along v. phi is one more loss: its gradient is H v. A pipeline stage computes it with
dual parameters (theta, v) and passes value and tangent [y; y'] on as one activation, stacked along
the sequence; the last stage hands back the tangents of the losses. Megatron's own schedule carries
both ways, and its backward pass leaves H v where it otherwise leaves the gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.autograd import forward_ad

from megatron_direct.curvature import tangents
from megatron_direct.curvature.kept import KeptProducts
from megatron_direct.curvature.requirements import require_exact_products
from megatron_direct.curvature.vectors import ParameterSpace
from megatron_direct.data.samples import MicroBatch, MicroBatchLimits, Samples
from megatron_direct.errors import UserError
from megatron_direct.mcore import grid, passes


class DualChunk(torch.nn.Module):
    """A model chunk that computes with dual parameters, in the place of a chunk in a pass.

    begin: called before each forward pass.
    with_tangents: whether the tangents are part of the graph (see ``tangents``).
    """

    def __init__(self, chunk: Any, tangent_of: dict[str, torch.Tensor],
                 begin: Callable[[], None], with_tangents: bool):
        super().__init__()
        self.module = chunk  # where Megatron looks for what a wrapper lacks
        self.config = chunk.config
        self._tangent_of = tangent_of
        self._begin = begin
        self._with_tangents = with_tangents
        self._input = None

    def set_input_tensor(self, input_tensor) -> None:
        """The activation of the stage before: a list of one [2s, b, h], or of None."""
        self._input = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(self, tokens, position_ids, attention_mask, labels):
        """[b, s] tangents of the token losses on the last stage, else [2s, b, h]."""
        self._begin()
        with forward_ad.dual_level():
            self.module.set_input_tensor(self._dual_input())
            parameters = {
                name: forward_ad.make_dual(parameter, self._tangent_of[name])
                for name, parameter in self.module.named_parameters()}
            output = torch.func.functional_call(
                self.module, parameters, (tokens, position_ids, attention_mask),
                {"labels": labels})
            self.module.set_input_tensor(None)
            if self.module.post_process:
                return output
            value, tangent = forward_ad.unpack_dual(output)
            return torch.cat([value, tangent if self._with_tangents else tangent.detach()])

    def _dual_input(self):
        if self._input is None:
            return None
        value, tangent = self._input.chunk(2)
        self._input = None
        return forward_ad.make_dual(value, tangent if self._with_tangents else tangent.detach())


@dataclass
class _Place:
    """The pass, and the micro-batch in it, that the chunks are at."""

    number: int = 0
    micro_batch: int = 0

    def move_to(self, micro_batch: int) -> None:
        self.micro_batch = micro_batch


class DualOperator:
    """Products of a second derivative of the mean token loss of ``numbers`` of ``samples``.

    Base of the ``hessian`` and ``gauss-newton`` operators. Needs memory for the activations of the
    micro-batches in flight and one vector, however many samples there are. room: so many bytes more
    are spent on matrix products that are the same each time (see ``kept``).

    Raises UserError where there is no sample, and under settings that have no exact products.
    """

    with_tangents: bool

    def __init__(self, chunks: Sequence[torch.nn.Module], space: ParameterSpace, samples: Samples,
                 numbers: np.ndarray, micro_batch: MicroBatchLimits, room: int = 0):
        if len(numbers) == 0:
            raise UserError("the validation set holds no samples: curvature needs at least one. "
                            "Check --valid-data-path.")
        require_exact_products(chunks)
        self.space = space
        self.samples = np.asarray(numbers)
        self.num_tokens = int(samples.num_labels[self.samples].sum())
        self._chunks = chunks
        self.kept = KeptProducts(room)
        # Held: the tokens of the validation set are small beside one vector.
        self._passes = list(passes.of_samples(chunks, samples, self.samples, micro_batch))

    def matvec(self, vector: torch.Tensor) -> torch.Tensor:
        """The product with a flat local vector of ``space``, as another such.

        Raises UserError that names the sample if a loss is not finite.
        """
        product = torch.zeros_like(vector)
        parameters = [shard.parameter for shard in self.space.shards]
        tangent_of = dict(zip(map(id, parameters), self.space.split(vector), strict=True))
        # A space of some parameters only: the others are held where they are.
        place = _Place()
        duals = [DualChunk(chunk, {name: tangent_of.get(id(parameter), torch.zeros_like(parameter))
                                   for name, parameter in chunk.named_parameters()},
                           functools.partial(self._begin, place, number), self.with_tangents)
                 for number, chunk in enumerate(self._chunks)]
        slopes: list[torch.Tensor] = []
        try:
            # The backward pass adds to gradients that are there: to views of the product.
            for parameter, part in zip(parameters, self.space.split(product), strict=True):
                parameter.grad = part
            with tangents.tangent_rules(self._chunks, self.kept,
                                        with_tangents=self.with_tangents):
                for place.number, micro_batches in enumerate(self._passes):
                    slopes.append(passes.run_pass(
                        duals, micro_batches, backward=True, stacked=2,
                        before_forward=place.move_to,
                        weights=[self._weights(batch, vector) for batch in micro_batches]))
        finally:
            for chunk in self._chunks:
                chunk.zero_grad()
        self._require_finite(slopes)
        self.space.add_partial_sums(product)
        return grid.sum_over_data(product)

    def _begin(self, place: _Place, chunk: int) -> None:
        self.kept.begin((place.number, place.micro_batch, chunk))

    def _weights(self, batch: MicroBatch, vector: torch.Tensor) -> torch.Tensor:
        """[b] share of each sample in all label tokens; 0 for padding rows."""
        return batch.loss_mask.sum(1).to(vector.dtype) / self.num_tokens

    def _require_finite(self, slopes: Sequence[torch.Tensor]) -> None:
        for micro_batches, values in zip(self._passes, slopes, strict=True):
            bad = passes.not_finite(values, micro_batches)
            if len(bad):
                raise UserError(
                    f"the loss of validation sample {bad[0]}, or its derivative, "
                    "is not finite. Remove the sample from the validation set, or check the "
                    "checkpoint.")
