"""What the hooks note of a Mamba layer between its linear layers (see ``hooks``).

Its convolution, its scan and its norm have few parameters, and gradients that are products of
nothing. Each sample's are found by computing the layer's middle once more, every sample with a copy
of the parameters of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_direct.gradients.pieces import Entries, OuterProducts
from megatron_direct.mcore.specs.mamba import MixerParameters, mixed


def watched(mixer: Any) -> Iterator[tuple[torch.nn.Module, Callable]]:
    """(layer, watch) of the mixer's middle, and of the layers that hold its parameters."""
    yield mixer.between, _between
    for layer in (mixer, mixer.conv1d, mixer.norm):
        yield layer, _elsewhere


def _between(layer, arguments, _keywords, _output):
    projected, parameters = arguments[0].detach(), arguments[1]

    def pieces(output_grads):
        size = projected.shape[1]
        copies = MixerParameters(**{name: _copies(parameter, size)
                                    for name, parameter in vars(parameters).items()})
        with torch.enable_grad():
            output = mixed(projected, copies, layer.sizes)
            grads = torch.autograd.grad(output, list(vars(copies).values()), output_grads)
        for field, grad in zip(dataclasses.fields(parameters), grads, strict=True):
            parameter = getattr(parameters, field.name)
            yield parameter, _of_taps(grad) if parameter.dim() > 1 else Entries(grad)

    return pieces


def _copies(parameter: torch.Tensor, count: int) -> torch.Tensor:
    """[count, ...] in float32 at least, in which the layer computes."""
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return parameter.detach().to(dtype).expand(count, *parameter.shape).clone().requires_grad_(True)


def _of_taps(grads: torch.Tensor) -> OuterProducts:
    """Gradients [b, channels, 1, taps] as matrices [channels, taps]: sums over taps."""
    size, _, _, taps = grads.shape
    inputs = torch.eye(taps, dtype=grads.dtype, device=grads.device)
    return OuterProducts(inputs[:, None].expand(taps, size, taps), grads.squeeze(2).movedim(-1, 0))


def _elsewhere(_layer, _arguments, _keywords, _output):
    """Of a layer whose parameters are used in the mixer's middle."""
    return lambda _output_grads: ()
