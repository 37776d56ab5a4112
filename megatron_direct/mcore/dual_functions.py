"""Megatron's functions on the way from parameters to losses, replaced by ones that take duals.

Exact curvature products (:mod:`megatron_direct.curvature.tangents`) differentiate a forward pass
along a direction. Which of Megatron's and torch's functions have to be replaced for that, where
they are looked up, and what their arguments are called, is said here; what the replacement does to
a value and its tangent is said by :class:`DualRules`.

Replacements are made by name and by the names of arguments. A function of another version whose
arguments are not those known here is refused: a wrong guess would be a wrong product, silently.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from megatron_direct.errors import UserError

# (owner, attribute, what stands there while products are taken)
Replacement = tuple[Any, str, Any]

SEQUENCE, BATCH = 0, 1  # dimensions of an activation [s, b, h]

# Arguments of the functions replaced, over all versions of megatron-core that are supported; the
# first so many are those without which it would be another function.
_LINEAR = ("input", "weight", "bias", "gradient_accumulation_fusion", "allreduce_dgrad",
           "sequence_parallel", "grad_output_buffer", "wgrad_deferral_limit", "tp_group")
_CROSS_ENTROPY = ("vocab_parallel_logits", "target", "label_smoothing")
_ATTENTION = ("query", "key", "value", "attention_mask", "attn_mask_type", "attention_bias",
              "packed_seq_params")


class DualRules(Protocol):
    """What becomes of value and tangent; every tensor given and returned may be a dual one."""

    def linear_map(self, function: Callable, dim: int) -> Callable:
        """A function that is linear in its first argument; value and tangent go through it side
        by side along ``dim``."""

    def linear(self, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x W^T of [..., i] and [o, i]."""

    def attention(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                  ) -> torch.Tensor:
        """Causal softmax(q k^T) v of [s, n, c], [s, n, c] and [s, n, d], n heads of all samples."""

    def cross_entropy(self, logits: torch.Tensor, labels: torch.Tensor,
                      over_ranks: Callable) -> torch.Tensor:
        """[s, b] tangents of losses of logits [s, b, v], v this rank's part of the vocabulary;
        labels count from its first entry; over_ranks(tensor, operator) reduces over all parts."""

    def layer_norm(self, inputs, normalized_shape, weight=None, bias=None, eps=1e-5):
        """As torch.nn.functional.layer_norm."""

    def rms_norm(self, inputs, normalized_shape, weight=None, eps=None):
        """As torch.nn.functional.rms_norm."""

    def activation(self, function: Callable) -> Callable | None:
        """In the place of an activation function; None if torch's own tangent serves."""


@contextlib.contextmanager
def replaced(chunks: Sequence[torch.nn.Module], rules: DualRules):
    """The replacements are in place inside, and the originals afterwards, whatever happens."""
    replacements = list(_replacements(chunks, rules))
    originals = [getattr(owner, name) for owner, name, _ in replacements]
    try:
        for owner, name, replacement in replacements:
            setattr(owner, name, replacement)
        yield
    finally:
        for (owner, name, _), original in zip(replacements, originals, strict=True):
            setattr(owner, name, original)


def _replacements(chunks: Sequence[torch.nn.Module], rules: DualRules) -> Iterator[Replacement]:
    """Megatron's functions look these names up when they are called."""
    from megatron.core import utils
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.tensor_parallel import cross_entropy, layers, mappings
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.mlp import MLP

    for name, dim in (
        ("_CopyToModelParallelRegion", SEQUENCE),
        ("_ReduceFromModelParallelRegion", SEQUENCE),
        ("_ScatterToSequenceParallelRegion", BATCH),
        ("_GatherFromModelParallelRegion", SEQUENCE),
        ("_GatherFromSequenceParallelRegion", BATCH),
        ("_ReduceScatterToSequenceParallelRegion", BATCH),
    ):
        collective = getattr(mappings, name)
        yield mappings, name, _Applied(_collective(rules, collective.apply, dim))
    linear = layers.LinearWithGradAccumulationAndAsyncCommunication
    yield layers, linear.__name__, _Applied(_by_name(linear.forward, _LINEAR, _linear(rules)))
    entropy = cross_entropy._VocabParallelCrossEntropy
    yield cross_entropy, entropy.__name__, _Applied(
        _by_name(entropy.forward, _CROSS_ENTROPY, _cross_entropy(rules)))
    yield utils, "MakeViewlessTensor", _Applied(lambda tensor, _requires_grad: tensor)
    yield DotProductAttention, "forward", _attention(rules, DotProductAttention.forward)
    yield torch.nn.functional, "layer_norm", rules.layer_norm
    yield torch.nn.functional, "rms_norm", rules.rms_norm
    rotate = rope_utils._apply_rotary_pos_emb_bshd
    yield rope_utils, rotate.__name__, rules.linear_map(rotate, BATCH)
    for chunk in chunks:
        for owner in (chunk.config, *(m for m in chunk.modules() if isinstance(m, MLP))):
            activation = rules.activation(owner.activation_func)
            if activation is not None:
                yield owner, "activation_func", activation


class _Applied:
    """Stands where an autograd function stood: something to call ``apply`` of."""

    def __init__(self, function):
        self.apply = function


def _by_name(original: Callable, known: Sequence[str], replacement: Callable) -> Callable:
    """``replacement(arguments)``, a dictionary by the original's own names of its arguments.

    Raises UserError, with the function's name, for an original that lacks a known argument. What a
    later version adds behind them has to be left at nothing: None, 1 or False.
    """
    parameters = list(inspect.signature(original).parameters)[1:]  # without ctx, or self
    missing = [name for name in known if name not in parameters]
    where = f"{original.__module__}.{original.__qualname__}"
    if missing:
        raise UserError(f"exact curvature products do not support {where}({', '.join(parameters)}) "
                        f"of this megatron-core: it takes no {', '.join(missing)}. Use --curvature "
                        "fisher, or a megatron-core that docs/models.md lists.")

    def call(*values, **keywords):
        arguments = {**dict(zip(parameters, values, strict=False)), **keywords}
        for name in arguments.keys() - set(known):
            value = arguments[name]
            if value not in (None, False, 1) and not hasattr(value, "size"):
                raise UserError(f"exact curvature products do not support {name}={value!r} in "
                                f"{where}. Use --curvature fisher.")
        return replacement(arguments)

    return call


def _collective(rules: DualRules, function: Callable, dim: int) -> Callable:
    """A linear map over a group of ranks; nothing to do in a group of one."""
    apply = rules.linear_map(function, dim)
    return lambda tensor, group, *options: (
        tensor if group.size() == 1 else apply(tensor, group, *options))


def _linear(rules: DualRules) -> Callable:
    def linear(arguments):
        from megatron.core.tensor_parallel import mappings

        inputs, group = arguments["input"], arguments["tp_group"]
        if arguments["sequence_parallel"]:
            inputs = mappings.gather_from_sequence_parallel_region(inputs, group=group)
        elif arguments["allreduce_dgrad"]:
            inputs = mappings.copy_to_tensor_model_parallel_region(inputs, group=group)
        output = rules.linear(inputs, arguments["weight"])
        return output if arguments["bias"] is None else output + arguments["bias"]

    return linear


def _cross_entropy(rules: DualRules) -> Callable:
    def cross_entropy(arguments):
        from megatron.core import parallel_state

        assert not arguments.get("label_smoothing")
        group = (arguments.get("tp_group")  # of 0.19; None is the same group
                 or parallel_state.get_tensor_model_parallel_group())
        logits = arguments["vocab_parallel_logits"]

        def over_ranks(tensor, operator=torch.distributed.ReduceOp.SUM):
            if group.size() > 1:
                torch.distributed.all_reduce(tensor, operator, group)
            return tensor

        return rules.cross_entropy(
            logits, arguments["target"] - group.rank() * logits.shape[-1], over_ranks)

    return cross_entropy


def _attention(rules: DualRules, original: Callable) -> Callable:
    def attention(module, arguments):
        """[s, b, heads * d] from queries [s, b, heads, c], keys [s, b, groups, c] and values
        [s, b, groups, d]."""
        for name in ("attention_mask", "attention_bias", "packed_seq_params"):
            assert arguments.get(name) is None
        query, key, value = (arguments[name] for name in ("query", "key", "value"))
        scale = module.softmax_scale * (module.scale_mask_softmax.scale or 1.0)
        length, size, heads, _ = query.shape
        repeats = heads // key.shape[2]
        if repeats > 1:
            key, value = (x.repeat_interleave(repeats, dim=2) for x in (key, value))
        output = rules.attention(*(tensor.reshape(length, size * heads, -1)
                                   for tensor in (query * scale, key, value)))
        return output.reshape(length, size, -1)

    by_name = _by_name(original, _ATTENTION, lambda arguments: arguments)
    return lambda module, *values, **keywords: attention(module, by_name(*values, **keywords))
