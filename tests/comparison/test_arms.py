"""What each arm takes, on cases small enough to say what it should."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from written_texts import random_texts

from megatron_direct.comparison.arms import REGISTRY, Arm, Case, matched
from megatron_direct.comparison.measurements import MEASUREMENTS
from megatron_direct.curvature.spectrum import Directions
from megatron_direct.data.ngram_likeness import likeness_of_dsir
from megatron_direct.selection.treatment import Evidence, SelectionConfig

N, M, SIZE, K = 60, 12, 16, 18
VECTORS = np.linalg.qr(np.random.default_rng(1).standard_normal((SIZE, 4)))[0].T
STIFF = VECTORS[:2]


PLAIN = {"contrast": False, "weight_by_tokens": True}


@pytest.fixture(scope="module")
def case() -> Case:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((N, SIZE)).astype(np.float32)
    rows *= rng.uniform(0.5, 2, (N, 1)).astype(np.float32)
    valid = (rng.standard_normal((M, SIZE)) + 0.5).astype(np.float32)
    directions = Directions(np.array([8.0, 4.0, 1.0, 0.5]), VECTORS, 2)
    domains = np.array(["code"] * 40 + ["prose"] * 20)
    evidence = Evidence(rows, rng.integers(5, 50, N), np.arange(N) // 40, 2, np.arange(N), valid,
                        directions, texts=random_texts(N, M))
    names = ("adam-sketches", "select", "proxy", "merged", "pilot")
    other = {name: dataclasses.replace(evidence, rows=np.roll(rows, shift, axis=1))
             for shift, name in enumerate(names, 1)}
    return Case({"onset": evidence, **other}, rng.uniform(1, 5, N), domains, rng.random(N) < 0.25,
                np.array(["code"] * 4 + ["prose"] * 8), np.full(M, 10), K, 3,
                SelectionConfig(num_select=K), token_features=lambda: rows[:, :3])


# Of a ceiling it takes what a search found: tests/commands/test_compare.py.
@pytest.mark.parametrize("name", [name for name in REGISTRY if name != "ceiling"])
def test_takes_k_candidates_once_each_and_again_the_same(case, name):
    chosen = REGISTRY[name].take(case)[0]
    sizes = {"stable-averaged": 0, "direct-half": N // 2, "direct-quarter": N // 4}
    assert len(chosen) == (N if name.startswith("whole-pool") else sizes.get(name, K))
    assert np.array_equal(chosen, np.unique(chosen)) and set(chosen) <= set(range(N))
    assert np.array_equal(chosen, REGISTRY[name].take(case)[0])
    assert set(REGISTRY[name].needs) <= {"losses", "text", "share", "ceiling", *MEASUREMENTS}


def _rows(case, which="onset"):
    return case.evidence[which].rows


def _dots(case, which="onset"):
    return _rows(case, which) @ case.evidence[which].valid_rows.mean(0)


def _under_the_inverse(evidence):
    """By the dense matrix."""
    values, vectors = evidence.directions.eigenvalues, evidence.directions.sketches
    curvature = vectors.T @ np.diag(values) @ vectors + 0.1 * values.mean() * np.eye(SIZE)
    solved = np.linalg.solve(curvature, evidence.valid_rows.astype(float).mean(0))
    return evidence.rows @ solved / np.linalg.norm(evidence.rows, axis=1)


@pytest.mark.parametrize("name, score", [
    ("perplexity-low", lambda case: -case.losses),
    ("perplexity-middle", lambda case: -abs(
        case.losses.argsort().argsort() + 0.1 - (N - 1) / 2)),
    ("perplexity-high", lambda case: case.losses),
    ("gradient-norm", lambda case: (_rows(case) ** 2).sum(1)),
    ("gradient-dot", _dots),
    ("gradient-cosine", lambda case: _dots(case) / np.linalg.norm(_rows(case), axis=1)),
    ("gradient-dot-adam", lambda case: _dots(case, "adam-sketches")),
    ("pilot-dot", lambda case: _dots(case, "select")),
    ("stiff-alignment", lambda case: (_rows(case) @ STIFF.T)
     @ (STIFF @ case.evidence["onset"].valid_rows.mean(0))),
    ("ngrams", lambda case: likeness_of_dsir(case.evidence["onset"].texts)),
    ("ngrams-smoothed", lambda case: case.evidence["onset"].texts.likeness(np.zeros(M, int))[0]),
    ("influence", lambda case: _under_the_inverse(case.evidence["onset"])),
    ("influence-select", lambda case: _under_the_inverse(case.evidence["select"])),
])
def test_scores_take_the_best(case, name, score):
    assert set(REGISTRY[name].take(case)[0]) == set(np.argsort(-score(case))[:K])


@pytest.mark.parametrize("name", ["domain", "oracle"])
def test_domains_have_the_shares_of_tokens_that_the_validation_set_has(case, name):
    """Half of its tokens is code, whose documents are four times as long, in both sets."""
    rng = np.random.default_rng(0)
    domains, valid_domains = (np.repeat(["code", "prose"], counts)
                              for counts in ((2000, 2000), (20, 80)))
    labels = rng.integers(50, 150, 4000) * np.where(domains == "code", 4, 1)
    large = dataclasses.replace(
        case, losses=rng.random(4000), domains=domains, corrupted=rng.random(4000) < 0.25,
        evidence={"onset": dataclasses.replace(case.evidence["onset"], labels=labels)},
        valid_domains=valid_domains, valid_labels=np.where(valid_domains == "code", 400, 100),
        num_select=1000)
    chosen = REGISTRY[name].take(large)[0]
    of_code = chosen[domains[chosen] == "code"]
    # Four standard errors of the lengths that are drawn; with shares of samples it is 0.8.
    assert labels[of_code].sum() / labels[chosen].sum() == pytest.approx(0.5, abs=0.025)


def test_of_a_domain_that_is_too_small_all_is_taken(case):
    few = dataclasses.replace(case, valid_domains=np.full(M, "prose"), num_select=30)
    taken = few.domains[REGISTRY["domain"].take(few)[0]]
    assert (taken == "prose").sum() == 20 and len(taken) == 30  # all there are, filled up


def test_oracle_takes_nothing_corrupted_while_there_is_other(case):
    assert not case.corrupted[REGISTRY["oracle"].take(case)[0]].any()


def test_oracle_takes_sound_samples_of_other_domains_before_corrupted_ones(case):
    domains = np.array(["prose"] * 10 + ["code"] * 50)
    corrupted = np.arange(N) < 8
    few = dataclasses.replace(case, domains=domains, corrupted=corrupted,
                              valid_domains=np.full(M, "prose"))
    chosen = REGISTRY["oracle"].take(few)[0]
    assert not corrupted[chosen].any() and (domains[chosen] == "prose").sum() == 2


def test_quotas_hold_in_the_arms_that_solve(case):
    limited = dataclasses.replace(case, limits={"groups": case.domains,
                                                "quotas": {"prose": (11, 11)}})
    for name in ("direct", "direct-pilot", "descent", "alignment", "flat-energy-no-budget"):
        assert (case.domains[REGISTRY[name].take(limited)[0]] == "prose").sum() == 11
        assert (case.domains[REGISTRY[name].take(case)[0]] == "prose").sum() != 11


@pytest.mark.parametrize(("name", "evidence", "settings"), [
    ("direct-pilot", "pilot", {}), ("direct-merged", "merged", {}),
    ("direct-plain", "select", PLAIN), ("direct-plain-pilot", "pilot", PLAIN),
    ("direct-ungrouped", "select", {"valid_clusters": 0}),
    ("direct-textless", "select", {"text_weight": 0.0}),
    ("direct-unshrunk", "select", {"shrinkage_clusters": 0}),
    ("direct-unnormalized", "select", {"normalize_gradients": False}),
    ("direct-undrawn", "select", {"draw_unstable": False}),
    ("direct-quarter", "select", {"num_select": N // 4}),
    ("direct-half", "select", {"num_select": N // 2})])
def test_variants_are_the_default_under_other_flags(case, name, evidence, settings):
    flags = dataclasses.replace(case.config, **settings)
    told = dataclasses.replace(case, evidence={"select": case.evidence[evidence]}, config=flags,
                               num_select=flags.num_select)
    chosen = REGISTRY[name].take(case)[0]
    np.testing.assert_array_equal(chosen, REGISTRY["direct"].take(told)[0])
    assert not np.array_equal(chosen, REGISTRY["direct"].take(case)[0])


def test_what_the_solver_said_comes_with_what_it_took(case):
    for name in ("direct", "flat-energy"):
        chosen, said = REGISTRY[name].take(case)
        np.testing.assert_array_equal(chosen, said.indices)
    assert said.stiff_cost <= said.stiff_budget
    assert REGISTRY["random"].take(case)[1] is None


def test_matched_has_the_bins_of_what_it_is_matched_to(case):
    chosen = REGISTRY["perplexity-low"].take(case)[0]
    drawn = matched(case, chosen, num_bins=2)

    def bins(numbers):
        halves = [values > np.quantile(values, 0.5) for values in (case.losses,
                                                                   case.evidence["onset"].labels)]
        return np.bincount(2 * halves[0][numbers] + halves[1][numbers], minlength=4)

    assert np.array_equal(bins(drawn), bins(chosen))


def test_matched_to_several_copies_of_samples_takes_as_many(case):
    """Each bin is used up before any of its samples comes again."""
    chosen = np.repeat(REGISTRY["perplexity-low"].take(case)[0], 3)
    drawn = matched(case, chosen, num_bins=2)
    assert len(drawn) == len(chosen) and np.bincount(drawn).max() <= 3
    low = case.losses <= np.quantile(case.losses, 0.5)
    assert low[drawn].sum() == low[chosen].sum()
    whole = np.repeat(np.arange(len(low)), 2)
    assert np.array_equal(matched(case, whole), whole)


def test_an_arm_that_draws_twice_gets_different_numbers_and_again_the_same(case):
    def choose(case: Case) -> np.ndarray:
        drawn.append([case.rng.standard_normal(4), case.rng.standard_normal(4)])
        return np.arange(K)

    drawn: list[list[np.ndarray]] = []
    for _ in range(2):
        Arm("twice", "", choose).take(case)
    first, second = drawn[0]
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(drawn[0], drawn[1])
    # The first draw is that of a generator with the case's seed, as published results have it.
    np.testing.assert_array_equal(first, np.random.default_rng(case.seed).standard_normal(4))


def test_seeds_draw_anew(case):
    other = dataclasses.replace(case, seed=4)
    assert not np.array_equal(REGISTRY["random"].take(case)[0], REGISTRY["random"].take(other)[0])
