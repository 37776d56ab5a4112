"""The hash sketch as a random projection: unbiased, linear, as good as a dense Gaussian."""

from __future__ import annotations

import numpy as np
import torch

from megatron_direct import hashing
from megatron_direct.gradients.pieces import Entries, OuterProducts, RowSums
from megatron_direct.gradients.sketch import Sketch
from megatron_direct.model import ParameterShard


def _shard(name, rows, columns):
    return ParameterShard(name, torch.nn.Parameter(torch.zeros(rows, columns)),
                          torch.arange(rows), torch.arange(columns), True, True)


def test_hashes_are_uniform_and_signs_independent_of_buckets():
    hashes = hashing.hash64(hashing.stream(1, "x"), torch.arange(200_000))
    counts = np.bincount(hashing.buckets(hashes, 100).numpy(), minlength=100)
    # A chi-squared variable with 99 degrees of freedom is beyond 160 with probability 1e-4.
    assert ((counts - 2000) ** 2 / 2000).sum() < 160
    signs = hashing.signs(hashes).numpy()
    # Means of 200,000 (and 2,000) signs: five standard errors.
    assert abs(signs.mean()) < 5 / np.sqrt(len(signs))
    by_bucket = np.bincount(hashing.buckets(hashes, 100).numpy(), weights=signs, minlength=100)
    assert np.abs(by_bucket).max() < 5 * np.sqrt(2000)


def test_known_values_of_the_mixer():
    """SplitMix64 with seed 0: the first outputs, published with the algorithm's reference code."""
    gamma = -7046029254386353131
    outputs = hashing.hash64(gamma, torch.arange(3)).numpy().astype(np.uint64)
    np.testing.assert_array_equal(outputs, np.array(
        [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F], dtype=np.uint64))


def test_inner_products_are_kept_as_a_gaussian_keeps_them():
    """Errors, normalised by the norms and times sqrt(k), against 1 for Gaussian entries' sketch.

    A dense Gaussian errs by sqrt((1 + cos^2) / k); the bar is 1.2 times that. Low-rank matrices,
    as gradients are: rank-one ones would be the worst case of a separable hash.
    """
    size, shard = 512, _shard("w", 96, 80)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(6, 40, 80, generator=generator)
    grads = torch.randn(6, 40, 96, generator=generator)
    piece = OuterProducts(inputs, grads)
    matrices = piece.matrices().flatten(1).double().numpy()
    norms = np.linalg.norm(matrices, axis=1)
    exact = matrices @ matrices.T / np.outer(norms, norms)
    errors, bound = [], []
    for seed in range(40):
        rows = Sketch([shard], size, seed).of_piece(shard, piece).double().numpy()
        errors.append(rows @ rows.T / np.outer(norms, norms) - exact)
        bound.append((1 + exact**2) / size)
    assert np.sqrt(np.mean(np.square(errors))) < 1.2 * np.sqrt(np.mean(bound))
    assert abs(np.mean(errors)) < 5 * np.sqrt(np.mean(bound) / np.size(errors) * 40)


def test_pieces_agree_with_their_own_matrices():
    shard, size = _shard("w", 12, 7), 32
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, 12, (9, 3), generator=generator)
    held = torch.rand(9, 3, generator=generator) < 0.7
    pieces = [
        OuterProducts(torch.randn(9, 3, 7, generator=generator),
                      torch.randn(9, 3, 12, generator=generator)),
        RowSums(rows, held, torch.randn(9, 3, 7, generator=generator), 12),
    ]
    sketch, vector = Sketch([shard], size, 3), torch.randn(12, 7, generator=generator)
    for piece in pieces:
        matrices = piece.matrices()
        assert matrices.shape == (3, 12, 7)
        torch.testing.assert_close(piece.inner_products(vector), (matrices * vector).sum((1, 2)))
        torch.testing.assert_close(sketch.of_piece(shard, piece), torch.stack(
            [sketch.of_vector([matrix], [shard]) for matrix in matrices]))
    entries, column = Entries(torch.randn(3, 12, generator=generator)), _shard("b", 12, 1)
    torch.testing.assert_close(entries.inner_products(vector[:, 0]), entries.grads @ vector[:, 0])
    torch.testing.assert_close(
        Sketch([column], size, 3).of_piece(column, entries),
        torch.stack([Sketch([column], size, 3).of_vector([g], [column]) for g in entries.grads]))
