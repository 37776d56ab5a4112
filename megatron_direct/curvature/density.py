"""Trace and spectral density of a symmetric operator from random vectors.

The problem: H (n x n, symmetric, known by its products) has eigenvalues lambda_1, ..., lambda_n;
estimate sums  tr f(H) = sum_i f(lambda_i)  without computing them all. For a random vector z of
independent components with mean 0 and variance 1,

    tr f(H) = E[z^T f(H) z]  ~  |z|^2 sum_j s_1j^2 f(theta_j),

where (theta_j, s_j) are the eigenpairs of the m x m matrix T of m Lanczos steps from z: stochastic
Lanczos quadrature (Ubaru, Chen and Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos
quadrature", SIAM J. Matrix Anal. Appl. 38 (2017)). With f(x) = x one step is exact: Hutchinson.

Orthonormal vectors V that span leading eigenvectors are deflated: with P = I - V V^T,
tr H = tr(V^T H V) + tr(P H P), and only the second is left to chance. This is what makes Hutch++
precise (Meyer, Musco, Musco and Woodruff, SOSA 2021), with V from Lanczos instead of a sketch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_direct.curvature.krylov import SymmetricOperator, begin, extend, ritz_pairs
from megatron_direct.curvature.vector_space import Vector


@dataclass(frozen=True)
class Estimate:
    value: float
    standard_error: float  # of `value`, from the spread over the random vectors


@dataclass(frozen=True)
class SpectralDensity:
    """A weighted set of points whose weighted sums of f estimate tr f(H) / n."""

    nodes: np.ndarray  # [q] ascending: deflated eigenvalues and quadrature nodes
    weights: np.ndarray  # [q] >= 0, sum 1
    trace: Estimate
    positive_trace: Estimate  # sum of the positive eigenvalues: the energy of `find_elbow`
    num_matvecs: int

    def smooth(
        self, num_points: int = 1000, width: float | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Density on an even grid, to draw: each node a Gaussian of standard deviation `width`.

        The default width is a hundredth of the range, which shows what a page can show. The
        integral over the grid is 1 up to what the outermost four widths cut off.
        """
        low, high = self.nodes[0], self.nodes[-1]
        if width is None:
            width = (high - low) / 100.0 or max(abs(high), 1.0) / 100.0
        if not width > 0:
            raise ValueError(f"width must be positive, got {width}")
        grid = np.linspace(low - 4.0 * width, high + 4.0 * width, num_points)
        kernel = np.exp(-0.5 * ((grid[:, None] - self.nodes) / width) ** 2)
        return grid, kernel @ self.weights / (width * np.sqrt(2.0 * np.pi))


def spectral_density(
    operator: SymmetricOperator,
    num_samples: int,
    num_steps: int,
    *,
    eigenvalues: Sequence[float] | np.ndarray = (),
    eigenvectors: Sequence[Vector] = (),
) -> SpectralDensity:
    """Spectral density by stochastic Lanczos quadrature, at most num_samples * num_steps products.

    Holds len(eigenvectors) + num_steps + 4 vectors.

    Args:
        operator: its `random_vector` gives vectors of independent components with mean 0 and
            variance 1 (signs have the least variance), for seeds 0 to num_samples - 1.
        num_samples: >= 2, since the standard error is taken from their spread.
        num_steps: m >= 1; moments of the density up to order 2 m - 1 are those of the samples. With
            m = 1 the trace is Hutchinson's, at one product a sample.
        eigenvalues, eigenvectors: known orthonormal eigenpairs, as `lanczos` returns them. Leading
            pairs that have not converged leave the estimates right, their variance larger.

    Raises:
        ValueError: too few samples or steps, a product that is not finite.
    """
    if num_samples < 2:
        raise ValueError(f"num_samples must be at least 2 for a standard error, got {num_samples}")
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    known = np.asarray(eigenvalues, dtype=np.float64)
    nodes, weights, num_matvecs = [], [], 0
    assert operator.random_vector is not None
    for seed in range(num_samples):
        state, norm = begin(operator.random_vector(seed), operator.space, known, eigenvectors)
        while state.has_next and len(state.projected) < num_steps:
            extend(state, operator)
        pairs = ritz_pairs(state.projected)
        nodes.append(pairs.values)
        weights.append(norm**2 * pairs.vectors[:1].ravel() ** 2)
        num_matvecs += state.num_matvecs

    def trace_of(values_of: Callable[[np.ndarray], np.ndarray]) -> Estimate:
        samples = np.array([np.sum(w * values_of(x)) for x, w in zip(nodes, weights, strict=True)])
        return Estimate(
            value=float(np.sum(values_of(known)) + samples.mean()),
            standard_error=float(samples.std(ddof=1) / np.sqrt(num_samples)),
        )

    all_nodes = np.concatenate([known, *nodes])
    all_weights = np.concatenate([np.ones(len(known)), *(w / num_samples for w in weights)])
    order = np.argsort(all_nodes, kind="stable")
    return SpectralDensity(
        nodes=all_nodes[order],
        weights=all_weights[order] / all_weights.sum(),
        trace=trace_of(lambda x: x),
        positive_trace=trace_of(lambda x: np.maximum(x, 0.0)),
        num_matvecs=num_matvecs,
    )
