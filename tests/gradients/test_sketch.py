"""The hash sketch as a random projection: unbiased, linear, as good as a dense Gaussian."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_direct.gradients import hashing, layers
from megatron_direct.gradients.pieces import Entries, OuterProducts, RoutedOuterProducts, RowSums
from megatron_direct.gradients.sketch import Sketch
from megatron_direct.mcore.shards import ParameterShard


def _shard(name, rows, columns, of_vocabulary=False):
    return ParameterShard(name, torch.nn.Parameter(torch.zeros(rows, columns)),
                          torch.arange(rows), torch.arange(columns), (rows, columns), True, True,
                          of_vocabulary=of_vocabulary)


def test_hashes_are_uniform_and_signs_independent_of_buckets():
    stream, indices = hashing.stream(1, "x"), torch.arange(200_000)
    buckets = hashing.buckets(stream, indices, 100).numpy()
    signs = hashing.signs(hashing.hash64(stream, indices)).numpy()
    # Each block of 100 is a permutation, and a bucket's places in the blocks are uniform: a
    # chi-squared variable with 99 degrees of freedom is beyond 160 with probability 1e-4.
    assert (np.sort(buckets.reshape(-1, 100), axis=1) == np.arange(100)).all()
    places = np.bincount(np.argsort(buckets.reshape(-1, 100), axis=1)[:, 7], minlength=100)
    assert ((places - 20) ** 2 / 20).sum() < 160
    # Of any two indices of different blocks, 1 in 100 pairs meet: 1,999 pairs, five deviations.
    meet = (buckets.reshape(-1, 100)[1:, 3] == buckets.reshape(-1, 100)[:-1, 5]).sum()
    assert abs(meet - 20) < 5 * np.sqrt(20)
    # Means of 200,000 (and 2,000) signs: five standard errors.
    assert abs(signs.mean()) < 5 / np.sqrt(len(signs))
    by_bucket = np.bincount(buckets, weights=signs, minlength=100)
    assert np.abs(by_bucket).max() < 5 * np.sqrt(2000)


def test_a_part_of_the_indices_has_the_buckets_of_the_whole():
    stream, whole = hashing.stream(2, "x"), torch.arange(1000)
    part = torch.tensor([999, 3, 250, 251, 249, 0])
    assert torch.equal(hashing.buckets(stream, part, 250),
                       hashing.buckets(stream, whole, 250)[part])


def test_known_values_of_the_mixer():
    """SplitMix64 with seed 0: the first outputs, published with the algorithm's reference code."""
    gamma = -7046029254386353131
    outputs = hashing.hash64(gamma, torch.arange(3)).numpy().astype(np.uint64)
    np.testing.assert_array_equal(outputs, np.array(
        [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F], dtype=np.uint64))


@pytest.mark.parametrize("rank", [1, 2, 40])
def test_inner_products_are_kept_as_a_gaussian_keeps_them(rank):
    """Errors, normalised by the norms and times sqrt(k), against 1 for Gaussian entries' sketch.

    A dense Gaussian errs by sqrt((1 + cos^2) / k); the bar is 1.2 times that, on matrices of low
    rank, too, as gradients are. A TensorSketch would err by sqrt(3) times that at rank one.
    """
    size = 512
    errors, exact, _ = _errors(_shard("w", 96, 80, of_vocabulary=True), size, rank)
    bound = (1 + exact**2) / size
    assert np.sqrt(np.mean(np.square(errors))) < 1.2 * np.sqrt(np.mean(bound))
    assert abs(np.mean(errors)) < 5 * np.sqrt(np.mean(bound) / np.size(errors) * 40)
    diagonal = np.array([np.diag(error) for error in errors])
    assert np.sqrt(np.mean(diagonal**2)) < 1.2 * np.sqrt(2 / size)


@pytest.mark.parametrize("size", [512, 64])
@pytest.mark.parametrize("rank", [1, 2, 40])
def test_what_a_narrowed_axis_adds_to_the_variance(rank, size):
    """Two entries of one row meet with probability 1 / q, unless they are in one block of q.

    So the row's part of <S g, S h>, the sum of s(c) s(c') M_cc' over those c, c' that meet, with
    M = G^T H, has a variance of the sum of (M_cc' + M_c'c)^2 / q over pairs; entries of different
    rows meet as those of a Gaussian's would. An axis that is longer than its k buckets (96, of 64)
    adds the same, with G H^T and k. Of 64,000 errors in inner products and 1,600 in norms, those of
    40 seeds independent, the root of the mean square is within a tenth of the truth.
    """
    narrow = size // 16
    # The narrowed axis is that of the rows here: G is the transposed matrix.
    errors, exact, matrices = _errors(_shard("w", 200, 96), size, rank)
    added = np.empty_like(exact)
    for i, g in enumerate(matrices):
        for j, h in enumerate(matrices):
            added[i, j] = _of_pairs_that_meet(g @ h.T, narrow) + _of_pairs_that_meet(g.T @ h, size)
    dense = (1 + exact**2) / size
    for part in (np.ones_like(exact, bool), np.eye(len(exact), dtype=bool)):
        found = np.square(errors)[:, part].mean()
        assert abs(np.sqrt(found / (dense + added)[part].mean()) - 1) < 0.1
    assert rank > 2 or np.trace(added) > 2 * np.trace(dense), "in norms it is what counts"


def _of_pairs_that_meet(gram: np.ndarray, num_buckets: int) -> float:
    blocks = np.arange(len(gram)) // num_buckets
    return np.square(np.triu(gram + gram.T) * (blocks[:, None] != blocks)).sum() / num_buckets


def _errors(shard: ParameterShard, size: int, rank: int):
    """([40, n, n] errors of inner products over norms, of as many seeds, the inner products, and
    the n gradients of length 1)."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = shard.shape
    piece = OuterProducts(torch.randn(rank, 40, columns, generator=generator),
                          torch.randn(rank, 40, rows, generator=generator))
    matrices = piece.matrices().double().numpy()
    norms = np.linalg.norm(matrices, axis=(1, 2))
    matrices /= norms[:, None, None]
    exact = np.einsum("iab,jab->ij", matrices, matrices)
    errors = []
    for seed in range(40):
        sketches = Sketch([shard], size, seed).of_piece(shard, piece).double().numpy()
        errors.append(sketches @ sketches.T / np.outer(norms, norms) - exact)
    return np.array(errors), exact, matrices


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


def test_bfloat16_pieces_have_inner_products_in_float32():
    """The factors are exact, whatever they were rounded from: products and sums round to 1e-6."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).bfloat16()

    rows = torch.randint(0, 12, (9, 3), generator=generator)
    owners = torch.randint(0, 3, (9,), generator=generator)
    vector = torch.randn(12, 7, generator=generator)
    for piece in (OuterProducts(draw(9, 3, 7), draw(9, 3, 12)),
                  RoutedOuterProducts(draw(9, 7), draw(9, 12), owners, 3),
                  RowSums(rows, rows > 3, draw(9, 3, 7), 12), Entries(draw(3, 84))):
        exact = {name: value.double() if torch.is_tensor(value) and value.is_floating_point()
                 else value for name, value in vars(piece).items()}
        truth = (type(piece)(**exact).matrices().flatten(1) * vector.double().flatten()).sum(1)
        found = piece.inner_products(vector)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("centred", [True, False])
def test_bfloat16_norms_are_summed_in_float32(centred):
    class _Norm:
        eps, weight, bias = 1e-5, "weight", "bias"

    generator = torch.Generator().manual_seed(2)
    inputs, grads = (torch.randn(50, 3, 8, generator=generator).bfloat16() for _ in range(2))
    watch = layers.norm(centred, _Norm(), (inputs,), {}, None)
    x = inputs.double() - (inputs.double().mean(-1, keepdim=True) if centred else 0)
    x_hat = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    truth = {"weight": (grads.double() * x_hat).sum(0), "bias": grads.double().sum(0)}
    found = {name: piece.grads for name, piece in watch(grads)}
    assert set(found) == ({"weight", "bias"} if centred else {"weight"})
    for name, values in found.items():
        # Sums of 50 float32 products of a size of 1.
        torch.testing.assert_close(values.double(), truth[name], rtol=1e-5, atol=1e-5)


def test_a_scale_multiplies_the_gradient_entry_by_entry():
    generator = torch.Generator().manual_seed(3)
    shard = _shard("w", 12, 7)
    scale = torch.rand(12, 7, generator=generator)
    pieces = [
        OuterProducts(torch.randn(9, 3, 7, generator=generator),
                      torch.randn(9, 3, 12, generator=generator)),
        RowSums(torch.randint(0, 12, (9, 3), generator=generator), torch.ones(9, 3).bool(),
                torch.randn(9, 3, 7, generator=generator), 12),
    ]
    plain, scaled = Sketch([shard], 32, 3), Sketch([shard], 32, 3, {"w": scale})
    for piece in pieces:
        torch.testing.assert_close(scaled.of_piece(shard, piece), torch.stack(
            [plain.of_vector([scale * matrix], [shard]) for matrix in piece.matrices()]))


def test_a_rank_that_holds_no_parameter_adds_nothing_to_the_sketch_of_a_vector():
    torch.testing.assert_close(Sketch([], 64, 1).of_vector([], []), torch.zeros(64))
