"""Sketches by way of Fourier transforms: sum_t FFT(C1 x_t) * FFT(C2 y_t), never forming G.

The convolution of two count sketches is a product of their spectra (Pham and Pagh, KDD 2013). The
products are summed over tokens and over all layers, and transformed back once per sample. It costs
two transforms of length k per token, whatever the width of the matrix. It wins on a CPU, for wide
ones whose axes both have k buckets, as the vocabulary's have.
"""

from __future__ import annotations

import math

import torch
from torch.fft import irfft, rfft

from megatron_direct.gradients.hashes import Hashes, parts_of
from megatron_direct.gradients.kernels.costs import Coefficients
from megatron_direct.gradients.kernels.factors import count_sketched
from megatron_direct.gradients.kernels.kernel import Kernel, Work
from megatron_direct.gradients.kernels.segments import Segments
from megatron_direct.gradients.pieces import Entries, Piece, RoutedOuterProducts

_CALLS = 8  # operations on tensors, about


class BySpectra(Kernel):
    name = "spectra"

    def __init__(self, num_samples: int, size: int, device: torch.device):
        self._size = size
        self._spectra = torch.zeros(num_samples, size // 2 + 1, dtype=torch.complex64,
                                    device=device)

    @staticmethod
    def takes(piece: Piece, hashes: Hashes, device_type: str) -> bool:
        return not isinstance(piece, Entries) and hashes.narrowed is None

    @staticmethod
    def cost(work: Work, costs: Coefficients) -> float:
        return _CALLS * costs.call + work.samples * work.tokens * (
            work.gathered * costs.gathered
            + work.size * math.log2(work.size) * costs.transform)

    def add(self, first: int, piece: Piece, hashes: Hashes,
            scale: torch.Tensor | None = None) -> None:
        assert scale is None, "factors cannot be scaled entry by entry"
        spectra = self._spectra[first: first + piece.num_samples]
        if isinstance(piece, RoutedOuterProducts):
            self._add_routed(spectra, piece, hashes)
            return
        assert not isinstance(piece, Entries), "refused by takes()"
        num_tokens, num_samples = piece.output_grads.shape[:2]
        # Of both factors; at least one, for a piece of no tokens.
        at_once = max(1, min(num_tokens, parts_of(spectra, 2 * num_samples * self._size)))
        factors = spectra.real.new_empty(2, at_once, num_samples, self._size)
        for token in range(0, num_tokens, at_once):
            part = piece.part(slice(token, token + at_once))
            places = factors[:, :len(part.output_grads)]
            count_sketched(part, hashes, *places)
            left, right = rfft(places)
            spectra += left.mul_(right).sum(0)

    def _add_routed(self, spectra: torch.Tensor, piece: RoutedOuterProducts, hashes: Hashes,
                    ) -> None:
        segments = Segments.of(piece.samples, piece.num_samples)
        first = 0
        for tokens in segments.order.split(parts_of(spectra, self._size)):
            left = hashes.rows.count_sketch(piece.output_grads[tokens].float())
            right = hashes.columns.count_sketch(piece.inputs[tokens].float())
            products = torch.view_as_real(rfft(left) * rfft(right))
            spectra += torch.view_as_complex(segments.sums(products, first))
            first += len(tokens)

    def total(self) -> torch.Tensor:
        return irfft(self._spectra, n=self._size)
