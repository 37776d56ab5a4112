"""What masks leave of a blend, and how often the training sees it."""

from __future__ import annotations

import numpy as np
import pytest
from indexed_files import write_dataset

from megatron_direct import SampleMask
from megatron_direct.data.blend_plan import (
    Blend,
    BlendRules,
    Demand,
    num_sequences_in,
    plan_blend,
    require_something_left,
)
from megatron_direct.data.indexed import dataset_digest
from megatron_direct.errors import UserError


@pytest.fixture
def blend(tmp_path):
    """a: documents of 10 and 30 tokens, the second in two sequences; b: 4 documents of 5."""
    a = write_dataset(tmp_path / "a", [[[1] * 10], [[2] * 10, [3] * 20]])
    b = write_dataset(tmp_path / "b", [[[4] * 5] for _ in range(4)])
    return a, b


def _mask(prefix, keep):
    return SampleMask(np.array(keep, dtype=bool), dataset_digest(prefix))


def _plan(prefixes, weights, masks, share=(0.0, 1.0), **rules):
    return plan_blend(Blend(prefixes, weights), masks, Demand(4, 10, share), BlendRules(**rules))


def test_parts_count_what_is_left(blend):
    a, b = blend
    parts = _plan(blend, [1.0, 3.0], {a: _mask(a, [0, 1])})
    assert [(p.documents, p.tokens, p.masked) for p in parts] == [(1, 30, True), (4, 20, False)]
    assert [p.weight for p in parts] == [0.25, 0.75]
    # 10 sequences of 4 tokens are 40 tokens: 10 of a's 30, 30 of b's 20.
    assert [p.epochs for p in parts] == pytest.approx([10 / 30, 30 / 20])
    assert num_sequences_in(parts, 4) == 29 // 4 + 19 // 4


def test_weights_are_kept_or_rescaled_to_the_tokens_left(blend):
    a, b = blend
    masks = {a: _mask(a, [1, 0]), b: _mask(b, [1, 1, 0, 0])}  # a quarter, and a half
    kept = _plan(blend, [1.0, 1.0], masks, blend_weights="keep")
    assert [p.weight for p in kept] == [0.5, 0.5]
    rescaled = _plan(blend, [1.0, 1.0], masks, blend_weights="tokens")
    assert [p.weight for p in rescaled] == pytest.approx([1 / 3, 2 / 3])
    for rule in ("keep", "tokens"):  # without weights, tokens count under either
        parts = _plan(blend, None, masks, blend_weights=rule)
        assert [p.weight for p in parts] == [0.5, 0.5]
        assert parts[0].epochs == pytest.approx(parts[1].epochs)


def test_a_prefix_with_nothing_left_is_dropped_and_its_weight_shared_out(blend, tmp_path):
    a, b = blend
    c = write_dataset(tmp_path / "c", [[[5] * 8]])
    with pytest.warns(UserWarning, match="b is left out of the blend: its mask keeps no document"):
        parts = _plan([a, b, c], [1.0, 2.0, 1.0], {b: _mask(b, [0] * 4)})
    assert [(p.prefix, p.weight) for p in parts] == [(a, 0.5), (c, 0.5)]


def test_a_blend_with_nothing_left_is_refused(blend):
    masks = {prefix: _mask(prefix, [0] * n) for prefix, n in zip(blend, (2, 4), strict=True)}
    with pytest.raises(UserError, match="keep no document in any dataset of the blend .*Select m"):
        _plan(blend, [1.0, 1.0], masks)


def test_epochs_of_masked_prefixes_are_limited(blend):
    a, b = blend
    masks = {a: _mask(a, [1, 0])}
    _plan(blend, [1.0, 1.0], masks, max_epochs=2.0)  # 20 tokens of 10
    with pytest.raises(UserError, match=r"more often than --max-epochs 1.9: .*a 2.00 times. Sel"):
        _plan(blend, [1.0, 1.0], masks, max_epochs=1.9)
    _plan(blend, [0.01, 1.0], masks, max_epochs=1.9)  # b has no mask: 1.98 epochs are its own


def test_a_split_takes_its_part_of_a_prefix(blend):
    a, b = blend
    part, = _plan([b], None, {b: _mask(b, [1, 0, 1, 1])}, share=(0.0, 0.5))
    assert (part.documents, part.tokens) == (1, 5)
    second = Demand(4, 0, (0.5, 1.0))
    require_something_left(Blend([b]), {b: _mask(b, [1, 0, 1, 1])}, second, "valid")
    with pytest.raises(UserError, match="keeps no document in the valid split of --split, or"):
        require_something_left(Blend([b]), {b: _mask(b, [1, 1, 0, 0])}, second, "valid")


def test_without_weights_less_than_a_sequence_is_nothing(blend):
    """Of b's documents of five tokens one is left. As one of several, Megatron makes a dataset of a
    sequence's length and one token more of it, or none at all."""
    a, b = blend
    mask = {b: _mask(b, [1, 0, 0, 0])}

    def plan(weights, seq_length, **rules):
        return [part.prefix for part in plan_blend(
            Blend([a, b], weights), mask, Demand(seq_length, 10), BlendRules(**rules))]

    assert plan(None, 4) == plan([1, 1], 5) == plan(None, 5, blend_weights="tokens") == [a, b]
    with pytest.warns(UserWarning, match="b is left out .*: its mask keeps less than a sequence"):
        assert plan(None, 5) == [a]
    whole = (0.0, 1.0)
    require_something_left(Blend([b]), mask, Demand(5, 0, whole), "valid")
    with pytest.raises(UserError, match="the valid split of --split, or less than a sequence"):
        require_something_left(Blend([a, b]), mask, Demand(5, 0, whole), "valid")


def test_a_prefix_listed_twice_is_refused_under_any_name(blend, tmp_path):
    a, _ = blend
    with pytest.raises(UserError, match="a is listed twice in the blend. List each"):
        _plan([a, a], None, {})
    again = str(tmp_path / "." / "x" / ".." / "a")
    with pytest.raises(UserError, match=rf"{again} is listed twice in the blend \(also as {a}\)"):
        _plan([a, again], None, {})


def test_a_mask_of_another_dataset_is_refused(blend):
    a, b = blend
    with pytest.raises(UserError, match="a has .*: it is a different dataset"):
        _plan(blend, None, {a: _mask(b, [1] * 4)})


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -0.5])
def test_a_weight_that_is_no_share_is_refused(weight):
    with pytest.raises(UserError, match="gives b the weight .*: it must be a finite number"):
        Blend(["a", "b"], [1.0, weight])


@pytest.mark.parametrize(("weights", "total"), [([0.0, 0.0], "0.0"), ([1e308, 1e308], "inf")])
def test_weights_that_cannot_be_shares_are_refused(weights, total):
    with pytest.raises(UserError, match=f"weights of the blend sum to {total}"):
        Blend(["a", "b"], weights)
