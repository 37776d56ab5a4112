"""Count sketches by tables of indices, and sums of frames, against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_direct.gradients.hashes import Hashes, folded
from megatron_direct.mcore.shards import ParameterShard

SIZE = 16


def _hashes(rows, columns) -> Hashes:
    shard = ParameterShard("w", torch.nn.Parameter(torch.zeros(len(rows), len(columns))),
                           torch.as_tensor(rows), torch.as_tensor(columns), True, True)
    return Hashes.draw(shard, SIZE, seed=4)


def _definition(axis, values: np.ndarray) -> np.ndarray:
    """Number i of the last dimension is added to bucket h(i), with sign s(i)."""
    sums = np.zeros((*values.shape[:-1], SIZE))
    for i, (bucket, sign) in enumerate(zip(axis.buckets, axis.signs, strict=True)):
        sums[..., int(bucket)] += float(sign) * values[..., i]
    return sums


# Below, at and above k, several blocks, and the rows of a tensor-parallel rank: scattered over
# blocks, in no order, so that a narrow axis has two indices in one bucket.
@pytest.mark.parametrize("indices", [
    range(5), range(SIZE), range(SIZE + 1), range(3 * SIZE + 7),
    [40, 3, 41, 4, 42, 5], [0, 16, 32, 48, 64]], ids=str)
def test_count_sketches(indices):
    generator = torch.Generator().manual_seed(0)
    hashes = _hashes(indices, range(3))
    values = torch.randn(4, 3, len(indices), generator=generator)
    truth = _definition(hashes.rows, values.double().numpy())
    # Sums of a few float32 numbers.
    np.testing.assert_allclose(hashes.rows.count_sketch(values), truth, atol=1e-6)
    places = torch.empty(3, 4, SIZE).transpose(0, 1)
    hashes.rows.write_count_sketch(values, places)
    np.testing.assert_allclose(places, truth, atol=1e-6)
    np.testing.assert_allclose(hashes.rows.count_sketch_of_rows(values.mT), truth.swapaxes(1, 2),
                               atol=1e-6)


def test_count_sketches_a_few_slices_at_a_time(monkeypatch):
    hashes = _hashes(range(40), range(3))
    values = torch.randn(7, 2, 40, generator=torch.Generator().manual_seed(0))
    whole = hashes.rows.count_sketch(values)
    monkeypatch.setattr("megatron_direct.gradients.hashes._AT_ONCE", {"cpu": 200})
    assert torch.equal(hashes.rows.count_sketch(values), whole)


def test_bfloat16_is_rounded_once():
    """Sums of a bucket's numbers are in float32, and rounded to the nearest bfloat16."""
    hashes = _hashes(range(90), range(3))
    values = torch.randn(5, 90, generator=torch.Generator().manual_seed(0)).bfloat16()
    truth = torch.from_numpy(_definition(hashes.rows, values.double().numpy()))
    found = hashes.rows.count_sketch(values)
    assert found.dtype == torch.bfloat16
    # Half a unit in the last of 8 bits, and float32's own rounding of the sums.
    assert ((found.double() - truth).abs() <= truth.abs() * 2**-8 * 1.001).all()


def test_a_vector_is_a_matrix_of_one_column():
    hashes = _hashes(range(21), [0])
    values = torch.randn(3, 21, generator=torch.Generator().manual_seed(0))
    truth = np.zeros((3, SIZE))
    for row in range(21):
        coordinate = int(hashes.rows.buckets[row] + hashes.columns.buckets[0]) % SIZE
        sign = float(hashes.rows.signs[row] * hashes.columns.signs[0])
        truth[:, coordinate] += sign * values[:, row].double().numpy()
    np.testing.assert_allclose(hashes.of_vector.count_sketch(values), truth, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 7, 16])
def test_frames_are_summed_along_their_coordinates(size):
    frames = torch.randn(3, size, size, generator=torch.Generator().manual_seed(0))
    truth = np.zeros((3, size))
    for row in range(size):
        for column in range(size):
            truth[:, (row + column) % size] += frames[:, row, column].double().numpy()
    np.testing.assert_allclose(folded(frames), truth, atol=1e-5)
