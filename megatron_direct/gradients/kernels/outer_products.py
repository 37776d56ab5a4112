"""Sketches of a linear layer's gradients, G = sum_t delta_t a_t^T, computed in one of two ways.

With CS1 and CS2 the count sketches R^o -> R^k and R^i -> R^k by row and column hashes, the sketch
of delta a^T is the circular convolution of CS1 delta and CS2 a, so that both ways give one result:

- *weight gradient*: form G (o x i) of each sample, and add its entries up by coordinate;
- *spectrum*: never form G; sum_t FFT(CS1 delta_t) * FFT(CS2 a_t), to be transformed back once a
  sample, after the sum over all layers (Pham and Pagh, KDD 2013).

The first costs t o i multiply-adds and o i additions in scattered places, the second t transforms
of either factor: it wins for wide layers and short samples. Shapes: t tokens of a sample, n
samples, i and o the layer's local inputs and outputs, k the sketch's size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from megatron_direct.gradients.pieces import OuterProducts, RoutedOuterProducts
    from megatron_direct.gradients.sketch import Hashes

# Time of one step of each kind over that of one multiply-add of the weight gradient, in float32 on
# a CPU (`make bench-sketch` measures them, and what the choice by them loses against the better).
SCATTERED_ENTRY = 50  # of G into its coordinate
TRANSFORM = 14  # of both factors of a token, for each of k log2 k
SPECTRUM_PRODUCT = 15  # for each of k
SCATTERED_FACTOR = 75  # entry of a factor into its bucket


def prefers_spectrum(tokens: int, outputs: int, inputs: int, size: int) -> bool:
    """Which way the cost model takes for one sample of so many tokens."""
    weight_gradient = outputs * inputs * (tokens + SCATTERED_ENTRY)
    spectrum = tokens * (size * (TRANSFORM * math.log2(size) + SPECTRUM_PRODUCT)
                         + SCATTERED_FACTOR * (outputs + inputs))
    return spectrum < weight_gradient


def add_sketches(entries: torch.Tensor, spectra: torch.Tensor,
                 piece: OuterProducts | RoutedOuterProducts, hashes: Hashes,
                 scale: torch.Tensor | None) -> None:
    """Adds the sketch of each sample's gradient to its row of ``entries`` or of ``spectra``.

    entries: [n, 2 k], at coordinates before the mod k; spectra: [n, k // 2 + 1] complex.
    scale: [o, i] factors of G's entries; they can be applied to G alone.
    """
    outputs, inputs = len(hashes.row_buckets), len(hashes.column_buckets)
    tokens = piece.output_grads.shape[0]
    if scale is None and prefers_spectrum(tokens, outputs, inputs, hashes.size):
        add_spectra(spectra, piece, hashes)
    else:
        add_entries(entries, piece, hashes, scale)


def add_entries(entries: torch.Tensor, piece: OuterProducts | RoutedOuterProducts, hashes: Hashes,
                scale: torch.Tensor | None = None) -> None:
    """By way of the weight gradient."""
    coordinates = hashes.coordinates().flatten()
    for sample, inputs, grads in _by_sample(piece, hashes):
        gradient = grads.t() @ inputs
        if scale is not None:
            gradient *= scale
        entries[sample].scatter_add_(0, coordinates, gradient.flatten())


def add_spectra(spectra: torch.Tensor, piece: OuterProducts | RoutedOuterProducts, hashes: Hashes,
                ) -> None:
    """By way of the factors' transforms."""
    for sample, inputs, grads in _by_sample(piece, hashes):
        of_grads = torch.fft.rfft(_count_sketch(grads, hashes.row_buckets, hashes.size))
        of_inputs = torch.fft.rfft(_count_sketch(inputs, hashes.column_buckets, hashes.size))
        spectra[sample] += (of_grads * of_inputs).sum(0)


def _by_sample(piece: OuterProducts | RoutedOuterProducts, hashes: Hashes,
               ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(sample, inputs [t, i], output gradients [t, o]), in float32 and times their signs.

    One sample at a time: its factors stay in cache, and there are enough of them for a GPU.
    """
    for sample, inputs, grads in piece.by_sample():
        yield (sample, inputs.float() * hashes.column_signs, grads.float() * hashes.row_signs)


def _count_sketch(factors: torch.Tensor, buckets: torch.Tensor, size: int) -> torch.Tensor:
    """[t, size] the sum of the entries of each bucket, of factors [t, width]."""
    sums = factors.new_zeros(len(factors), size)
    return sums.scatter_add_(1, buckets.expand_as(factors), factors)
