"""Trace and spectral density against dense linear algebra."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_direct.curvature.density import spectral_density
from megatron_direct.curvature.krylov import SymmetricOperator
from megatron_direct.curvature.lanczos import lanczos
from megatron_direct.curvature.vector_space import FunctionSpace

N = 100


@pytest.fixture(scope="module")
def matrix() -> np.ndarray:
    """Outliers, a bulk and a negative edge."""
    rng = np.random.default_rng(0)
    values = np.concatenate([[60.0, 40.0, 30.0, 20.0], rng.normal(1.0, 0.5, N - 6), [-5.0, -8.0]])
    q = np.linalg.qr(rng.standard_normal((N, N)))[0]
    symmetric = (q * values) @ q.T
    return 0.5 * (symmetric + symmetric.T)


def signs(seed: int) -> np.ndarray:
    return np.random.default_rng([23, seed]).choice([-1.0, 1.0], N)


def operator(matvec, random_vector=signs, dot=np.dot) -> SymmetricOperator:
    return SymmetricOperator(matvec, FunctionSpace(dot), random_vector)


def hutchinson(matvec, num_samples, random_vector=signs, **known):
    return spectral_density(operator(matvec, random_vector), num_samples, 1, **known).trace


@pytest.fixture(scope="module")
def known(matrix) -> dict:
    found = lanczos(lambda v: matrix @ v, signs(99), 4, dot=np.dot, tol=1e-8, max_matvecs=200)
    assert found.converged
    return dict(eigenvalues=found.eigenvalues, eigenvectors=found.eigenvectors)


def test_trace_is_hutchinsons_estimate(matrix):
    found = hutchinson(lambda v: matrix @ v, 10)
    samples = [signs(seed) @ matrix @ signs(seed) for seed in range(10)]
    assert found.value == pytest.approx(np.mean(samples), rel=1e-12)
    assert found.standard_error == pytest.approx(np.std(samples, ddof=1) / 10**0.5, rel=1e-9)


@pytest.mark.parametrize("deflated", [False, True])
def test_standard_error_is_the_error(matrix, known, deflated):
    num_runs, num_samples = 200, 10
    runs = [
        hutchinson(
            lambda v: matrix @ v,
            num_samples,
            lambda seed, run=run: signs(1000 * run + seed),
            **(known if deflated else {}),
        )
        for run in range(num_runs)
    ]
    errors = np.array([run.value for run in runs]) - np.trace(matrix)
    claimed = np.sqrt(np.mean([run.standard_error**2 for run in runs]))
    # The spread of a variance from 200 runs is about 10% of it; 5 standard deviations of each.
    assert np.std(errors) == pytest.approx(claimed, rel=0.25)
    assert abs(np.mean(errors)) <= 5 * claimed / num_runs**0.5


def test_deflation_takes_the_outliers_out_of_the_error(matrix, known):
    plain = hutchinson(lambda v: matrix @ v, 10)
    deflated = hutchinson(lambda v: matrix @ v, 10, **known)
    # Variance of Hutchinson with signs: 2 (|A|_F^2 - |diag A|^2); the outliers hold most of it.
    assert deflated.standard_error < 0.5 * plain.standard_error
    assert abs(deflated.value - np.trace(matrix)) < 4 * deflated.standard_error


@pytest.mark.parametrize("deflated", [False, True])
def test_quadrature_is_exact_with_all_steps(matrix, known, deflated):
    # With as many steps as dimensions a sample is z^T f(A) z, of A on the complement of what is
    # deflated: of which the dense matrix gives the positive part.
    deflate = known if deflated else {}
    v = np.array(deflate.get("eigenvectors", np.zeros((0, N))))
    project = np.eye(N) - v.T @ v
    values, vectors = np.linalg.eigh(project @ matrix @ project)
    positive = (vectors * np.maximum(values, 0.0)) @ vectors.T
    found = spectral_density(operator(lambda v: matrix @ v), 2, N, **deflate)
    samples = [signs(seed) @ positive @ signs(seed) for seed in range(2)]
    expected = np.mean(samples) + np.sum(deflate.get("eigenvalues", 0.0))
    assert found.positive_trace.value == pytest.approx(expected, rel=1e-9)
    assert found.weights.sum() == pytest.approx(1.0, rel=1e-12)
    assert np.all(np.diff(found.nodes) >= 0)


def test_few_steps_tell_the_energy_and_the_distribution(matrix, known):
    values = np.linalg.eigvalsh(matrix)
    found = spectral_density(operator(lambda v: matrix @ v), 10, 20, **known)
    assert found.num_matvecs == 200
    error = abs(found.positive_trace.value - values[values > 0].sum())
    assert error < 4 * found.positive_trace.standard_error < 0.1 * values[values > 0].sum()
    assert found.positive_trace.value > found.trace.value
    # Away from the bulk the distribution function is resolved to about an eigenvalue or two.
    for x in (-3.0, 3.0, 10.0, 35.0):
        share = found.weights[found.nodes <= x].sum()
        assert share == pytest.approx(np.mean(values <= x), abs=2.0 / N)


def test_smooth_density(matrix, known):
    found = spectral_density(operator(lambda v: matrix @ v), 4, 20, **known)
    grid, density = found.smooth(num_points=4000, width=0.3)
    mass = np.trapezoid(density, grid)
    assert mass == pytest.approx(1.0, abs=1e-4)  # the tails behind four widths
    assert grid[np.argmax(density)] == pytest.approx(1.0, abs=0.3)  # the bulk
    near_outlier = np.abs(grid - 60.0) < 1.5
    assert np.trapezoid(density[near_outlier], grid[near_outlier]) == pytest.approx(1 / N, rel=0.01)
    with pytest.raises(ValueError, match="width must be positive, got -1"):
        found.smooth(width=-1.0)


def test_space_that_ends_early():
    # Two distinct eigenvalues: two steps tell all, and the counts are exact with signs.
    values = np.where(np.arange(N) < 10, 5.0, -1.0)
    found = spectral_density(operator(lambda v: values * v), 3, 20)
    assert found.num_matvecs == 6
    assert found.trace.value == pytest.approx(values.sum(), rel=1e-12)
    assert found.trace.standard_error == pytest.approx(0.0, abs=1e-10)
    assert found.positive_trace.value == pytest.approx(50.0, rel=1e-12)


def test_nothing_left_after_deflation():
    found = spectral_density(
        operator(lambda v: np.array([2.0, -1.0]) * v, lambda seed: np.ones(2)),
        2,
        3,
        eigenvalues=[2.0, -1.0],
        eigenvectors=list(np.eye(2)),
    )
    assert found.num_matvecs == 0
    assert (found.trace.value, found.trace.standard_error) == (1.0, 0.0)
    np.testing.assert_array_equal(found.nodes, [-1.0, 2.0])


def test_single_precision_torch_vectors(matrix):
    single = torch.tensor(matrix, dtype=torch.float32)
    found = spectral_density(
        operator(
            lambda v: single @ v,
            lambda seed: torch.tensor(signs(seed), dtype=torch.float32),
            dot=lambda u, v: float(u.double() @ v.double()),
        ),
        3,
        15,
    )
    double = spectral_density(operator(lambda v: matrix @ v), 3, 15)
    assert found.trace.value == pytest.approx(double.trace.value, rel=1e-5)
    assert found.positive_trace.value == pytest.approx(double.positive_trace.value, rel=1e-5)


def test_bad_arguments(matrix):
    with pytest.raises(ValueError, match="num_samples must be at least 2 for a standard error"):
        hutchinson(lambda v: matrix @ v, 1)
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        spectral_density(operator(lambda v: matrix @ v), 2, 0)
    with pytest.raises(ValueError, match="product 1 of the operator is not finite"):
        hutchinson(lambda v: np.nan * v, 2)
