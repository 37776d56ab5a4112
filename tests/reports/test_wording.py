"""Numbers and names in words."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_direct.comparison.statistics import compare_by_seed
from megatron_direct.comparison.summary import (
    ArmSummary,
    ComparisonSummary,
    Cost,
    LossesBefore,
    Overlap,
    PoolSummary,
    SampleStatistics,
    SettingSummary,
)
from megatron_direct.reports import wording

COST = Cost(9, 1.4, 0.25, 0.75, 0.4)
QUANTILES = (1.0, 2.0, 3.0, 4.0, 5.0)
SELECTED = SampleStatistics(450, 1000.0, 0.0, 3.0, QUANTILES, QUANTILES)


def _summary(losses: dict[str, dict[int, float]], cost: Cost = COST) -> ComparisonSummary:
    """Of arms with these losses by seed; `direct` is the default."""
    arms = tuple(ArmSummary(
        name=name, description="", seeds=tuple(of_arm), missing=(), losses=of_arm,
        mean_loss=sum(of_arm.values()) / len(of_arm), tests={},
        difference=compare_by_seed(of_arm, losses["random"]), test_differences={},
        composition={}, selected=dataclasses.replace(SELECTED, tokens=1000.0 * (1 + place)),
        problem={}, overlap_between_seeds=None, repeats=None, curve=None, cost=cost)
        for place, (name, of_arm) in enumerate(losses.items()))
    setting = SettingSummary("x", 450, 1800, 238_000, 30, 3000, (1, 2, 3), (), (), (), "random",
                             "direct", dict.fromkeys(losses, ""), {}, None, {})
    against = {arm.name: compare_by_seed(losses["direct"], arm.losses)
               for arm in arms if arm.name != "direct"}
    return ComparisonSummary(setting, {}, True, 0.95, LossesBefore(4.0, {}),
                             PoolSummary(None, {}), arms, against, Overlap((), ()), {}, None)


RANDOM = {1: 3.5, 2: 3.6, 3: 3.7}
BETTER, LEVEL, WORSE = ({seed: loss + shift * (1 + seed / 10) for seed, loss in RANDOM.items()}
                        for shift in (-0.2, 0.0, 0.2))


def test_names_are_shortened_to_what_tells_them_apart():
    assert wording.short_names(["data_code_test", "data_wiki_en_test"]) == {
        "data_code_test": "code", "data_wiki_en_test": "wiki_en"}
    assert wording.short_names(["data_code_test"]) == {"data_code_test": "data_code_test"}
    assert wording.short_names(["a", "a_b"]) == {"a": "a", "a_b": "a_b"}


def test_lists_in_words():
    assert [wording.listed("abc"[:n]) for n in range(4)] == ["none", "a", "a and b", "a, b and c"]


@pytest.mark.parametrize(("seeds", "words"), [
    ([3], "seed 3"), ([1, 2], "seeds 1 and 2"), ([1, 2, 3], "seeds 1 to 3"),
    ([1, 2, 4], "seeds 1, 2 and 4")])
def test_seeds_in_words(seeds, words):
    assert wording.seeds_in_words(seeds) == words


@pytest.mark.parametrize(("losses", "words"), [
    (BETTER, "3.3600 per token, 0.2400 below random (95 % interval of the difference ["),
    (WORSE, "3.8400 per token, 0.2400 above random (95 % interval of the difference ["),
    (LEVEL, "3.6000 per token, level with random (95 % interval of the difference ["),
    ({1: 3.4}, "3.4000 per token, 0.1000 below random with the one seed that both have."),
    ({4: 3.4}, "3.4000 per token; there is no result for random to compare it with.")])
def test_the_headline_follows_the_numbers(losses, words):
    assert words in wording.headline(_summary({"random": RANDOM, "direct": losses}))


def test_the_default_is_read_against_each_verdict():
    summary = _summary({"random": RANDOM, "direct": BETTER, "a": WORSE, "b": BETTER, "c": {
        seed: loss - 0.1 for seed, loss in BETTER.items()}})
    assert wording.default_sentence(summary) == (
        "direct, the default of select, is better than random and a; not clearly different from b; "
        "worse than c.")
    few = _summary({"random": {1: 3.5}, "direct": {1: 3.4}})
    assert "too few seeds to be compared" in wording.default_sentence(few)


def test_what_chance_does():
    summary = _summary({"random": RANDOM, "direct": BETTER, "a": WORSE})
    # Of 2 arms, 5 % each; three seeds have 2^3 patterns of signs, two of which are as extreme.
    assert wording.chance_sentence(summary) == (
        "With 3 seeds no p-value can be below 0.25, even before the correction for 2 arms. If no "
        "arm differed from random, up to about 0.1 of them would still be called better or worse "
        "by chance.")


@pytest.mark.parametrize(("losses", "cost", "words"), [
    (BETTER, Cost(9, 1.4, 0.25, 0.75, 0.4), "That pays off if direct reaches the loss of random on "
     "75 % of the annealing's tokens, which was not measured; if each further token brings less "
     "than the one before, it needs at most 40 %."),
    (BETTER, Cost(9, 1.4, 0.25, 0.75, None), "tokens, which was not measured."),
    (WORSE, Cost(9, 1.4, 0.25, 0.75, None), "tokens; it does not reach it on all of them."),
    (BETTER, Cost(9, 1.4, 1.5, 0.0, 0.4), "150 % of the annealing itself. The annealing here is so "
     "short that no saving of its tokens would pay for that.")])
def test_what_selecting_costs(losses, cost, words):
    sentence = wording.cost_sentence(_summary({"random": RANDOM, "direct": losses}, cost))
    assert sentence.startswith("Selecting with direct costs 1.4 training passes over the pool, ")
    assert sentence.endswith(words)


def test_nothing_is_said_of_a_cost_that_is_not_known():
    summary = _summary({"random": RANDOM, "direct": BETTER}, Cost(9, None, None, None, None))
    assert wording.cost_sentence(summary) == ""


def test_how_often_samples_are_seen():
    assert wording.repetition_sentence(_summary({"random": RANDOM, "direct": BETTER})) == (
        "The annealing sees the selected samples 1.5 times (direct) to 3 times (random).")


def test_how_often_documents_are_seen_that_the_sequence_length_cuts():
    summary = _summary({"random": RANDOM, "direct": BETTER})
    arms = tuple(dataclasses.replace(arm, selected=dataclasses.replace(
        arm.selected, uncut_tokens=6000.0 / (1 + place))) for place, arm in enumerate(summary.arms))
    assert wording.repetition_sentence(dataclasses.replace(summary, arms=arms)) == (
        "The annealing sees the selected samples 0.5 times (random) to 1 times (direct).")


def test_the_setting_in_a_sentence():
    assert wording.setting_sentence(_summary({"random": RANDOM, "direct": BETTER})) == (
        "450 of 1,800 samples are selected; the model has 0.238 M parameters; each annealing runs "
        "for 30 iterations on 3 thousand tokens; seeds 1 to 3.")
