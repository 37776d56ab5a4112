"""The registry of objectives, and their quadratics against dense algebra."""

from __future__ import annotations

import dataclasses
import tracemalloc

import numpy as np
import pytest

from megatron_direct.curvature.spectrum import Directions
from megatron_direct.errors import UserError
from megatron_direct.selection import LowRank, objectives, solve_selection
from megatron_direct.selection.config import SelectionConfig
from megatron_direct.selection.evidence import Evidence
from megatron_direct.selection.objectives import OBJECTIVES, Terms, make_objective
from megatron_direct.selection.objectives.objective import Objective
from megatron_direct.selection.objectives.quadratic import Diagonal, Quadratic
from megatron_direct.selection.rows import LocalRows, Rows
from megatron_direct.selection.share import Share
from megatron_direct.selection.treatment import select_by_sketches

DIM, RANK = 12, 4


def low_rank(rng: np.random.Generator) -> tuple[LowRank, np.ndarray]:
    """Directions that are not orthonormal, one of a negative eigenvalue; and the matrix meant."""
    directions = rng.standard_normal((RANK, DIM))
    eigenvalues = np.array([3.0, 0.5, 0.01, -2.0])
    dense = sum(max(value, 0.0) * np.outer(direction, direction)
                for value, direction in zip(eigenvalues, directions, strict=True))
    return LowRank(eigenvalues, directions), dense


def quadratics(rng: np.random.Generator) -> list[tuple[Quadratic, np.ndarray, np.ndarray]]:
    """Quadratics, each with the b and the dense Q of J(s) = b.s + s.Q s / 2."""
    linear, values = rng.standard_normal(DIM), rng.uniform(0, 2, DIM)
    factored, dense = low_rank(rng)
    return [
        (Quadratic(linear, 2.0), linear, 2 * np.eye(DIM)),
        (Quadratic(linear, 0.0), linear, np.zeros((DIM, DIM))),
        (Quadratic(linear, -0.3, Diagonal(values)), linear, -0.3 * np.diag(values)),
        (Quadratic(linear, -0.3, factored), linear, -0.3 * dense),
    ]


@pytest.mark.parametrize("form", range(4))
def test_quadratics_are_those_of_the_dense_matrix(form):
    rng = np.random.default_rng(form)
    quadratic, linear, matrix = quadratics(rng)[form]
    for sums in (rng.standard_normal(DIM), rng.standard_normal((5, DIM))):
        expected = [linear @ s + 0.5 * s @ matrix @ s for s in np.atleast_2d(sums)]
        # 1e-12: a few sums of DIM terms in another order.
        np.testing.assert_allclose(np.atleast_1d(quadratic.value(sums)), expected, rtol=1e-12)
        np.testing.assert_allclose(quadratic.curve(sums), sums @ matrix, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(quadratic.gradient(sums), linear + sums @ matrix, rtol=1e-12,
                                   atol=1e-12)
    rows = rng.standard_normal((30, DIM))
    diagonal = np.diag(np.diag(matrix))
    np.testing.assert_allclose(
        quadratic.self_terms(Rows(LocalRows(rows.T), Share.of_rank(30))),
        [0.5 * row @ diagonal @ row for row in rows], rtol=1e-12, atol=1e-12)
    # 1e-9: eigenvalues of zero come out as rounding.
    assert quadratic.convex == bool(np.linalg.eigvalsh(matrix).max() > 1e-9)


@pytest.mark.parametrize("seed", range(10))
def test_descent_of_low_rank_selects_as_descent_of_its_matrix(seed):
    rng = np.random.default_rng(seed)
    factored, dense = low_rank(rng)
    rows = rng.standard_normal((200, DIM)).astype(np.float32)
    options = {"objective": "descent", "target": rng.standard_normal(DIM), "step_size": 2.0}
    found = solve_selection(rows.T, np.ones(200), 30, curvature=factored, **options)
    expected = solve_selection(rows.T, np.ones(200), 30, curvature=dense, **options)
    np.testing.assert_array_equal(found.indices, expected.indices)
    # 1e-9: both are evaluated in float64, along different products.
    assert found.objective == pytest.approx(expected.objective, rel=1e-9)


def test_low_rank_curvature_forms_no_matrix():
    dim, rank = 4096, 8
    rng = np.random.default_rng(0)
    terms = Terms(np.ones(dim), LowRank(np.ones(rank), rng.standard_normal((rank, dim))), 1.0)
    tracemalloc.start()
    try:
        quadratic = make_objective("descent", terms, dim, 10)
        quadratic.gradient(np.ones((2, dim)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # A [k, k] float64 matrix takes 128 MiB; some arrays of the size of the directions are made.
    assert peak < 20 * rank * dim * 8 < dim * dim * 8 / 20


def evidence() -> Evidence:
    rng = np.random.default_rng(5)
    vectors = np.linalg.qr(rng.standard_normal((DIM, 3)))[0].T
    return Evidence(
        rng.standard_normal((60, DIM)).astype(np.float32), rng.integers(3, 60, 60),
        np.repeat([0, 1], 30), 2, np.arange(60),
        rng.standard_normal((7, DIM)).astype(np.float32),
        Directions(np.array([5.0, 2.0, 1.0]), vectors, 2))


def test_the_flag_offers_the_registered_names():
    choices = SelectionConfig.__dataclass_fields__["objective"].metadata["choices"]
    assert tuple(choices) == tuple(OBJECTIVES) == ("flat-energy", "alignment", "descent")
    assert all(name == objective.name for name, objective in OBJECTIVES.items())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_evidence_yields_just_the_terms_that_an_objective_needs(name):
    terms = OBJECTIVES[name].terms(
        SelectionConfig(objective=name), evidence(), np.full(7, 1 / 7))
    given = {term for term in terms.names() if getattr(terms, term) is not None}
    assert given == set(OBJECTIVES[name].needs)
    for term in terms.names():
        changed = dataclasses.replace(terms, **{term: None if term in given else np.ones(DIM)})
        verb = "needs" if term in given else "does not use"
        with pytest.raises(ValueError, match=f"objective '{name}' {verb} {term}"):
            make_objective(name, changed, DIM, 5)


def test_terms_of_descent_written_out():
    known = evidence()
    terms = OBJECTIVES["descent"].terms(SelectionConfig(step_size=0.5, contrast=False), known,
                                        np.full(7, 1 / 7))
    np.testing.assert_allclose(terms.target, known.valid_rows.mean(0), atol=1e-6)  # float32 rows
    assert terms.step_size == 0.5 / 5.0
    quadratic = make_objective("descent", terms, DIM, 10)
    stiff = known.directions.sketches
    hessian = stiff.T @ np.diag([5.0, 2.0, 1.0]) @ stiff
    mean = np.arange(DIM) / DIM  # u, of which J is the predicted decrease
    predicted = 0.1 * mean @ terms.target - 0.5 * 0.1**2 * mean @ hessian @ mean
    # 1e-6: the target is a float32 mean.
    assert quadratic.value(10 * mean) == pytest.approx(predicted, rel=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
def test_the_target_in_contrast_is_the_excess_over_the_pool(normalize):
    known = evidence()
    weights = np.arange(1, 8) / 28
    target = OBJECTIVES["descent"].terms(
        SelectionConfig(normalize_gradients=normalize), known, weights).target
    rows, valid = known.rows.astype(float), known.valid_rows.astype(float)
    lengths = np.linalg.norm(valid, axis=1)
    if normalize:
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        valid = lengths.mean() * valid / lengths[:, None]
        rows = lengths.mean() * rows
    pool = rows.mean(0)
    of_rows = pool
    if normalize:  # treated rows are of the mean length of the pool's
        of_rows = pool * np.linalg.norm(known.rows, axis=1).mean() / lengths.mean()
    stiff = known.directions.sketches
    hessian = stiff.T @ np.diag([5.0, 2.0, 1.0]) @ stiff
    expected = weights @ valid - pool + hessian @ of_rows / 5.0
    np.testing.assert_allclose(target, expected, rtol=1e-5, atol=1e-6)  # float32 rows


@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_what_all_samples_share_decides_nothing_in_contrast(shift):
    """A direction that is in every gradient, of pool and validation set alike, as any data has it
    before the learning rate falls, changes no choice; without contrast it does."""
    rng = np.random.default_rng(4)
    known = evidence()
    excess = known.valid_rows.mean(0) - known.rows.mean(0)
    common = rng.standard_normal(known.rows.shape[1])
    common -= excess * (common @ excess) / (excess @ excess)
    common *= shift * np.linalg.norm(known.rows, axis=1).mean() / np.linalg.norm(common)
    known = dataclasses.replace(known, directions=dataclasses.replace(
        known.directions, eigenvalues=1e-9 * np.ones_like(known.directions.eigenvalues)))
    # Of differing strength in the samples, which alone would rank them.
    strength = rng.uniform(0.5, 1.5, len(known.rows))
    strength += 1 - strength.mean()
    moved = dataclasses.replace(
        known, rows=(known.rows + np.outer(strength, common)).astype(np.float32),
        valid_rows=(known.valid_rows + common).astype(np.float32))
    flags = {"shrinkage_clusters": 0, "normalize_gradients": False, "step_size": 1e-6,
             "valid_clusters": 0}

    def shared(contrast):
        chosen = [select_by_sketches(SelectionConfig(contrast=contrast, **flags), of, 10,
                                     seed=0)[0].indices for of in (known, moved)]
        return len(np.intersect1d(*chosen)) / 10

    assert shared(True) == 1 > shared(False)


@pytest.mark.parametrize("largest", [0.0, -1.0])
def test_descent_without_positive_curvature_is_refused(largest):
    known = evidence()
    flat = dataclasses.replace(known, directions=dataclasses.replace(
        known.directions, eigenvalues=np.array([largest, -2.0, -3.0])))
    with pytest.raises(UserError, match="1 / lambda_max, but the largest .* Choose another"):
        select_by_sketches(SelectionConfig(), flat, 5, seed=0)


def test_a_new_objective_is_one_registration(monkeypatch):
    """``needs_budget`` and ``treats_sketches`` decide, not the name."""
    first = Objective(
        name="first-coordinate", needs=(), needs_budget=False, treats_sketches=False,
        quadratic=lambda terms, dim, num_select: Quadratic(np.eye(dim)[0], 0.0),
        terms=lambda settings, evidence, valid_weights: Terms())
    monkeypatch.setitem(objectives.OBJECTIVES, first.name, first)
    known = evidence()
    found = solve_selection(known.rows.T, np.ones(60), 7, objective=first.name)
    np.testing.assert_array_equal(found.indices, np.sort(np.argsort(-known.rows[:, 0])[:7]))
    selection, _ = select_by_sketches(
        SelectionConfig(objective=first.name), known, 7, seed=0)
    stiff = known.directions.sketches[:2]
    flat = known.rows - known.rows @ stiff.T @ stiff
    np.testing.assert_array_equal(selection.indices, np.sort(np.argsort(-flat[:, 0])[:7]))
    assert selection.stiff_budget is None
