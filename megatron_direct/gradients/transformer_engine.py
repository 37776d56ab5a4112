"""What the hooks note of Transformer Engine's fused layers (see ``hooks``).

A fused norm-and-linear layer is given the raw activation; the linear part's true input is the
normalised one, which is computed here again.
"""

from __future__ import annotations

from megatron_direct.gradients import layers
from megatron_direct.gradients.pieces import Entries, OuterProducts
from megatron_direct.mcore import grid


def norm_and_column_parallel(layer, arguments, _keywords, _output):
    """y = z W^T (+ b) with z = x_hat g (+ c), x_hat the normalised input x.

    Each tensor-parallel rank has the gradient of z through its own columns. Under sequence
    parallelism that is a partial sum of the norm's gradient; else it is made whole here.
    """
    inputs = arguments[0].detach()
    centred = layer.normalization == "LayerNorm"

    def pieces(output_grads):
        x_hat = layers.normalised(inputs, layer.eps, centred)
        if layer.sequence_parallel:
            x_hat = grid.gather_over_tensor_ranks(x_hat, 0)
        z = x_hat * (layer.layer_norm_weight + (1 if layer.zero_centered_gamma else 0))
        z = z + layer.layer_norm_bias if centred else z
        yield layer.weight, OuterProducts(z.to(inputs.dtype), output_grads)
        if layers.has_bias(layer):
            yield layer.bias, Entries(layers.summed(output_grads, 0))
        z_grads = output_grads @ layer.weight
        if not layer.sequence_parallel:
            z_grads = grid.sum_over_tensor_ranks(z_grads)
        yield layer.layer_norm_weight, Entries(layers.over_tokens(z_grads * x_hat))
        if centred:
            yield layer.layer_norm_bias, Entries(layers.over_tokens(z_grads))

    return pieces
