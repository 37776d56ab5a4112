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
    assert share.leads
    for found in (share.gathered(values), share.scattered(values, 2), share.summed(values)):
        np.testing.assert_array_equal(found, values)
    assert share.from_leader(lambda whole: whole.sum(), values) == values.sum()


@pytest.mark.parametrize("stretch", [1 << 20, 7])
@pytest.mark.parametrize("ranks", [2, 3])
def test_what_is_gathered_scattered_and_summed_is_that_of_all(ranks, stretch, monkeypatch):
    monkeypatch.setattr("megatron_direct.selection.share.STRETCH", stretch)
    rng = np.random.default_rng(ranks)
    values = rng.standard_normal((2, 50))
    held = rng.random(50) < 0.6
    shares, meeting = uneven_shares(50, ranks, rng), ThreadRanks(ranks)

    def work(rank):
        ids = rng.permutation(shares[rank]) if rank == 0 else shares[rank]
        share = Share.of_rank(len(ids), ids, lambda array: meeting.all_reduce_sum(rank, array))
        some = share.of(held[ids])
        own = share.scattered(values if share.leads else None, 2)
        np.testing.assert_array_equal(own, values[:, ids])
        ends = np.cumsum(share.sums_of_stretches(values[0, ids]))
        return (share, share.gathered(values[:, ids]), some.gathered(values[:, some.ids]),
                share.summed(values[:, ids].sum(1)), ends,
                share.stretch_of(values[0, ids], len(ends) - 1),
                share.from_leader(lambda whole: float(whole[7]), values[0, ids]))

    results = meeting.run(work)
    assert sum(share.leads for share, *_ in results) == 1
    for share, all_values, some_values, total, ends, last, seventh in results:
        assert share.num_samples == 50
        assert (all_values is None) == (some_values is None) == (not share.leads)
        if share.leads:
            np.testing.assert_array_equal(all_values, values)
            np.testing.assert_array_equal(some_values, np.where(held, values, 0.0))
        # 1e-12: summed in another order.
        np.testing.assert_allclose(total, values.sum(1), rtol=1e-12)
        np.testing.assert_allclose(ends, np.cumsum(values[0])[
            [*range(stretch - 1, 49, stretch), 49]], rtol=1e-12)
        np.testing.assert_array_equal(last, values[0, (len(ends) - 1) * stretch:])
        assert seventh == values[0, 7]


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
