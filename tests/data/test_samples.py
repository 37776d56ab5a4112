"""Samples and their micro-batches."""

from __future__ import annotations

import numpy as np
import pytest
from indexed_files import random_documents, write_dataset

from megatron_direct.data.samples import Cut, MicroBatchLimits, PassShape, Samples, micro_batches
from megatron_direct.errors import UserError


@pytest.fixture
def samples(tmp_path):
    first = write_dataset(tmp_path / "a", [[[1, 2, 3]], [[4]], [[5, 6], [7, 8, 9, 10]]])
    second = write_dataset(tmp_path / "b", [[[11, 12]]])
    return Samples([first, second], seq_length=4, vocab_size=16)


def test_what_is_cut_and_what_is_too_short_is_counted(samples):
    assert len(samples) == 4
    np.testing.assert_array_equal(samples.num_labels, [2, 0, 4, 1])
    np.testing.assert_array_equal(samples.usable, [0, 2, 3])
    assert (samples.num_unusable, samples.cut) == (1, Cut(1, 1))
    np.testing.assert_array_equal(samples.tokens(2), [5, 6, 7, 8, 9])
    np.testing.assert_array_equal(samples.dataset_of(np.array([0, 2, 3])), [0, 0, 1])


def test_a_micro_batch_holds_shifted_tokens_and_masks_the_padding(samples):
    (batch,), = samples.passes(samples.usable, PassShape(MicroBatchLimits(4)))
    np.testing.assert_array_equal(batch.samples, [2, 0, 3])  # by length
    np.testing.assert_array_equal(batch.tokens.numpy(), [
        [5, 6, 7, 8], [1, 2, 0, 0], [11, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.labels.numpy(), [
        [6, 7, 8, 9], [2, 3, 0, 0], [12, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.loss_mask.sum(1).numpy(), [4, 2, 1, 0])
    np.testing.assert_array_equal(batch.num_labels.numpy(), [4, 2, 1, 1])


@pytest.mark.parametrize("num_shares", [1, 2, 3])
def test_shares_divide_the_same_micro_batches(tmp_path, num_shares):
    prefix = write_dataset(tmp_path / "c", random_documents(31, 50))
    samples = Samples([prefix], seq_length=16)

    def micro_batches(shares):
        return {tuple(batch.samples) for share in range(shares)
                for group in samples.passes(samples.usable, PassShape(
                    MicroBatchLimits(4), 2, share, shares))
                for batch in group if len(batch.samples)}

    assert micro_batches(num_shares) == micro_batches(1)
    assert sorted(n for batch in micro_batches(num_shares) for n in batch) == \
        samples.usable.tolist()


def test_a_pass_has_one_shape_and_is_filled_up(tmp_path):
    prefix = write_dataset(tmp_path / "c", random_documents(22, 50))
    samples = Samples([prefix], seq_length=16)
    shape = PassShape(MicroBatchLimits(4), 4, count_multiple=2, length_multiple=3)
    for group in samples.passes(samples.usable, shape):
        assert len(group) % 2 == 0
        assert len({tuple(batch.tokens.shape) for batch in group}) == 1
        assert group[0].tokens.shape[1] % 3 == 0


@pytest.mark.parametrize("num_shares", [1, 2, 3])
def test_shares_in_step_have_equal_passes(tmp_path, num_shares):
    prefix = write_dataset(tmp_path / "c", random_documents(22, 50))
    samples = Samples([prefix], seq_length=16)
    shares = [list(samples.passes(samples.usable, PassShape(
        MicroBatchLimits(6, 24), 2, share, num_shares, in_step=True)))
              for share in range(num_shares)]
    for passes in zip(*shares, strict=True):
        assert len({(len(group), tuple(batch.tokens.shape)) for group in passes
                    for batch in group}) == 1
    numbers = [n for passes in shares for group in passes for batch in group for n in batch.samples]
    assert sorted(numbers) == samples.usable.tolist()


def test_what_is_done_leaves_its_place_empty_and_the_others_as_they_were(tmp_path):
    prefix = write_dataset(tmp_path / "c", random_documents(30, 50))
    samples = Samples([prefix], seq_length=16)
    shape = PassShape(MicroBatchLimits(4), 2)
    whole = list(samples.passes(samples.usable, shape))
    done = np.zeros(len(samples), dtype=bool)
    for batch in whole[0]:
        done[batch.samples] = True  # a whole pass
    done[whole[1][1].samples[1:]] = True  # and a part of a micro-batch
    left = list(samples.passes(samples.usable, shape, done))
    assert len(left) == len(whole) - 1
    assert left[0][1].samples.tolist() == whole[1][1].samples[:1].tolist()
    assert left[0][0].samples.tolist() == whole[1][0].samples.tolist()
    for before, after in zip(whole[1:], left, strict=True):
        assert [b.tokens.shape for b in before] == [b.tokens.shape for b in after]
    numbers = [n for group in left for batch in group for n in batch.samples]
    assert sorted(numbers) == np.flatnonzero(~done).tolist()


def test_a_token_outside_the_vocabulary_names_its_dataset(samples):
    samples.vocab_size = 12
    with pytest.raises(UserError, match=r"b holds token 12, but the model's vocabulary has 12"):
        samples.tokens(3)


def test_a_dataset_listed_twice_is_refused(samples):
    with pytest.raises(UserError, match="is listed twice"):
        Samples([samples.prefixes[0]] * 2, seq_length=4)


def test_a_token_below_zero_is_refused(tmp_path):
    prefix = write_dataset(tmp_path / "negative", [[[1, -2, 3]]])
    with pytest.raises(UserError, match="negative holds token -2"):
        Samples([prefix], seq_length=4, vocab_size=16).tokens(0)


def test_stretches_are_sorted_by_length_in_turns(monkeypatch):
    """Each sample once, in micro-batches of one stretch, whatever the stretch."""
    monkeypatch.setattr("megatron_direct.data.samples._STRETCH", 20)
    lengths = np.random.default_rng(0).integers(1, 50, 70)
    numbers = np.flatnonzero(lengths > 3)
    found = [batch for _, batch in micro_batches(lengths, numbers, MicroBatchLimits(8))]
    assert sorted(np.concatenate(found)) == numbers.tolist()
    assert [len(batch) for batch in found[:-1]] == [8] * (len(found) - 1)
    for first in range(0, len(found), 2):  # 16 = 2 x 8 is the stretch that 20 leaves room for
        stretch = np.concatenate(found[first: first + 2])
        assert sorted(stretch) == numbers[first * 8: first * 8 + 16].tolist()
        order = np.lexsort((np.sort(stretch), lengths[np.sort(stretch)]))
        expected = np.sort(stretch)[order]
        np.testing.assert_array_equal(stretch, expected if first // 2 % 2 else expected[::-1])


@pytest.mark.parametrize("tokens", [1, 30, 100, 333])
def test_micro_batches_hold_no_more_positions_than_asked(tmp_path, tokens):
    """Padding included, and each sample once; in passes of one shape, the same for all shares."""
    rng = np.random.default_rng(tokens)
    prefix = write_dataset(tmp_path / "of-all-lengths", [
        [rng.integers(0, 60, length)] for length in rng.integers(2, 90, 300)])
    samples = Samples([prefix], seq_length=64)
    limits = MicroBatchLimits(24, tokens)
    planned = list(micro_batches(samples.num_labels, samples.usable, limits))
    assert sorted(np.concatenate([ids for _, ids in planned])) == samples.usable.tolist()
    wasted = 0
    for size, ids in planned:
        longest = int(samples.num_labels[ids].max())
        assert len(ids) <= size <= 24 and (size == 1 or size * longest <= tokens)
        wasted += tokens - size * longest if size < 24 else 0
    if tokens > 64:  # three binary digits lose a fifth at most, whole samples some more
        assert wasted < 0.35 * tokens * len(planned)

    of_shares = [list(samples.passes(samples.usable, PassShape(limits, 2, share, 3)))
                 for share in range(3)]
    seen = [number for passes in of_shares for one in passes for batch in one
            for number in batch.samples]
    assert sorted(seen) == samples.usable.tolist()
    for passes in of_shares:
        for one in passes:
            assert len({batch.tokens.shape for batch in one}) == 1
            assert all(len(batch.samples) <= len(batch.tokens) for batch in one)


def test_without_a_limit_of_tokens_all_micro_batches_are_alike():
    lengths = np.random.default_rng(0).integers(1, 50, 70)
    planned = list(micro_batches(lengths, np.arange(70), MicroBatchLimits(8)))
    assert [(size, len(ids)) for size, ids in planned] == [(8, 8)] * 8 + [(8, 6)]
