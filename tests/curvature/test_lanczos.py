"""Lanczos against dense eigensolvers, on operators with known spectra."""

from __future__ import annotations

import copy
import functools
import gc

import numpy as np
import pytest
import scipy.sparse.linalg
import torch

from megatron_direct.curvature.lanczos import AsymmetricOperator, lanczos, residual_norms

N, K = 200, 8  # spectra below have a gap behind the K-th eigenvalue, so its subspace is determined

LEADING_OF_A_GPT = [161.0, 61.0, 47.0, 44.0, 41.0, 40.0, 39.0]
NEGATIVE_EDGE_OF_A_GPT = [-6.8, -11.6, -13.0]


def spectrum(name: str, n: int = N) -> np.ndarray:
    """[n] descending."""
    if name == "decaying":
        values = 10.0 * np.arange(1, n + 1) ** -1.5
        values[K:] *= 0.8
    elif name == "clustered":
        values = np.linspace(0.0, 1.0, n)
        values[-K:] = 5.0 + 1e-3 * np.arange(K)
    elif name == "indefinite":
        values = np.linspace(-8.0, 1.0, n)
        values[-K:] = np.linspace(2.0, 6.0, K)
    elif name == "gaps":
        values = np.linspace(0.0, 0.01, n)
        values[-K:] = 10.0 ** np.linspace(-0.5, 3.0, K)
    elif name == "low rank":
        values = np.zeros(n)
        values[-K:] = np.arange(1, K + 1)
    elif name == "repeated":
        values = np.concatenate([np.ones(n - K), 2.0 * np.ones(5), 3.0 * np.ones(K - 5)])
    elif name == "gpt":
        tail = 38.0 * np.exp(-np.arange(100) / 35.0)
        bulk = np.abs(np.random.default_rng(5).normal(0.0, 0.5, n - 110))
        values = np.concatenate([LEADING_OF_A_GPT, tail, bulk, NEGATIVE_EDGE_OF_A_GPT])
    elif name == "power law":
        values = np.arange(1, n + 1) ** -0.5
    return np.sort(values)[::-1]


@functools.cache
def orthogonal(n: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(1).standard_normal((n, n)))[0]


def dense(values: np.ndarray) -> np.ndarray:
    """A symmetric matrix with these eigenvalues."""
    q = orthogonal(len(values))
    matrix = (q * values) @ q.T
    return 0.5 * (matrix + matrix.T)


def numpy_dot(u: np.ndarray, v: np.ndarray) -> float:
    return float(u.astype(np.float64) @ v.astype(np.float64))


def random_array(seed: int, n: int = N) -> np.ndarray:
    return np.random.default_rng([17, seed]).standard_normal(n)


class Arithmetic:
    """Vectors of one library and precision."""

    def __init__(self, library: str, bits: int):
        self.library, self.bits = library, bits
        # float32 products err by about 2e-7 of the norm here: a tolerance well above that.
        self.tol = 1e-8 if bits == 64 else 1e-5

    def array(self, x: np.ndarray):
        if self.library == "numpy":
            return x.astype(f"float{self.bits}")
        return torch.tensor(x.copy(), dtype=getattr(torch, f"float{self.bits}"))

    def dot(self, u, v) -> float:
        return numpy_dot(u, v) if self.library == "numpy" else float(u.double() @ v.double())

    def rows(self, vectors) -> np.ndarray:
        return np.array([np.asarray(v, dtype=np.float64) for v in vectors])


@pytest.fixture(params=["numpy64", "numpy32", "torch64", "torch32"])
def arithmetic(request) -> Arithmetic:
    return Arithmetic(request.param[:5], int(request.param[5:]))


@pytest.mark.parametrize(
    "name", ["decaying", "clustered", "indefinite", "gaps", "low rank", "repeated"]
)
def test_agrees_with_dense_eigenpairs(name, arithmetic):
    matrix = arithmetic.array(dense(spectrum(name)))
    exact = np.asarray(matrix, dtype=np.float64)
    values, vectors = np.linalg.eigh(exact)
    largest = np.abs(values).max()

    found = lanczos(
        lambda v: matrix @ v,
        arithmetic.array(random_array(0)),
        K,
        dot=arithmetic.dot,
        tol=arithmetic.tol,
        max_matvecs=500,
        random_vector=lambda seed: arithmetic.array(random_array(seed)),
    )

    assert found.converged and found.status == "converged"
    assert all(v.dtype == matrix.dtype for v in found.eigenvectors)
    # An eigenvalue is at most a residual away; for these gaps, far less.
    np.testing.assert_allclose(found.eigenvalues, values[::-1][:K], rtol=0, atol=1e-6 * largest)
    v = arithmetic.rows(found.eigenvectors)
    orthonormal = 1e-10 if arithmetic.bits == 64 else 1e-6
    np.testing.assert_allclose(v @ v.T, np.eye(K), rtol=0, atol=orthonormal)
    true_residuals = np.linalg.norm(v @ exact - found.eigenvalues[:, None] * v, axis=1)
    assert true_residuals.max() <= arithmetic.tol * largest
    # What was measured for all pairs together is at most a tenth of the tolerance.
    np.testing.assert_allclose(
        found.residuals, true_residuals, rtol=0, atol=0.1 * arithmetic.tol * largest
    )
    # sin(angle) <= |residuals| / gap (Davis and Kahan), and 1 - cos^2 is its square; the last
    # term is the rounding of the vectors.
    gap = values[-K] - values[-K - 1]
    missing = K - np.sum((v @ vectors[:, -K:]) ** 2)
    assert missing <= (np.linalg.norm(true_residuals) / gap) ** 2 + 10 * orthonormal


@pytest.mark.parametrize("name", ["gpt", "power law"])
@pytest.mark.parametrize("k", [1, 5, 10, 16, 20, 50])
@pytest.mark.parametrize("tol", [1e-3, 1e-6, 1e-10])
def test_needs_no_more_products_than_arpack(name, k, tol):
    # Counts depend on the spectrum and the start vector only, so a diagonal matrix will do.
    n = 2000
    values = spectrum(name, n)
    start = random_array(0, n)
    products = {"arpack": 0, "lanczos": 0}

    def matvec(v, who):
        products[who] += 1
        return values * v

    operator = scipy.sparse.linalg.LinearOperator(
        (n, n), matvec=lambda v: matvec(v.ravel(), "arpack"), dtype=np.float64
    )
    scipy.sparse.linalg.eigsh(operator, k=k, which="LA", tol=tol, v0=start)
    found = lanczos(
        lambda v: matvec(v, "lanczos"),
        start,
        k,
        dot=np.dot,
        tol=tol,
        max_matvecs=1000,
        random_vector=lambda seed: random_array(seed, n),
    )

    assert found.converged
    assert found.num_matvecs == products["lanczos"] <= products["arpack"]
    np.testing.assert_allclose(found.eigenvalues, values[:k], rtol=0, atol=tol * values[0])
    v = np.array(found.eigenvectors)
    true_residuals = np.linalg.norm(v * values - found.eigenvalues[:, None] * v, axis=1)
    assert true_residuals.max() <= tol * values[0]


@pytest.mark.parametrize("max_matvecs", [2, 5, 17, 40])
def test_stopping_short_is_told_and_its_residuals_are_true(max_matvecs):
    matrix = dense(spectrum("gpt"))
    values = np.linalg.eigvalsh(matrix)[::-1]
    found = lanczos(
        lambda v: matrix @ v, random_array(0), K, dot=np.dot, tol=1e-6, max_matvecs=max_matvecs
    )
    assert not found.converged and found.status == "max-matvecs"
    assert found.num_matvecs == max_matvecs
    k = len(found.eigenvalues)
    assert k == min(K, max_matvecs - 1)
    true_residuals = residual_norms(
        lambda v: matrix @ v, found.eigenvalues, found.eigenvectors, dot=np.dot
    )
    # Rounding apart, equal; and short of convergence at least one is above the tolerance.
    np.testing.assert_allclose(found.residuals, true_residuals, rtol=0, atol=1e-12 * values[0])
    assert true_residuals.max() > 1e-6 * values[0]
    # Ritz values come from below (Cauchy interlacing).
    assert np.all(found.eigenvalues <= values[:k] + 1e-12 * values[0])


def test_rounding_floor_is_told():
    matrix = dense(spectrum("gpt")).astype(np.float32)
    found = lanczos(
        lambda v: matrix @ v,
        random_array(0).astype(np.float32),
        K,
        dot=numpy_dot,
        tol=1e-8,
        max_matvecs=300,
    )
    assert not found.converged and found.status == "rounding-floor"
    # Then each pair was measured with a product of its own.
    own = residual_norms(
        lambda v: matrix @ v, found.eigenvalues, found.eigenvectors, dot=numpy_dot
    )
    np.testing.assert_array_equal(found.residuals, own)
    assert 1e-8 < found.residuals.max() / found.eigenvalues[0] < 1e-6


def test_errors_that_the_estimates_cannot_see_are_measured():
    # Products of a vector rounded to bfloat16 are not linear: Lanczos converges, to what is not an
    # eigenpair to more than three digits.
    matrix = torch.tensor(dense(spectrum("gpt")))
    calls = 0

    def matvec(v):
        nonlocal calls
        calls += 1
        return matrix @ v.bfloat16().double()

    found = lanczos(
        matvec,
        torch.tensor(random_array(0)),
        K,
        dot=lambda u, v: float(u @ v),
        tol=1e-6,
        max_matvecs=300,
        symmetry_tol=0.1,
    )
    assert found.status == "rounding-floor" and found.num_matvecs == calls
    own = residual_norms(
        matvec, found.eigenvalues, found.eigenvectors, dot=lambda u, v: float(u @ v)
    )
    np.testing.assert_array_equal(found.residuals, own)
    assert own.max() > 1e-4 * found.eigenvalues[0]


def test_negative_edge_is_told_and_never_returned():
    values = spectrum("gpt")
    found = lanczos(
        lambda v: values * v, random_array(0), K, dot=np.dot, tol=1e-6, max_matvecs=300
    )
    np.testing.assert_allclose(found.eigenvalues, values[:K], atol=1e-6 * values[0])
    # A Ritz value bounds the smallest eigenvalue from above; the edge stands apart from the rest.
    assert values[-1] <= found.smallest_ritz < 0.9 * values[-1]


def test_pairs_beyond_the_rank_are_zeros():
    # An empirical Fisher from 5 samples, in the precision it is computed in.
    gradients = np.random.default_rng(0).standard_normal((5, N)).astype(np.float32)
    found = lanczos(
        lambda v: gradients.T @ (gradients @ v) / np.float32(5),
        random_array(0).astype(np.float32),
        K,
        dot=numpy_dot,
        tol=1e-5,
        max_matvecs=100,
        random_vector=lambda seed: random_array(seed).astype(np.float32),
    )
    assert found.converged and found.num_invariant > 0
    nonzero = np.linalg.eigvalsh(gradients.astype(np.float64) @ gradients.T / 5)[::-1]
    np.testing.assert_allclose(found.eigenvalues[:5], nonzero, rtol=1e-5)
    assert np.abs(found.eigenvalues[5:]).max() < 1e-6 * nonzero[0]
    # The rank, one vector to see that it ends, the missing pairs, one that finds no more, and one
    # for the residuals.
    assert found.num_matvecs <= K + 4


def test_copies_of_an_eigenvalue_are_found_where_krylov_spaces_end():
    # Each Krylov space holds one copy of 5; the last one must be searched to its end (it has two
    # dimensions) before it is known to hold nothing above the copies that are locked.
    values = np.concatenate([5.0 * np.ones(10), np.ones(N - 10)])
    found = lanczos(
        lambda v: values * v,
        random_array(0),
        4,
        dot=np.dot,
        tol=1e-8,
        max_matvecs=100,
        random_vector=random_array,
    )
    assert found.converged
    np.testing.assert_allclose(found.eigenvalues, 5.0, rtol=1e-12)
    assert found.num_matvecs <= 2 * 5 + 1


def test_spaces_that_end_in_rounding_noise_are_seen_to_end():
    # What is left of these dense products is above their unit roundoff, yet far below the
    # tolerance: taken for a direction of its own it would hide the copies of 2 still missing.
    matrix = dense(spectrum("repeated", 300))
    found = lanczos(
        lambda v: matrix @ v,
        random_array(0, 300),
        K,
        dot=numpy_dot,
        tol=1e-8,
        max_matvecs=500,
        random_vector=lambda seed: random_array(seed, 300),
    )
    assert found.converged
    np.testing.assert_allclose(found.eigenvalues, [3.0] * 3 + [2.0] * 5, atol=1e-8)


def test_single_precision_vectors_stay_orthonormal_over_many_restarts():
    values = np.linspace(1.0, 0.0, 2000, dtype=np.float32)
    found = lanczos(
        lambda v: values * v,
        random_array(0, 2000).astype(np.float32),
        16,
        dot=numpy_dot,
        tol=1e-5,
        max_matvecs=1000,
    )
    assert found.converged and found.num_matvecs > 300  # a restart each 13 products
    v = np.array(found.eigenvectors, dtype=np.float64)
    # A float32 vector is of norm 1 to about 1e-7; restarts alone add up to some 1e-6.
    np.testing.assert_allclose(v @ v.T, np.eye(16), rtol=0, atol=5e-7)


def test_invariant_subspace_without_a_random_vector_is_told():
    values = np.concatenate([[3.0, 2.0], np.zeros(N - 2)])
    arguments = dict(dot=np.dot, tol=1e-8, max_matvecs=100)
    found = lanczos(lambda v: values * v, random_array(0), K, **arguments)
    assert not found.converged and found.status == "invariant-subspace"
    np.testing.assert_allclose(found.eigenvalues, [3.0, 2.0, 0.0], atol=1e-12)
    assert lanczos(lambda v: values * v, random_array(0), 2, **arguments).converged


@pytest.mark.parametrize("value", [0.0, 1.0, -2.0])
def test_multiples_of_the_identity(value):
    found = lanczos(
        lambda v: value * v,
        random_array(0),
        3,
        dot=np.dot,
        tol=1e-8,
        max_matvecs=100,
        random_vector=random_array,
    )
    assert found.converged
    np.testing.assert_allclose(found.eigenvalues, value, atol=1e-12)
    v = np.array(found.eigenvectors)
    np.testing.assert_allclose(v @ v.T, np.eye(3), atol=1e-10)


def test_all_eigenpairs_of_a_small_operator():
    matrix = dense(np.array([3.0, 1.0, 1.0, 0.0, -4.0]))
    arguments = dict(dot=np.dot, tol=1e-8, max_matvecs=100)

    def find(k, **more):
        return lanczos(lambda v: matrix @ v, random_array(0, 5), k, **arguments, **more)

    found = find(5, random_vector=lambda seed: random_array(seed, 5))
    assert found.converged
    np.testing.assert_allclose(found.eigenvalues, [3.0, 1.0, 1.0, 0.0, -4.0], atol=1e-12)
    too_many = "6 eigenpairs requested of an operator of dimension 5"
    with pytest.raises(ValueError, match=too_many):
        find(6, dimension=5)
    with pytest.raises(ValueError, match=too_many):  # found out on the way
        find(6, random_vector=lambda seed: random_array(seed, 5))


@pytest.mark.parametrize("error", [0.02, 0.5])
def test_asymmetric_operator_is_refused(error):
    rng = np.random.default_rng(0)
    skew = rng.standard_normal((N, N))
    skew = (skew - skew.T) / np.linalg.norm(skew - skew.T, 2)
    matrix = dense(spectrum("gpt")) + error * 161.0 * skew
    products = 0

    def matvec(v):
        nonlocal products
        products += 1
        return matrix @ v

    with pytest.raises(AsymmetricOperator, match="not symmetric") as raised:
        lanczos(matvec, random_array(0), K, dot=np.dot, tol=1e-4, max_matvecs=300)
    # <u, H v> - <H u, v> is 2 <u, S v> for the skew part S; few vectors see part of its norm only.
    assert 1e-3 < raised.value.asymmetry <= 2.2 * error
    assert products <= 6


def test_asymmetry_by_rounding_is_accepted_and_told():
    matrix = dense(spectrum("gpt")).astype(np.float32)
    found = lanczos(
        lambda v: matrix @ v,
        random_array(0).astype(np.float32),
        K,
        dot=numpy_dot,
        tol=1e-4,
        max_matvecs=300,
    )
    assert found.converged and 0 < found.asymmetry < 1e-5


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # inf * 0 in the inner product
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("position", [1, 7, 20])  # the last one measures the residuals
def test_product_that_is_not_finite_is_refused_at_once(bad, position):
    products = 0

    def matvec(v):
        nonlocal products
        products += 1
        return v * bad if products == position else spectrum("gpt") * v

    with pytest.raises(ValueError, match=f"product {position} of the operator is not finite"):
        lanczos(matvec, random_array(0), K, dot=np.dot, tol=1e-12, max_matvecs=20)
    assert products == position


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(num_eigenpairs=0), "num_eigenpairs must be at least 1, got 0"),
        (dict(num_eigenpairs=201, dimension=200), "201 eigenpairs requested of .* dimension 200"),
        (dict(tol=0.0), "tol must be positive"),
        (dict(tol=np.nan), "tol must be positive"),
        (dict(max_matvecs=1), "max_matvecs must be at least 2"),
        (dict(max_basis=K + 2), "max_basis must be at least num_eigenpairs \\+ 3 = 11, got 10"),
        (dict(start=np.zeros(N)), "start vector must be finite and not zero; its norm is 0"),
        (dict(start=np.full(N, np.nan)), "start vector must be finite and not zero"),
    ],
)
def test_bad_arguments(changed, message):
    arguments = dict(
        start=random_array(0), num_eigenpairs=K, dot=np.dot, tol=1e-6, max_matvecs=100
    )
    with pytest.raises(ValueError, match=message):
        lanczos(lambda v: v, **(arguments | changed))


@pytest.mark.parametrize("name", ["gpt", "repeated"])
def test_resumed_run_ends_with_the_same_bits(name):
    # "gpt" passes restarts on the way, "repeated" invariant subspaces.
    matrix = dense(spectrum(name))
    states = []

    def run(**more):
        return lanczos(
            lambda v: matrix @ v,
            random_array(0),
            K,
            dot=np.dot,
            tol=1e-8,
            max_matvecs=300,
            max_basis=K + 6,
            random_vector=random_array,
            **more,
        )

    whole = run(on_step=lambda state: states.append(copy.deepcopy(state)))
    assert [state.num_matvecs for state in states] == list(range(1, len(states) + 1))
    for state in states[::5] + states[-1:]:
        resumed = run(state=copy.deepcopy(state))
        assert resumed.num_matvecs == whole.num_matvecs
        np.testing.assert_array_equal(resumed.eigenvalues, whole.eigenvalues)
        np.testing.assert_array_equal(resumed.residuals, whole.residuals)
        np.testing.assert_array_equal(resumed.eigenvectors, whole.eigenvectors)


class Shards:
    """A vector in two parts that can be added, subtracted and scaled; counts those alive."""

    alive = most = 0

    def __init__(self, *parts):
        self.parts = parts
        Shards.alive += 1
        Shards.most = max(Shards.most, Shards.alive)

    def __del__(self):
        Shards.alive -= 1

    def __add__(self, other):
        return Shards(*(a + b for a, b in zip(self.parts, other.parts, strict=True)))

    def __sub__(self, other):
        return Shards(*(a - b for a, b in zip(self.parts, other.parts, strict=True)))

    def __rmul__(self, scalar):
        assert type(scalar) is float
        return Shards(*(scalar * a for a in self.parts))

    def dot(self, other) -> float:
        return sum(float(a @ b) for a, b in zip(self.parts, other.parts, strict=True))


def test_memory_is_bounded_and_vectors_only_add_subtract_and_scale():
    values = spectrum("gpt")
    cut = 100
    max_basis = 2 * K
    gc.collect()
    Shards.alive = Shards.most = 0
    found = lanczos(
        lambda v: Shards(values[:cut] * v.parts[0], values[cut:] * v.parts[1]),
        Shards(random_array(0)[:cut], random_array(0)[cut:]),
        K,
        dot=Shards.dot,
        tol=1e-8,
        max_matvecs=500,
        max_basis=max_basis,
    )
    assert found.num_matvecs > 2 * max_basis  # there were restarts
    assert Shards.most <= max_basis + 3 + 1  # the caller holds the start vector
    np.testing.assert_allclose(found.eigenvalues, values[:K], atol=1e-6 * values[0])


def test_all_reduces_and_injected_block_operations():
    values = spectrum("gpt")
    all_reduces = 0

    def dot(u, v):
        nonlocal all_reduces
        all_reduces += 1
        return float(u @ v)

    def block_dot(vectors, w):
        nonlocal all_reduces
        all_reduces += 1
        return np.array(vectors) @ w

    arguments = dict(tol=1e-6, max_matvecs=300)
    found = lanczos(
        lambda v: values * v,
        random_array(0),
        K,
        dot=dot,
        block_dot=block_dot,
        combine=lambda coefficients, vectors: coefficients @ np.array(vectors),
        **arguments,
    )
    assert found.converged
    assert all_reduces <= 3 * found.num_matvecs  # all included: start, steps, residuals
    plain = lanczos(lambda v: values * v, random_array(0), K, dot=np.dot, **arguments)
    np.testing.assert_allclose(found.eigenvalues, plain.eigenvalues, rtol=1e-10)
