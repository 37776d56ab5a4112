"""How much of a choice repeats, where it is known how much should."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from written_texts import written

from megatron_direct.comparison import rivals  # noqa: F401  (registers its arms)
from megatron_direct.comparison.arms import REGISTRY, Case
from megatron_direct.comparison.repeats import repeats_of
from megatron_direct.curvature.spectrum import Directions
from megatron_direct.selection.config import SelectionConfig
from megatron_direct.selection.evidence import Evidence
from megatron_direct.selection.worth import source_blocks

N, M, SIZE, K = 400, 32, 256, 100


def _case(helpful: float) -> Case:
    """A quarter of the pool points where the validation set does, by so much of its length; all
    else is noise. The signal is spread over all coordinates, so that each half has it."""
    rng = np.random.default_rng(0)
    target = rng.choice([-1.0, 1.0], SIZE) / np.sqrt(SIZE)
    noise = rng.standard_normal((N + M, SIZE)) / np.sqrt(SIZE)
    helps = np.concatenate([np.arange(N) < K, np.ones(M, bool)])
    rows = noise + helpful * helps[:, None] * target
    directions = Directions(np.ones(1), target[None], 1)
    evidence = Evidence(rows[:N].astype(np.float32), np.full(N, 9), np.zeros(N, np.int64), 1,
                        np.arange(N), rows[N:].astype(np.float32), directions)
    return Case({"onset": evidence, "select": evidence}, rng.uniform(1, 5, N), np.full(N, "a"),
                np.zeros(N, bool), np.full(M, "a"), np.full(M, 9), K, 0,
                SelectionConfig(num_select=K))


@pytest.mark.parametrize("name", ["gradient-cosine", "direct"])
def test_a_signal_repeats(name):
    found = repeats_of(REGISTRY[name], _case(3.0), K)
    assert found.samples > 0.97
    assert found.by_chance == K / N


@pytest.mark.parametrize("name", ["gradient-cosine", "gradient-dot", "direct"])
def test_noise_repeats_as_chance_has_it(name):
    """Two random selections share K / N = 25 of 100, with a standard deviation of 3.7; half of a
    gradient says nothing about the other half."""
    found = repeats_of(REGISTRY[name], _case(0.0), K)
    assert abs(found.samples - found.by_chance) < 4 * 0.037


def test_where_nothing_is_asked_nothing_repeats():
    case = _case(1.0)
    for name in ("random", "perplexity-low", "domain"):
        assert repeats_of(REGISTRY[name], case, K) is None
    assert repeats_of(REGISTRY["direct"], case, N) is None


def test_text_is_likened_to_half_of_the_validation_set():
    """Every other block of the validation set is of one kind of text, and the rest of another: each
    half chooses its own."""
    case, rng = _case(1.0), np.random.default_rng(1)
    even = source_blocks(case.evidence["onset"]) % 2 == 0
    pool = [rng.integers(0, 40, 30) + 50 * (number % 2) for number in range(N)]
    valid = [rng.integers(0, 40, 30) + 50 * kind for kind in even]
    evidence = dataclasses.replace(case.evidence["onset"], texts=written(pool, valid))
    case = dataclasses.replace(case, evidence={"onset": evidence})
    assert repeats_of(REGISTRY["ngrams"], case, K).samples == 0.0
