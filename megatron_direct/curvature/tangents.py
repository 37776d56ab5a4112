"""What a function does to a value and its tangent, where forward-mode differentiation fails.

In a dual level of ``torch.autograd.forward_ad`` a tensor carries its tangent with it, and most of
what a GPTModel calls takes both along by itself. Replaced, for as long as :func:`tangent_rules` is
entered (where, is :mod:`megatron_direct.mcore.dual_functions`'s business), is what would raise or
be silently wrong:

- tensor-parallel collectives. They are linear and their first gradients are right, so each is
  applied once to value and tangent, side by side: no further messages, no second derivative;
- tensor-parallel linear layers and the vocabulary-parallel cross entropy, whose backward passes
  are written for first gradients only;
- attention and ``layer_norm``: torch 2.13 has no derivative of the tangent of ``softmax`` and
  ``layer_norm`` (of the second without saying so);
- ``MakeViewlessTensor``, which has no tangent and nothing to do here;
- for speed alone: ``rms_norm``, rotary embeddings, SiLU and GELU.

The loss comes out as its *tangent* l' = <dl/dtheta, v>, whose gradient is the Hessian-vector
product. With ``with_tangents`` False the tangents are cut out of the graph: l' is then
differentiated with respect to the logits alone, and the gradient is J^T H_loss J v (J: the
derivative of the logits), which is the Gauss-Newton product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch.autograd import forward_ad

from megatron_direct.curvature import pairs
from megatron_direct.curvature.kept import KeptProducts
from megatron_direct.curvature.pairs import (
    ActivationPair,
    AttentionPair,
    CrossEntropyTangent,
    LinearPair,
    NormPair,
)
from megatron_direct.mcore import dual_functions
from megatron_direct.mcore.model import fused_gelu

_ACTIVATIONS = {torch.nn.functional.silu: pairs.silu, torch.nn.functional.gelu: pairs.gelu,
                fused_gelu: pairs.tanh_gelu}


def tangent_rules(chunks: Sequence[torch.nn.Module], kept: KeptProducts, *, with_tangents: bool,
                  ) -> AbstractContextManager:
    """The replacements are in place inside, and the originals afterwards, whatever happens."""
    return dual_functions.replaced(chunks, Tangents(kept, with_tangents))


class Tangents:
    """The rules of :class:`megatron_direct.mcore.dual_functions.DualRules`."""

    def __init__(self, kept: KeptProducts, with_tangents: bool):
        self.kept, self.with_tangents = kept, with_tangents

    def pair(self, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Value and tangent of a dual tensor."""
        value, tangent = forward_ad.unpack_dual(tensor)
        if tangent is None:
            tangent = torch.zeros_like(value)
        return value, tangent if self.with_tangents else tangent.detach()

    def linear_map(self, function: Callable, dim: int) -> Callable:
        def apply(tensor, *options, **keywords):
            both = function(torch.cat(self.pair(tensor), dim), *options, **keywords)
            return forward_ad.make_dual(*both.chunk(2, dim))

        return apply

    def activation(self, function: Callable) -> Callable | None:
        derivatives = _ACTIVATIONS.get(function)
        if derivatives is None:  # torch has exact, if slower, tangents of any other
            return None
        return lambda tensor: forward_ad.make_dual(*ActivationPair.apply(
            *self.pair(tensor), derivatives, self.with_tangents))

    def linear(self, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return forward_ad.make_dual(*LinearPair.apply(
            *self.pair(inputs), *self.pair(weight), self.kept.slot(), self.with_tangents))

    def attention(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                  ) -> torch.Tensor:
        arguments = [half for tensor in (query, key, value)
                     for half in self.pair(tensor.transpose(0, 1))]
        output = forward_ad.make_dual(*AttentionPair.apply(*arguments, self.with_tangents))
        return output.transpose(0, 1)

    def layer_norm(self, inputs, normalized_shape, weight=None, bias=None, eps=1e-5):
        return self._norm(inputs, normalized_shape, weight, bias, eps, centred=True)

    def rms_norm(self, inputs, normalized_shape, weight=None, eps=None):
        eps = torch.finfo(inputs.dtype).eps if eps is None else eps
        return self._norm(inputs, normalized_shape, weight, None, eps, centred=False)

    def _norm(self, inputs, normalized_shape, weight, bias, eps, *, centred):
        assert len(normalized_shape) == 1 and weight is not None
        return forward_ad.make_dual(*NormPair.apply(
            *self.pair(inputs), *self.pair(weight),
            *((None, None) if bias is None else self.pair(bias)),
            eps, centred, self.with_tangents))

    def cross_entropy(self, logits: torch.Tensor, labels: torch.Tensor, over_ranks: Callable,
                      ) -> torch.Tensor:
        logits, dlogits = self.pair(logits)
        held = (labels >= 0) & (labels < logits.shape[-1])
        with torch.no_grad():
            p = logits - over_ranks(logits.amax(-1, keepdim=True), torch.distributed.ReduceOp.MAX)
            p.exp_()
            p /= over_ranks(p.sum(-1, keepdim=True))
        return CrossEntropyTangent.apply(logits, dlogits, p, labels, held, over_ranks)
