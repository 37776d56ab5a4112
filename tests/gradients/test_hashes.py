"""Count sketches by tables of indices, and sums of frames, against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_direct.gradients.hashes import HASH_VERSION, Hashes, folded
from megatron_direct.gradients.kernels.kept_axis import count_sketch_by_product
from megatron_direct.mcore.shards import ParameterShard

SIZE = 32


def _hashes(rows, columns, of_vocabulary=True) -> Hashes:
    """Of k buckets on both axes, but for those of a layer that is not the vocabulary's."""
    shape = (max(rows) + 1, max(columns) + 1)
    shard = ParameterShard("w", torch.nn.Parameter(torch.zeros(len(rows), len(columns))),
                           torch.as_tensor(rows), torch.as_tensor(columns), shape, True, True,
                           of_vocabulary=of_vocabulary)
    return Hashes.draw(shard, SIZE, seed=4)


def _definition(axis, values: np.ndarray) -> np.ndarray:
    """Number i of the last dimension is added to bucket h(i), with sign s(i)."""
    sums = np.zeros((*values.shape[:-1], axis.size))
    for i, (bucket, sign) in enumerate(zip(axis.buckets, axis.signs, strict=True)):
        sums[..., int(bucket)] += float(sign) * values[..., i]
    return sums


# Below, at and above k, several blocks, and the rows of a tensor-parallel rank: scattered over
# blocks, in no order, so that a narrow axis has two indices in one bucket.
@pytest.mark.parametrize("indices", [
    range(5), range(SIZE), range(SIZE + 1), range(3 * SIZE + 7),
    [80, 3, 81, 4, 82, 5], [0, 32, 64, 96, 128]], ids=str)
@pytest.mark.parametrize("of_vocabulary", [True, False])
def test_count_sketches(indices, of_vocabulary):
    generator = torch.Generator().manual_seed(0)
    hashes = _hashes(indices, range(4), of_vocabulary)
    size = 2 if not of_vocabulary else SIZE
    assert hashes.rows.size == size and (hashes.narrowed is hashes.rows) == (not of_vocabulary)
    values = torch.randn(4, 3, len(indices), generator=generator)
    truth = _definition(hashes.rows, values.double().numpy())
    rounding = {"rtol": 1e-6, "atol": 1e-6}  # of sums of some float32 numbers
    np.testing.assert_allclose(hashes.rows.count_sketch(values), truth, **rounding)
    places = torch.empty(3, 4, size).transpose(0, 1)
    hashes.rows.write_count_sketch(values, places)
    np.testing.assert_allclose(places, truth, **rounding)
    in_bf16 = values.bfloat16()
    assert torch.equal(count_sketch_by_product(hashes.rows, in_bf16),
                       hashes.rows.count_sketch(in_bf16))
    of_rows = truth.swapaxes(1, 2)
    np.testing.assert_allclose(hashes.rows.count_sketch_of_rows(values.mT), of_rows, **rounding)
    sums = torch.ones(4, size, 3)
    hashes.rows.add_count_sketch_of_rows(sums, values.mT.clone())
    np.testing.assert_allclose(sums - 1, of_rows, **rounding)


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
    np.testing.assert_allclose(hashes.of_vector.count_sketch(values), truth, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("rows", "columns"), [
    (1, 1), (2, 2), (7, 7), (16, 16), (16, 2), (2, 16), (7, 1), (1, 7), (9, 8)])
def test_frames_are_summed_along_their_coordinates(rows, columns):
    size = max(rows, columns)
    frames = torch.randn(3, rows, columns, generator=torch.Generator().manual_seed(0))
    truth = np.zeros((3, size))
    for row in range(rows):
        for column in range(columns):
            truth[:, (row + column) % size] += frames[:, row, column].double().numpy()
    np.testing.assert_allclose(folded(frames), truth, atol=1e-5)


def _numbers_of_buckets(rows, columns, **named):
    hashes = _hashes(range(rows), range(columns), **named)
    return hashes.rows.size, hashes.columns.size


def test_the_longer_axis_of_a_layer_has_a_sixteenth_of_the_buckets():
    assert _numbers_of_buckets(20, 5, of_vocabulary=False) == (2, 32)
    assert _numbers_of_buckets(5, 20, of_vocabulary=False) == (32, 2)
    assert _numbers_of_buckets(4, 4, of_vocabulary=False) == (32, 2)
    assert _numbers_of_buckets(20, 3, of_vocabulary=False) == (32, 32), "a short side"
    assert _numbers_of_buckets(20, 1, of_vocabulary=False) == (32, 32), "a vector"
    assert _numbers_of_buckets(20, 5) == (32, 32), "the vocabulary's"


def test_what_version_2_of_the_hash_is():
    """Where this fails, rows of before cannot be used: raise HASH_VERSION with the change."""
    assert HASH_VERSION == 2
    hashes = _hashes(range(6), range(9), of_vocabulary=False)
    assert hashes.rows.buckets.tolist() == [10, 19, 7, 8, 31, 22]
    assert hashes.columns.buckets.tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 1]
    assert hashes.rows.signs.tolist() == [-1, 1, -1, -1, -1, 1]
    assert hashes.columns.signs.tolist() == [-1, -1, 1, -1, 1, 1, -1, -1, -1]


def test_a_rank_has_the_buckets_of_the_whole_matrix():
    """Its own part may be longer along the other axis."""
    whole = _hashes(range(20), range(12), of_vocabulary=False)
    part = Hashes.draw(ParameterShard("w", torch.nn.Parameter(torch.zeros(5, 12)),
                                      torch.arange(5, 10), torch.arange(12), (20, 12), True, True),
                       SIZE, seed=4)
    assert torch.equal(part.rows.buckets, whole.rows.buckets[5:10]) and part.rows.size == 2
    assert torch.equal(part.columns.buckets, whole.columns.buckets)
