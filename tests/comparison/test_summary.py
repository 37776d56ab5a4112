"""The summary of a small run directory, figure by figure against numpy on its files."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from synthetic_run import sample_texts, write_run

from megatron_direct.comparison.summary import jaccard, summarise
from megatron_direct.runtime import files

ARMS = {"random": (0.0, 0.0, 0.0), "constant": (0.25, 0.0, 0.5), "worse": (-0.4, 0.02, 0.5),
        "perplexity-low": (0.05, 0.2, 0.33), "descent": (0.3, 0.02, 1.3)}
SEEDS = (1, 2, 5)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "one", ARMS, seeds=SEEDS, default="descent",
                     num_candidates=60, num_select=15, iterations=12,
                     missing={("worse", 2)}, texts=sample_texts())


@pytest.fixture(scope="module")
def summary(run_dir):
    return summarise(run_dir)


def _arm(summary, name):
    return next(arm for arm in summary["arms"] if arm["name"] == name)


def _result(run_dir, arm, seed):
    return files.read_json(run_dir / "arms" / arm / str(seed) / "result.json")


def test_it_is_plain_json(summary):
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_the_headline_is_the_mean_over_test_sets(run_dir, summary):
    by_seed = []
    for seed in SEEDS:
        test = _result(run_dir, "descent", seed)["after"]["test"]
        by_seed.append((test["embedded_docstrings_test"] + test["embedded_source_test"]) / 2)
    arm = _arm(summary, "descent")
    assert arm["losses"] == pytest.approx(dict(zip(["1", "2", "5"], by_seed, strict=True)))
    assert arm["mean_loss"] == pytest.approx(np.mean(by_seed))
    assert arm["tests"]["all"] == pytest.approx(arm["mean_loss"] + 0.05)
    losses = [arm["mean_loss"] for arm in summary["arms"]]
    assert losses == sorted(losses)


def test_differences_are_paired_by_seed_and_missing_seeds_counted(run_dir, summary):
    differences = [np.mean([_result(run_dir, "worse", seed)["after"]["test"][name]
                            - _result(run_dir, "random", seed)["after"]["test"][name]
                            for name in summary["setting"]["test"]]) for seed in (1, 5)]
    arm = _arm(summary, "worse")
    assert arm["missing"] == [2]
    assert arm["difference"]["mean"] == pytest.approx(np.mean(differences))
    assert (arm["difference"]["num_pairs"], arm["difference"]["num_left_out"]) == (2, 1)
    assert not summary["finished"]


def test_an_arm_without_spread(summary):
    found = _arm(summary, "constant")["difference"]
    assert found["mean"] == pytest.approx(-0.25)
    assert found["interval"] == pytest.approx([-0.25, -0.25])
    assert found["verdict"] == "better"


def test_p_values_are_corrected_for_all_arms_but_the_reference(summary):
    # The least p-values of three seeds is 1/4: with four arms to correct for, 1.
    assert _arm(summary, "constant")["difference"]["p_value"] == 0.25
    assert _arm(summary, "constant")["difference"]["p_holm"] == 1.0
    assert "p_holm" not in _arm(summary, "random")["difference"]


def test_the_default_arm_against_its_rivals(summary):
    assert list(summary["default_against"]) == ["random", "perplexity-low"]
    against = summary["default_against"]["perplexity-low"]
    assert against["mean"] == pytest.approx(
        _arm(summary, "descent")["mean_loss"] - _arm(summary, "perplexity-low")["mean_loss"])
    assert summary["default_against"]["random"]["p_holm"] == 0.5


def test_picks_and_problem(run_dir, summary):
    loss, cost = [], []
    for seed in SEEDS:
        samples = np.load(run_dir / "seeds" / str(seed) / "samples.npz")
        chosen = np.isin(samples["candidates"],
                         np.load(run_dir / "arms" / "descent" / str(seed) / "chosen.npy"))
        loss.append(samples["loss"][chosen].mean())
        cost.append(samples["stiff_cost"][chosen].mean() / samples["stiff_cost"].mean())
    arm = _arm(summary, "descent")
    assert arm["picks"]["samples"] == 15
    assert arm["picks"]["loss_mean"] == pytest.approx(np.mean(loss))
    assert [arm["problem"][str(s)]["stiff_cost"] for s in SEEDS] == pytest.approx(cost)
    assert summary["pool"]["picks"]["samples"] == 60
    assert sum(d["samples"] for d in summary["pool"]["domains"].values()) == pytest.approx(60)


def test_overlaps(run_dir, summary):
    assert jaccard(np.array([1, 2, 3]), np.array([2, 3, 4, 5])) == 2 / 5
    overlap = summary["overlap"]
    matrix = np.array(overlap["matrix"])
    assert np.array_equal(matrix, matrix.T) and (np.diag(matrix) == 1).all()
    chosen = {(arm, seed): set(np.load(run_dir / "arms" / arm / str(seed) / "chosen.npy"))
              for arm in ("worse", "random") for seed in (1, 5)}
    expected = np.mean([len(chosen["worse", s] & chosen["random", s])
                        / len(chosen["worse", s] | chosen["random", s]) for s in (1, 5)])
    i, j = overlap["arms"].index("worse"), overlap["arms"].index("random")
    assert matrix[i, j] == pytest.approx(expected)
    a, b = chosen["worse", 1], chosen["worse", 5]
    assert _arm(summary, "worse")["overlap_between_seeds"] == pytest.approx(
        len(a & b) / len(a | b))


def test_cost_and_break_even(summary):
    arm, cost = _arm(summary, "descent"), _arm(summary, "descent")["cost"]
    share = 1.3 * summary["pool"]["picks"]["tokens"] / summary["setting"]["tokens"]
    assert cost["share_of_annealing"] == pytest.approx(share)
    assert cost["annealing_left"] == pytest.approx(1 - share)
    reference = _arm(summary, "random")["mean_loss"]
    assert cost["needed_at_most"] == pytest.approx((4.8 - reference) / (4.8 - arm["mean_loss"]))
    assert _arm(summary, "worse")["cost"]["needed_at_most"] is None


def test_curves_are_means_over_stretches(run_dir, summary):
    curve = _arm(summary, "descent")["curve"]
    assert curve["iteration"] == list(range(1, 13))
    lines = (run_dir / "arms" / "descent" / "2" / "metrics.jsonl").read_text().splitlines()
    loss = json.loads(lines[3])["loss"]
    assert curve["low"][3] <= loss <= curve["high"][3]


def test_a_run_that_has_hardly_begun(run_dir, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / "arms")
    shutil.rmtree(copy / "seeds" / "2")
    (copy / "texts.json").unlink()
    summary = summarise(copy)
    assert all(arm["mean_loss"] is None for arm in summary["arms"])
    assert _arm(summary, "descent")["missing"] == list(SEEDS)
    assert summary["texts"] is None and list(summary["spectra"]) == ["1", "5"]


def test_samples_of_another_run_are_refused(run_dir, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    np.save(copy / "arms" / "descent" / "1" / "chosen.npy", np.array([10_000]))
    with pytest.raises(ValueError, match="none of the seed's candidates"):
        summarise(copy)
