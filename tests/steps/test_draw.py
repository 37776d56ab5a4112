"""What of a selection was kept and what was drawn, counted on a few samples by hand."""

from __future__ import annotations

import numpy as np
import pytest
from indexed_files import write_dataset

from megatron_direct.data.samples import Samples
from megatron_direct.selection.stability import Repeating
from megatron_direct.steps.draw import DrawnOf, find_draw

# Documents of 2 tokens have one label, those of 4 have 3; one of a single token is no sample.
LENGTHS = {"a": [2, 2, 4, 1, 4], "b": [4, 2, 2]}
CANDIDATES = np.array([0, 1, 2, 4, 5, 6, 7])
CLUSTERS = np.array([0, 0, 1, 1, 2, 2, 2])
SELECTED = np.array([1, 1, 1, 0, 1, 1, 0], dtype=bool)
AGAIN = np.array([1, 0, 1, 0, 1, 0, 0], dtype=bool)


@pytest.fixture
def samples(tmp_path):
    return Samples([write_dataset(tmp_path / name, [[list(range(1, n + 1))] for n in lengths])
                    for name, lengths in LENGTHS.items()], seq_length=8, vocab_size=16)


def test_samples_and_tokens_are_counted_in_all_by_pool_and_by_cluster(samples):
    found = find_draw(samples, CANDIDATES, SELECTED, Repeating(AGAIN, CLUSTERS, True))
    assert found.numbers.tolist() == [1, 6]
    draw = found.draw
    assert draw.whole == DrawnOf(candidates=7, selected=5, repeated=3, drawn=2)
    assert draw.pools == {"a": DrawnOf(4, 3, 2, 1), "b": DrawnOf(3, 2, 1, 1)}
    assert draw.clusters == {"a-c0": DrawnOf(2, 2, 1, 1), "a-c1": DrawnOf(2, 1, 1, 0),
                             "b-c2": DrawnOf(3, 2, 1, 1)}
    # Labels of the selected: 1, 1, 3 of the first pool and 3, 1 of the second.
    assert (draw.repeated_tokens, draw.drawn_tokens) == (7 / 9, 2 / 9)
    assert str(draw) == ("draw: 3 kept (78% of the tokens), 2 drawn at random within their "
                         "clusters (22%)")


def test_a_selection_that_stays_as_it_was_solved_says_what_repeats(samples):
    found = find_draw(samples, CANDIDATES, SELECTED, Repeating(AGAIN, CLUSTERS, False))
    assert found.numbers.tolist() == [] and found.draw.whole == DrawnOf(7, 5, 3, 0)
    assert str(found.draw) == ("draw: all 5 kept as solved, of which both halves of the evidence "
                               "select 3 again (78% of the tokens)")


def test_what_was_predicted_counts_as_drawn(samples):
    found = find_draw(samples, CANDIDATES, SELECTED, Repeating(AGAIN, CLUSTERS, True)
                      ).with_predicted(np.array([3]))
    assert sorted(found.numbers.tolist()) == [1, 3, 6] and found.draw.predicted == 1
    assert str(found.draw).endswith("; 1 without a gradient drawn by predicted chances")
