"""The summary of a small run directory, figure by figure against numpy on its files."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from synthetic_run import sample_texts, write_run

from megatron_direct.comparison.summarise import _shared_by_seeds, jaccard_matrix, summarise
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


def _result(run_dir, arm, seed):
    return files.read_json(run_dir / "arms" / arm / str(seed) / "result.json")


def test_the_headline_is_the_mean_over_test_sets(run_dir, summary):
    by_seed = []
    for seed in SEEDS:
        test = _result(run_dir, "descent", seed)["after"]["test"]
        by_seed.append((test["embedded_docstrings_test"] + test["embedded_source_test"]) / 2)
    arm = summary.arm("descent")
    assert arm.losses == pytest.approx(dict(zip(SEEDS, by_seed, strict=True)))
    assert arm.mean_loss == pytest.approx(np.mean(by_seed))
    assert arm.tests["all"] == pytest.approx(arm.mean_loss + 0.05)
    losses = [arm.mean_loss for arm in summary.arms]
    assert losses == sorted(losses)


def test_differences_are_paired_by_seed_and_missing_seeds_counted(run_dir, summary):
    differences = [np.mean([_result(run_dir, "worse", seed)["after"]["test"][name]
                            - _result(run_dir, "random", seed)["after"]["test"][name]
                            for name in summary.setting.test]) for seed in (1, 5)]
    arm = summary.arm("worse")
    assert arm.missing == (2,) and arm.seeds == (1, 5)
    assert arm.difference.mean == pytest.approx(np.mean(differences))
    assert (arm.difference.num_pairs, arm.difference.num_left_out) == (2, 1)
    assert not summary.finished


def test_an_arm_without_spread(summary):
    found = summary.arm("constant").difference
    assert found.mean == pytest.approx(-0.25)
    assert found.interval == pytest.approx((-0.25, -0.25))
    assert found.verdict == "better"


def test_p_values_are_corrected_for_all_arms_but_the_reference(summary):
    # The least p-value of three seeds is 1/4: with four arms to correct for, 1.
    assert summary.arm("constant").difference.p_value == 0.25
    assert summary.arm("constant").difference.p_holm == 1.0
    assert summary.arm("random").difference.p_holm is None


def test_the_default_arm_against_its_rivals(summary):
    assert list(summary.default_against) == ["random", "perplexity-low"]
    against = summary.default_against["perplexity-low"]
    assert against.mean == pytest.approx(
        summary.arm("descent").mean_loss - summary.arm("perplexity-low").mean_loss)
    assert summary.default_against["random"].p_holm == 0.5


def test_selected_samples_and_problem(run_dir, summary):
    loss, cost = [], []
    for seed in SEEDS:
        samples = np.load(run_dir / "seeds" / str(seed) / "samples.npz")
        chosen = np.isin(samples["candidates"],
                         np.load(run_dir / "arms" / "descent" / str(seed) / "chosen.npy"))
        loss.append(samples["loss"][chosen].mean())
        cost.append(samples["stiff_cost"][chosen].mean() / samples["stiff_cost"].mean())
    arm = summary.arm("descent")
    assert arm.selected.samples == 15
    assert arm.selected.loss_mean == pytest.approx(np.mean(loss))
    assert [arm.problem[seed].stiff_cost for seed in SEEDS] == pytest.approx(cost)
    assert summary.pool.candidates.samples == 60


def test_the_annealing_sees_whole_documents(run_dir, summary, tmp_path):
    """Of which runs of an older version know no more than the samples."""
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    for path in copy.glob("seeds/*/samples.npz"):
        samples = dict(np.load(path))
        np.savez(path, **samples, uncut_labels=3 * samples["labels"])
    found, older = summarise(copy).arm("descent").selected, summary.arm("descent").selected
    assert found.tokens == older.tokens == older.tokens_of_an_epoch
    assert found.tokens_of_an_epoch == 3 * found.tokens


def test_domains_of_the_pool_and_of_a_selection(run_dir, summary):
    seeds = [np.load(run_dir / "seeds" / str(seed) / "samples.npz") for seed in SEEDS]
    of_arm = [_result(run_dir, "descent", seed)["composition"] for seed in SEEDS]
    for number, pool in enumerate(summary.setting.pools):
        found = summary.pool.domains[pool]
        assert found.samples == pytest.approx(np.mean([(s["domain"] == number).sum()
                                                       for s in seeds]))
        assert found.corrupted == pytest.approx(np.mean([s["corrupted"][s["domain"] == number].sum()
                                                         for s in seeds]))
        selected = summary.arm("descent").composition[pool].selected
        assert selected == pytest.approx(np.mean([c[pool]["selected"] for c in of_arm]))


def test_jaccard_against_python_sets():
    rng = np.random.default_rng(0)
    sets = [rng.choice(30, size, replace=False) for size in (0, 1, 12, 12, 30)]
    expected = [[len({*a} & {*b}) / max(len({*a} | {*b}), 1) for b in sets] for a in sets]
    np.testing.assert_array_equal(jaccard_matrix(sets, 30), expected)


def test_overlaps(run_dir, summary):
    overlap = summary.overlap
    matrix = np.array(overlap.matrix)
    assert np.array_equal(matrix, matrix.T) and (np.diag(matrix) == 1).all()
    chosen = {(arm, seed): set(np.load(run_dir / "arms" / arm / str(seed) / "chosen.npy"))
              for arm in ("worse", "random") for seed in (1, 5)}
    expected = np.mean([len(chosen["worse", s] & chosen["random", s])
                        / len(chosen["worse", s] | chosen["random", s]) for s in (1, 5)])
    i, j = overlap.arms.index("worse"), overlap.arms.index("random")
    assert matrix[i, j] == pytest.approx(expected)
    a, b = chosen["worse", 1], chosen["worse", 5]
    assert summary.arm("worse").overlap_between_seeds == pytest.approx(
        len(a & b) / len(a | b))
    shared = summary.arm("worse").shared_by_seeds
    assert shared.samples == pytest.approx(2 * len(a & b) / (len(a) + len(b)))


def test_two_random_choices_share_what_chance_has_it():
    """Seeds whose candidates differ, by drawing many such choices."""
    rng = np.random.default_rng(0)
    numbers = {1: np.arange(0, 60), 2: np.arange(20, 100)}
    candidates = {seed: SimpleNamespace(numbers=of_seed) for seed, of_seed in numbers.items()}
    drawn, by_chance = [], set()
    for _ in range(500):
        results = {seed: SimpleNamespace(chosen=rng.choice(len(numbers[seed]), size, replace=False))
                   for seed, size in ((1, 30), (2, 20))}
        shared = _shared_by_seeds(results, candidates)
        drawn.append(shared.samples)
        by_chance.add(shared.by_chance)
    # 40 x 1/2 x 1/4 of 25; the mean of 500 has a standard error of 0.003.
    assert by_chance == {0.2} and np.mean(drawn) == pytest.approx(0.2, abs=0.01)
    nothing = {1: SimpleNamespace(chosen=np.arange(0)), 2: results[2]}
    assert _shared_by_seeds(nothing, candidates) is None
    assert _shared_by_seeds({1: results[1]}, candidates) is None


def test_cost_and_break_even(summary):
    arm, cost = summary.arm("descent"), summary.arm("descent").cost
    share = 1.3 * summary.pool.candidates.tokens / summary.setting.tokens
    assert cost.share_of_annealing == pytest.approx(share)
    assert cost.annealing_left == pytest.approx(1 - share)
    reference = summary.arm("random").mean_loss
    assert cost.needed_at_most == pytest.approx((4.8 - reference) / (4.8 - arm.mean_loss))
    assert summary.arm("worse").cost.needed_at_most is None


def _training_losses(run_dir, arm, seed):
    lines = (run_dir / "arms" / arm / str(seed) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_curves_are_means_and_ranges_over_seeds(run_dir, summary):
    curve = summary.arm("descent").curve
    losses = np.array([_training_losses(run_dir, "descent", seed) for seed in SEEDS])
    assert curve.iteration == tuple(range(1, 13))
    for found, expected in ((curve.mean, losses.mean(0)), (curve.low, losses.min(0)),
                            (curve.high, losses.max(0))):
        np.testing.assert_allclose(found, expected)


def test_long_curves_are_means_over_stretches(tmp_path):
    run = write_run(tmp_path / "run", {"random": (0.0, 0.0, 0.0)}, seeds=(7,), iterations=80,
                    num_candidates=60, num_select=15, default="random")
    curve = summarise(run).arm("random").curve
    losses = _training_losses(run, "random", 7)
    assert curve.iteration == tuple(np.arange(40) * 2 + 1.5)
    np.testing.assert_allclose(curve.mean, np.reshape(losses, (40, 2)).mean(1))


def test_a_seed_without_training_losses_is_left_out_of_the_curve(run_dir, summary, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    (copy / "arms" / "descent" / "2" / "metrics.jsonl").unlink()
    curve = summarise(copy).arm("descent").curve
    losses = [_training_losses(run_dir, "descent", seed) for seed in (1, 5)]
    np.testing.assert_allclose(curve.mean, np.mean(losses, axis=0))


def test_a_run_that_has_hardly_begun(run_dir, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / "arms")
    shutil.rmtree(copy / "seeds" / "2")
    (copy / "texts.json").unlink()
    summary = summarise(copy)
    assert all(arm.mean_loss is None for arm in summary.arms)
    assert summary.arm("descent").missing == SEEDS
    assert summary.texts is None and list(summary.spectra) == [1, 5]


def test_samples_of_another_run_are_refused(run_dir, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    np.save(copy / "arms" / "descent" / "1" / "chosen.npy", np.array([10_000]))
    with pytest.raises(ValueError, match="not among the seed's candidates"):
        summarise(copy)
