"""Operations on parameter vectors, block by block, against float64 arrays of the whole vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ranks import Layout, on_layout
from tiny_models import MODELS
from weights import assemble, pieces

from megatron_direct.config import Job
from megatron_direct.curvature import vectors as vectors_module
from megatron_direct.curvature.vector_space import FunctionSpace
from megatron_direct.curvature.vectors import ParameterSpace
from megatron_direct.mcore import model as models
from megatron_direct.mcore.shards import parameter_shards

MODEL = MODELS["gpt2-tied"]  # replicated parameters, and embeddings that two stages hold
NUM_VECTORS = 5
GENERATOR = np.random.default_rng(0)
COEFFICIENTS = GENERATOR.standard_normal((NUM_VECTORS, 2))
ROTATION = np.linalg.qr(GENERATOR.standard_normal((NUM_VECTORS, 3)))[0]
# What rounding to the vectors' precision leaves of numbers of size 1; sums are in float64.
DTYPES = {"fp64": torch.float64, "fp32": torch.float32}
TOLERANCE = {"fp64": 1e-14, "fp32": 1e-6}


def _operations(model, layout, precision):
    """By name: the whole of each vector given and found, and the inner products."""
    space = ParameterSpace(parameter_shards(
        models.build(Job(model, layout), dtype=DTYPES[precision])))
    given = [space.random_signs(2 * seed) + 0.3 * space.random_signs(2 * seed + 1)
             for seed in range(NUM_VECTORS + 2)]
    vectors, others = given[:NUM_VECTORS], given[NUM_VECTORS:]
    found = {"given": given, "combined": [space.combine(COEFFICIENTS[:, 0], vectors)]}
    left = [*others]
    with pytest.MonkeyPatch.context() as patch:
        # Blocks of a few entries, the last of them smaller.
        patch.setitem(vectors_module._BLOCK_ENTRIES, "cpu", 7 * (NUM_VECTORS + 1))
        products = space.inner_products(vectors, others)
        space.remove(COEFFICIENTS, vectors, left)
        rotated = [vector.clone() for vector in vectors]
        addresses = [vector.data_ptr() for vector in rotated]
        before = [*rotated]
        space.rotate(rotated, ROTATION)
        assert [vector.data_ptr() for vector in rotated] == addresses[:3]  # no further memory
        assert not any(new is old for new in rotated for old in before)
        orthonormal = [*(vector.clone() for vector in rotated)]
        space.reorthonormalise(orthonormal)
        gram = space.inner_products(orthonormal, orthonormal)
    found |= {"left": left, "rotated": rotated}
    return products, gram, {name: [pieces(space.shards, space.split(vector)) for vector in some]
                            for name, some in found.items()}


@pytest.mark.parametrize(("layout", "precision"), [
    (Layout(), "fp32"), (Layout(), "fp64"), (Layout(tp=2, pp=2), "fp32")], ids=str)
def test_operations_are_those_of_the_whole_vectors(layout, precision):
    ranks = on_layout(layout, _operations, MODEL, precision)
    whole = {name: np.stack([
        np.concatenate([m.ravel() for _, m in sorted(assemble([r[2][name][i] for r in ranks]
                                                              ).items())]).astype(np.float64)
        for i in range(len(ranks[0][2][name]))]) for name in ranks[0][2]}
    vectors, others = whole["given"][:NUM_VECTORS], whole["given"][NUM_VECTORS:]
    length, tolerance = vectors.shape[1], TOLERANCE[precision]
    for products, gram, _ in ranks:  # the same on all of them
        # Exact up to the order of float64 sums, whatever the vectors' precision.
        np.testing.assert_allclose(products, vectors @ others.T, rtol=0, atol=1e-13 * length)
        np.testing.assert_allclose(gram, np.eye(3), rtol=0, atol=tolerance)
    np.testing.assert_allclose(whole["combined"][0], COEFFICIENTS[:, 0] @ vectors, atol=tolerance)
    np.testing.assert_allclose(whole["left"], others - COEFFICIENTS.T @ vectors, atol=tolerance)
    np.testing.assert_allclose(whole["rotated"], ROTATION.T @ vectors, atol=tolerance)


@pytest.mark.parametrize("shape", [(6, 6), (6, 2), (1, 1), (4, 0), (0, 0)], ids=str)
def test_householder_rotation_is_the_matrix_product(shape):
    generator = np.random.default_rng(1)
    vectors = generator.standard_normal((shape[0], 30))
    rotation = np.linalg.qr(generator.standard_normal(shape))[0]
    rotated = [*vectors]
    FunctionSpace(np.dot).rotate(rotated, rotation)
    expected = rotation.T @ vectors
    np.testing.assert_allclose(np.array(rotated).reshape(expected.shape), expected, atol=1e-13)


def test_nearly_orthonormal_vectors_are_made_orthonormal():
    generator = np.random.default_rng(2)
    exact = np.linalg.qr(generator.standard_normal((30, 6)))[0].T
    vectors = [*(exact + 1e-6 * generator.standard_normal(exact.shape))]
    FunctionSpace(np.dot).reorthonormalise(vectors)
    np.testing.assert_allclose(np.array(vectors) @ np.array(vectors).T, np.eye(6), atol=1e-13)
    np.testing.assert_allclose(vectors, exact, atol=1e-5)
