"""How much of a choice repeats, where it is known how much should."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from written_texts import written

from megatron_direct.comparison import rivals  # noqa: F401  (registers its arms)
from megatron_direct.comparison.arms import REGISTRY, Arm, Case
from megatron_direct.comparison.repeats import repeats_of
from megatron_direct.curvature.spectrum import Directions
from megatron_direct.selection.config import SelectionConfig
from megatron_direct.selection.evidence import Evidence
from megatron_direct.selection.halves import source_blocks

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


def test_of_a_half_of_few_validation_samples_nothing_is_known():
    """Ten documents of four sources and six of four others, of which one half gets six."""
    case, sources = _case(1.0), np.array([2, 1, 0, 0, 0, 3, 0, 0, 0, 0, 6, 4, 4, 4, 7, 5])
    whole = case.evidence["onset"]
    few = dataclasses.replace(whole, valid_rows=whole.valid_rows[:16], valid_sources=sources,
                              valid_datasets=np.repeat([0, 1], [10, 6]))
    assert np.bincount(source_blocks(few) % 2).min() == 6
    case = dataclasses.replace(case, valid_domains=case.valid_domains[:16],
                               valid_labels=case.valid_labels[:16], evidence={"onset": few})
    assert repeats_of(REGISTRY["gradient-cosine"], case, K) is None
    known = dataclasses.replace(few, valid_sources=None)
    case = dataclasses.replace(case, evidence={"onset": known})
    assert repeats_of(REGISTRY["gradient-cosine"], case, K) is not None


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


def test_copies_count_as_often_as_they_are_taken():
    """Both halves take the same ten samples twice; at random 10 x 10 / N samples would be in both,
    each with two copies."""
    twice = Arm("twice", "", lambda case: np.repeat(np.arange(10), 2), ("onset",))
    found = repeats_of(twice, _case(1.0), 20)
    assert found.samples == 1.0
    assert found.by_chance == pytest.approx(2 * (10 * 10 / N) / 20)


def test_where_half_of_the_evidence_keeps_no_budget_nothing_is_known():
    """A budget a little above what the cheapest samples cost; by half of the coordinates, noise
    along the stiff direction has twice the variance."""
    case = _case(0.0)
    costs = (case.evidence["select"].rows @ case.evidence["select"].directions.sketches[0]) ** 2
    tight = dataclasses.replace(case, config=dataclasses.replace(
        case.config, stiff_budget=1.01 * float(np.sort(costs)[:K].sum())))
    assert len(REGISTRY["direct"].take(tight)[0]) == K
    assert repeats_of(REGISTRY["direct"], tight, K) is None


def test_half_of_the_evidence_is_made_of_what_the_arm_reads_one_half_at_a_time(monkeypatch):
    case, events, half = _case(1.0), [], Evidence.half

    def noted(evidence: Evidence, part) -> Evidence:
        events.append(next(name for name, of in case.evidence.items() if of is evidence))
        return half(evidence, part)

    def choose(case: Case) -> np.ndarray:
        events.append("chosen")
        return np.arange(K)

    case = dataclasses.replace(case, evidence={
        name: dataclasses.replace(case.evidence["onset"]) for name in ("onset", "select", "pilot")})
    monkeypatch.setattr(Evidence, "half", noted)
    for needs, read in ((("pilot",), ["onset", "pilot"]), (("share",), ["onset", "select"]),
                        (("text",), ["onset"])):
        events.clear()
        repeats_of(Arm("noted", "", choose, needs), case, K)
        assert events == [*read, "chosen"] * 2
