"""What the search for a ceiling begins with, draws, and makes of annealings that diverge."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from megatron_direct.comparison.arms import REGISTRY, Case
from megatron_direct.comparison.ceiling import NUM_ROUNDS, CeilingSearch, NoCeiling
from megatron_direct.comparison.mixtures import GroupMixture, num_annealings
from megatron_direct.curvature.spectrum import Directions
from megatron_direct.selection.config import SelectionConfig
from megatron_direct.selection.evidence import Evidence

N, M, SIZE, NUM_TOKENS = 60, 16, 8, 2000
IS_LONG = np.arange(N) < N // 2


@pytest.fixture
def case() -> Case:
    """Two pools, a cluster each: documents of 101 tokens, of which a sample has 11, and of 11."""
    rng = np.random.default_rng(0)
    evidence = Evidence(
        rng.standard_normal((N, SIZE)).astype(np.float32), np.full(N, 10),
        np.where(IS_LONG, 0, 1), 2, np.arange(N),
        rng.standard_normal((M, SIZE)).astype(np.float32), Directions(np.ones(1), np.eye(1, SIZE),
                                                                      1))
    return Case({"onset": evidence, "select": evidence}, np.ones(N), np.full(N, "a"),
                np.zeros(N, bool), np.full(M, "a"), np.full(M, 9), 20, 0,
                SelectionConfig(num_select=20, shrinkage_clusters=0), numbers=np.arange(N),
                uncut_labels=np.where(IS_LONG, 100, 10))


def test_shares_are_of_the_tokens_of_whole_documents(case, tmp_path):
    found = CeilingSearch(tmp_path, NUM_TOKENS).completed(case, lambda seed, chosen: 1.0)
    trials = CeilingSearch(tmp_path, NUM_TOKENS).trials()
    assert trials[0].mixture == pytest.approx([10 / 11, 1 / 11])
    even = dataclasses.replace(found, ceiling=GroupMixture(
        np.full(2, 0.5), found.ceiling.groups, NUM_TOKENS))
    chosen = REGISTRY["ceiling"].take(even)[0]
    tokens = np.bincount(1 - IS_LONG[chosen], case.uncut_labels[chosen])
    assert tokens == pytest.approx([NUM_TOKENS / 2] * 2, abs=50)  # half of a document


def test_a_search_whose_first_annealings_diverge_finds_nothing_and_is_not_repeated(case, tmp_path):
    annealed: list[int] = []

    def anneal(seed: int, chosen: np.ndarray) -> float:
        annealed.append(seed)
        return np.inf

    for _ in range(2):
        found = CeilingSearch(tmp_path, NUM_TOKENS).completed(case, anneal)
        assert len(annealed) == 2  # the pool, and what the default selects
        with pytest.raises(NoCeiling, match="the annealings that the search begins with diverge"):
            REGISTRY["ceiling"].take(found)


def test_where_the_default_selects_nothing_the_search_begins_with_the_pool(case, tmp_path):
    tight = dataclasses.replace(case, config=dataclasses.replace(case.config, stiff_budget=1e-9))
    found = CeilingSearch(tmp_path, NUM_TOKENS).completed(tight, lambda seed, chosen: 1.0)
    assert found.ceiling is not None
    trials = CeilingSearch(tmp_path, NUM_TOKENS).trials()
    assert len(trials) == num_annealings(2, 1, NUM_ROUNDS)
