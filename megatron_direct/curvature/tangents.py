"""Megatron's and torch's functions, replaced where forward-mode differentiation needs it.

In a dual level of ``torch.autograd.forward_ad`` a tensor carries its tangent with it, and most of
what a GPTModel calls takes both along by itself. Replaced here, for as long as :func:`replaced` is
entered, is what would raise or be silently wrong:

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

import contextlib
from collections.abc import Sequence

import torch
from torch.autograd import forward_ad

from megatron_direct.curvature import pairs
from megatron_direct.curvature.pairs import (
    ActivationPair,
    AttentionPair,
    CrossEntropyTangent,
    LinearPair,
    NormPair,
)


@contextlib.contextmanager
def replaced(chunks: Sequence[torch.nn.Module], *, with_tangents: bool):
    """The replacements are in place inside, and the originals afterwards, whatever happens."""
    replacements = list(_replacements(chunks, _Rules(with_tangents)))
    originals = [getattr(owner, name) for owner, name, _ in replacements]
    try:
        for owner, name, replacement in replacements:
            setattr(owner, name, replacement)
        yield
    finally:
        for (owner, name, _), original in zip(replacements, originals, strict=True):
            setattr(owner, name, original)


def _replacements(chunks: Sequence[torch.nn.Module], rules: _Rules):
    """(owner, attribute, replacement). Megatron's functions look these names up when called."""
    from megatron.core import utils
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.tensor_parallel import cross_entropy, layers, mappings
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.mlp import MLP

    first_dim, batch_dim = 0, 1
    for name, dim in (
        ("_CopyToModelParallelRegion", first_dim),
        ("_ReduceFromModelParallelRegion", first_dim),
        ("_ScatterToSequenceParallelRegion", batch_dim),
        ("_GatherFromModelParallelRegion", first_dim),
        ("_GatherFromSequenceParallelRegion", batch_dim),
        ("_ReduceScatterToSequenceParallelRegion", batch_dim),
    ):
        collective = getattr(mappings, name)
        yield mappings, name, _Applied(rules.collective(collective.apply, dim))
    yield layers, "LinearWithGradAccumulationAndAsyncCommunication", _Applied(rules.linear)
    yield cross_entropy, "_VocabParallelCrossEntropy", _Applied(rules.cross_entropy)
    yield utils, "MakeViewlessTensor", _Applied(lambda tensor, _requires_grad: tensor)
    yield DotProductAttention, "forward", lambda *args, **kw: rules.attention(*args, **kw)
    yield torch.nn.functional, "layer_norm", rules.layer_norm
    yield torch.nn.functional, "rms_norm", rules.rms_norm
    rotate = rope_utils._apply_rotary_pos_emb_bshd
    yield rope_utils, "_apply_rotary_pos_emb_bshd", rules.linear_map(rotate, batch_dim)
    for chunk in chunks:
        for owner in (chunk.config, *(m for m in chunk.modules() if isinstance(m, MLP))):
            derivatives = _ACTIVATIONS.get(owner.activation_func)
            if derivatives is not None:  # torch has exact, if slower, tangents of any other
                yield owner, "activation_func", rules.activation(derivatives)


_ACTIVATIONS = {torch.nn.functional.silu: pairs.silu, torch.nn.functional.gelu: pairs.gelu}


class _Applied:
    """Stands where an autograd function stood: something to call ``apply`` of."""

    def __init__(self, function):
        self.apply = function


class _Rules:
    """What a function does to a dual tensor; signatures are those of the functions replaced."""

    def __init__(self, with_tangents: bool):
        self.with_tangents = with_tangents

    def pair(self, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Value and tangent of a dual tensor."""
        value, tangent = forward_ad.unpack_dual(tensor)
        if tangent is None:
            tangent = torch.zeros_like(value)
        return value, tangent if self.with_tangents else tangent.detach()

    def linear_map(self, function, dim: int):
        """A function that is linear in its first argument, applied once to both, side by side."""

        def apply(tensor, *options, **keywords):
            both = function(torch.cat(self.pair(tensor), dim), *options, **keywords)
            return forward_ad.make_dual(*both.chunk(2, dim))

        return apply

    def collective(self, function, dim: int):
        """A linear map over a group of ranks; nothing to do in a group of one."""
        apply = self.linear_map(function, dim)
        return lambda tensor, group, *options: (
            tensor if group.size() == 1 else apply(tensor, group, *options))

    def activation(self, derivatives):
        def apply(tensor):
            return forward_ad.make_dual(*ActivationPair.apply(
                *self.pair(tensor), derivatives, self.with_tangents))

        return apply

    def linear(self, inputs, weight, bias, _gradient_accumulation_fusion, allreduce_dgrad,
               sequence_parallel, _grad_output_buffer, _wgrad_deferral_limit, tp_group):
        from megatron.core.tensor_parallel import mappings

        if sequence_parallel:
            inputs = mappings.gather_from_sequence_parallel_region(inputs, group=tp_group)
        elif allreduce_dgrad:
            inputs = mappings.copy_to_tensor_model_parallel_region(inputs, group=tp_group)
        output = forward_ad.make_dual(*LinearPair.apply(
            *self.pair(inputs), *self.pair(weight), self.with_tangents))
        return output if bias is None else output + bias

    def attention(self, module, query, key, value, attention_mask, attn_mask_type=None,
                  attention_bias=None, packed_seq_params=None):
        """[s, b, heads * d] from queries [s, b, heads, c], keys [s, b, groups, c] and values
        [s, b, groups, d]."""
        assert attention_mask is None and attention_bias is None and packed_seq_params is None
        scale = module.softmax_scale * (module.scale_mask_softmax.scale or 1.0)
        length, size, heads, _ = query.shape
        repeats = heads // key.shape[2]
        if repeats > 1:
            key, value = (x.repeat_interleave(repeats, dim=2) for x in (key, value))
        arguments = [half for tensor in (query * scale, key, value) for half in self.pair(
            tensor.reshape(length, size * heads, -1).transpose(0, 1))]
        output = forward_ad.make_dual(*AttentionPair.apply(*arguments, self.with_tangents))
        return output.transpose(0, 1).reshape(length, size, -1)

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

    def cross_entropy(self, logits, labels, label_smoothing=0.0):
        """[s, b] tangents of the losses, from dual logits [s, b, v]."""
        from megatron.core import parallel_state

        assert label_smoothing == 0.0
        group = parallel_state.get_tensor_model_parallel_group()
        operators = torch.distributed.ReduceOp

        def over_ranks(tensor, operator=operators.SUM):
            if group.size() > 1:
                torch.distributed.all_reduce(tensor, operator, group)
            return tensor

        logits, dlogits = self.pair(logits)
        labels = labels - group.rank() * logits.shape[-1]
        held = (labels >= 0) & (labels < logits.shape[-1])
        with torch.no_grad():
            p = logits - over_ranks(logits.amax(-1, keepdim=True), operators.MAX)
            p.exp_()
            p /= over_ranks(p.sum(-1, keepdim=True))
        return CrossEntropyTangent.apply(logits, dlogits, p, labels, held, over_ranks)
