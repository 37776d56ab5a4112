"""What the hooks note of linear layers, embeddings and norms (see ``hooks``).

Under sequence parallelism a linear layer's input, or the gradient of its output, is spread over the
tensor-parallel ranks by position. It is gathered here as Megatron gathers it in its own backward
pass. A norm's gradient stays a partial sum, since every sum over the model's ranks adds it up.
"""

from __future__ import annotations

import torch

from megatron_direct.gradients.pieces import Entries, OuterProducts, RowSums
from megatron_direct.mcore import grid
from megatron_direct.runtime import gpu_kernels


def column_parallel(layer, arguments, keywords, _output):
    """Input whole (gathered, if spread by position), output a slice of the columns."""
    inputs = arguments[0].detach()
    weight = arguments[1] if len(arguments) > 1 else keywords.get("weight")
    weight = layer.weight if weight is None else weight

    def pieces(output_grads):
        whole = grid.gather_over_tensor_ranks(inputs, 0) if layer.sequence_parallel else inputs
        yield weight, OuterProducts(whole, output_grads)
        if has_bias(layer):
            yield layer.bias, Entries(summed(output_grads, 0))

    return pieces


def row_parallel(layer, arguments, _keywords, _output):
    """Input a slice of the columns, output whole (or spread by position)."""
    inputs = arguments[0].detach()

    def pieces(output_grads):
        if has_bias(layer):
            # Added after the sum over ranks: spread by position it is a partial sum, and marked so.
            yield layer.bias, Entries(summed(output_grads, 0))
        if layer.sequence_parallel:
            output_grads = grid.gather_over_tensor_ranks(output_grads, 0)
        yield layer.weight, OuterProducts(inputs, output_grads)

    return pieces


def has_bias(layer) -> bool:
    """Transformer Engine has an empty one in the place of none."""
    return layer.bias is not None and layer.bias.numel() > 0


def vocab_parallel_embedding(layer, arguments, _keywords, _output):
    tokens = arguments[0]  # [b, s]

    def pieces(output_grads):
        if layer.reduce_scatter_embeddings:  # [s / tp, b, h]
            output_grads = grid.gather_over_tensor_ranks(output_grads, 0)
        else:  # [b, s, h]
            output_grads = output_grads.transpose(0, 1)
        rows = tokens.t() - layer.vocab_start_index
        held = (rows >= 0) & (rows < layer.num_embeddings_per_partition)
        yield layer.weight, RowSums(rows * held, held, output_grads, layer.weight.shape[0])

    return pieces


def embedding(layer, arguments, _keywords, _output):
    """An embedding held whole by every tensor-parallel rank (learned positions): [b, s] in."""
    rows = arguments[0].t()

    def pieces(output_grads):
        held = torch.ones_like(rows, dtype=torch.bool)
        yield layer.weight, RowSums(rows, held, output_grads.transpose(0, 1), layer.weight.shape[0])

    return pieces


def norm(centred: bool, layer, arguments, _keywords, _output):
    """y = x_hat * weight (+ bias), x_hat the normalised input; [s, b, h] or [s, b, heads, h].

    centred: whether the mean is taken off, and there is a bias (LayerNorm).
    """
    inputs = arguments[0].detach()

    def pieces(output_grads):
        of_weight, of_bias = _norm_grads(inputs, output_grads, layer.eps, centred)
        yield layer.weight, Entries(of_weight)
        if of_bias is not None:
            yield layer.bias, Entries(of_bias)

    return pieces


def _norm_grads(inputs: torch.Tensor, output_grads: torch.Tensor, eps: float | None, centred: bool,
                ) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[b, h] gradients of a norm's weight, and of its bias if there is one."""
    eps = torch.finfo(inputs.dtype).eps if eps is None else eps
    if gpu_kernels.apply_to(inputs) and gpu_kernels.apply_to(output_grads):
        from megatron_direct.gradients import norm_kernel

        if inputs.shape[-1] <= norm_kernel.WIDEST:
            return norm_kernel.sums_over_tokens(inputs, output_grads, eps, centred)
    inputs, scale = _scaling(inputs, eps, centred)
    # sum of scale * x * dy as a product of matrices, so that x * dy is the only array as large as x
    products, scale = (_by_sample(values) for values in (output_grads * inputs, scale))
    of_weight = torch.bmm(scale.mT, products)[:, 0]
    return of_weight, over_tokens(output_grads) if centred else None


def normalised(inputs: torch.Tensor, eps: float | None, centred: bool) -> torch.Tensor:
    """Inputs over the root of their mean square in the last dimension, less their mean if asked.

    In float32 at least, as norms compute them; eps None means that of the inputs' own dtype.
    """
    inputs, scale = _scaling(inputs, eps, centred)
    return inputs * scale


def _scaling(inputs: torch.Tensor, eps: float | None, centred: bool,
             ) -> tuple[torch.Tensor, torch.Tensor]:
    """(inputs, centred if asked, [..., 1] factors that normalise them)."""
    eps = torch.finfo(inputs.dtype).eps if eps is None else eps
    inputs = inputs.to(_at_least_float32(inputs))
    if centred:
        inputs = inputs - inputs.mean(-1, keepdim=True)
    root = torch.linalg.vector_norm(inputs, dim=-1, keepdim=True)
    return inputs, torch.rsqrt(root.square_().div_(inputs.shape[-1]).add_(eps))


def over_tokens(values: torch.Tensor) -> torch.Tensor:
    """[b, h] sums of [s, b, ..., h] over everything but samples and width."""
    return summed(_by_sample(values), 1)


def _by_sample(values: torch.Tensor) -> torch.Tensor:
    """[b, s * ..., h] values of [s, b, ..., h]."""
    return values.transpose(0, 1).flatten(1, -2)


def summed(values: torch.Tensor, axis: int) -> torch.Tensor:
    """Sums along an axis, in float32 at least."""
    return values.sum(axis, dtype=_at_least_float32(values))


def _at_least_float32(values: torch.Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)
