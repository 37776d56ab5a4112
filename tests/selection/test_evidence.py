"""Stiff costs and flat parts by their definitions, over more than one block of rows."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_direct.curvature.spectrum import Directions
from megatron_direct.errors import UserError
from megatron_direct.selection.evidence import flat_rows, stiff_costs

DIM, COUNT = 10, 1100  # blocks are of 512 rows


@pytest.fixture
def rows() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((COUNT, DIM)).astype(np.float32)


@pytest.fixture
def directions() -> Directions:
    """Two stiff and two further ones, the last of negative curvature; none orthonormal."""
    sketches = np.random.default_rng(1).standard_normal((4, DIM))
    return Directions(np.array([4.0, 2.0, 0.5, -1.0]), sketches, 2)


def test_stiff_costs_written_out(rows, directions):
    stiff = directions.sketches
    expected = [4.0 * (row @ stiff[0]) ** 2 + 2.0 * (row @ stiff[1]) ** 2
                for row in rows.astype(np.float64)]
    # 1e-12: float64 sums in another order.
    np.testing.assert_allclose(stiff_costs(rows, directions), expected, rtol=1e-12)


def test_the_complement_is_what_least_squares_leaves(rows, directions):
    stiff = directions.sketches[:2].T
    part = stiff @ np.linalg.lstsq(stiff, rows.T.astype(np.float64), rcond=None)[0]
    found = flat_rows(rows, directions, "complement")
    assert found.dtype == np.float32
    # 1e-6: the result is rounded to float32.
    np.testing.assert_allclose(found, rows - part.T, atol=1e-6)


def test_the_bulk_is_the_part_along_further_positive_directions(rows, directions):
    bulk = directions.sketches[2:3].T
    part = bulk @ np.linalg.lstsq(bulk, rows.T.astype(np.float64), rcond=None)[0]
    np.testing.assert_allclose(flat_rows(rows, directions, "bulk"), part.T, atol=1e-6)


def test_a_bulk_of_nothing_is_refused(rows, directions):
    none = Directions(directions.eigenvalues[[0, 1, 3]], directions.sketches[:3], 2)
    with pytest.raises(UserError, match="--flat-subspace bulk.*has a positive eigenvalue. Raise"):
        flat_rows(rows, none, "bulk")
