"""Shares of samples: what is gathered and summed is that of all samples."""

from __future__ import annotations

import numpy as np
import pytest
from selection.test_spread_selection import ThreadRanks, uneven_shares

from megatron_direct.selection.share import Share


def test_one_rank_holds_all():
    share = Share.of_rank(4)
    values = np.arange(8.0).reshape(2, 4)
    assert share.num_samples == 4
    for found in (share.gathered(values), share.here(values), share.summed(values)):
        np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize("ranks", [2, 3])
def test_gathered_and_summed_values_are_those_of_all(ranks):
    rng = np.random.default_rng(ranks)
    values = rng.standard_normal((2, 50))
    held = rng.random(50) < 0.6
    shares, meeting = uneven_shares(50, ranks, rng), ThreadRanks(ranks)

    def work(rank):
        ids = shares[rank]
        share = Share.of_rank(len(ids), ids, lambda array: meeting.all_reduce_sum(rank, array))
        some = share.of(held[ids])
        np.testing.assert_array_equal(share.here(values), values[:, ids])
        return (share.num_samples, share.gathered(values[:, ids]),
                some.gathered(values[:, some.ids]), share.summed(values[:, ids].sum(1)))

    for count, all_values, some_values, total in meeting.run(work):
        assert count == 50
        np.testing.assert_array_equal(all_values, values)
        np.testing.assert_array_equal(some_values, np.where(held, values, 0.0))
        # 1e-12: summed in another order.
        np.testing.assert_allclose(total, values.sum(1), rtol=1e-12)


def test_part_of_the_samples_on_one_rank():
    held = np.array([True, False, True])
    some = Share.of_rank(3).of(held)
    np.testing.assert_array_equal(some.gathered(np.array([5.0, 7.0])), [5.0, 0.0, 7.0])


@pytest.mark.parametrize("ids", [
    [np.array([0, 1]), np.array([1, 2])], [np.array([0, 4]), np.array([1, 2])],
    [np.array([0.0, 3.0]), np.array([1, 2])], [np.array([0]), np.array([1, 2])],
])
def test_wrong_ids_raise_on_every_rank(ids):
    meeting = ThreadRanks(2)

    def work(rank):
        with pytest.raises(ValueError, match="the integers 0 to 3, each once"):
            Share.of_rank(2, ids[rank], lambda array: meeting.all_reduce_sum(rank, array))

    meeting.run(work)


def test_ids_and_collective_come_together():
    with pytest.raises(ValueError, match="both sample_ids and all_reduce_sum; leave both out"):
        Share.of_rank(2, np.arange(2))
