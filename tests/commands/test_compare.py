"""Arms forked from one checkpoint and compared, as a user runs it, and in other layouts."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
from pathlib import Path

import flat_requests
import numpy as np
import pytest
from page_reader import Page
from ranks import Layout, RankError, run_on_ranks
from trained import LEARNT

from megatron_direct.cli import flags as cli_flags
from megatron_direct.cli.main import make_parser
from megatron_direct.commands import compare as compare_command
from megatron_direct.commands.alternate import AlternateRequest, alternate
from megatron_direct.commands.anneal import anneal
from megatron_direct.commands.arm import AnnealRequest
from megatron_direct.commands.compare import CompareRequest, compare
from megatron_direct.commands.pretrain import PretrainConfig, PretrainRequest, pretrain
from megatron_direct.commands.select import SelectRequest, select
from megatron_direct.comparison import replicates
from megatron_direct.comparison.mixtures import num_annealings
from megatron_direct.config import BatchConfig, Given, OptimizerConfig
from megatron_direct.data import indexed
from megatron_direct.data.mask import SampleMask
from megatron_direct.mcore import checkpoint, grid, model
from megatron_direct.steps import selected
from megatron_direct.steps.decay import set_losses
from megatron_direct.steps.onset import OnsetConfig, open_onset

ITERATIONS = 4
MODEL = LEARNT.model
ARMS = ("random", "perplexity-low", "gradient-dot-adam", "direct")
MEASURED = {"num_eigenpairs": 6, "num_select": 30, "shrinkage_clusters": 3, "pilot_iters": 2,
            "sketch_size": 128, "num_valid_samples": 16}


@pytest.fixture(scope="module")
def folder(learnt_folder) -> Path:
    return learnt_folder


def _onset(folder, name, seed=1):
    return {"load": str(folder / "theta"),
            "data_path": (str(folder / "a"), str(folder / "b")),
            "valid_data_path": (str(folder / "valid"),), "run_dir": str(folder / name),
            "seed": seed, **MEASURED}


def _given(micro_batch_size=2, **batch):
    return Given(batch={"micro_batch_size": micro_batch_size, **batch})


def _compare(folder, layout, name, arms=ARMS, num_seeds=2, test=("test", "test-2"), **settings):
    compare(flat_requests.make(
        CompareRequest, layout.config(), _given(), **{**_onset(folder, name), **settings},
        micro_batch_size=2,
        test_data_path=tuple(str(folder / name) for name in test), arms=arms,
        num_seeds=num_seeds, lr_wsd_decay_iters=ITERATIONS))


def _select_and_anneal(folder, name, seed):
    """The same by the two commands that a user would run after the comparison."""
    select(flat_requests.make(SelectRequest, Layout().config(), _given(),
                              **_onset(folder, name, seed), micro_batch_size=2))
    anneal(flat_requests.make(
        AnnealRequest, Layout().config(), Given(batch={"seed": seed}),
        run_dir=str(folder / name), lr_wsd_decay_iters=ITERATIONS,
        test_data_path=(str(folder / "test"), str(folder / "test-2"))))


def _compare_with_odd_batches(folder, name):
    compare(flat_requests.make(
        CompareRequest, Layout().config(), _given(5), **_onset(folder, name),
        test_data_path=(str(folder / "test"),), arms=("random",)))


def _select_with_odd_batches(folder, name):
    select(flat_requests.make(SelectRequest, Layout().config(), _given(5),
                              **_onset(folder, name)))


def _pretrain_with_odd_batches(folder, name):
    pretrain(PretrainRequest(
        PretrainConfig(data_path=(str(folder / "a"),), save=str(folder / name), train_iters=1),
        MODEL, Layout().config(), OptimizerConfig(),
        BatchConfig(micro_batch_size=5, global_batch_size=8)))


def _compare_where_an_arm_diverges(folder, name):
    def decay(*arguments, **keywords):
        raise FloatingPointError("the loss of iteration 3 is not finite")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replicates, "decay", decay)
        _compare(folder, Layout(), name)


@pytest.fixture(scope="module")
def digest_of_theta(folder) -> str:
    return checkpoint.read_checkpoint(folder / "theta").digest


@pytest.fixture(scope="module")
def run(folder, digest_of_theta) -> Path:
    run_on_ranks(1, _compare, folder, Layout(), "run")
    return folder / "run"


def _result(run, arm, seed):
    return json.loads((run / "arms" / arm / str(seed) / "result.json").read_text())


def _losses(run, arm, seed):
    return _result(run, arm, seed)["after"]["test"]


_FEW = {"num_select": 2}  # an annealing sees them more often than alternate has it by default


def _alternate(folder, name, max_epochs):
    alternate(flat_requests.make(
        AlternateRequest, Layout().config(), _given(seed=1), **{**_onset(folder, name), **_FEW},
        micro_batch_size=2, max_epochs=max_epochs, rounds=2, lr_wsd_decay_iters=ITERATIONS,
        test_data_path=(str(folder / "test"), str(folder / "test-2"))))


def _compare_few(folder, name):
    _compare(folder, Layout(), name, ("direct-rounds",), 1, **_FEW)


def test_an_arm_that_selects_again_is_alternate(folder, digest_of_theta):
    run_on_ranks(1, _compare_few, folder, "again")
    with pytest.raises(RankError, match="more often than --max-epochs 4"):
        run_on_ranks(1, _alternate, folder, "too-often", 4.0)
    run_on_ranks(1, _alternate, folder, "alternated", 100.0)
    arm, alternated = folder / "again" / "arms" / "direct-rounds" / "1", folder / "alternated"
    result = json.loads((alternated / "result.json").read_text())
    assert _losses(folder / "again", "direct-rounds", 1) == result["after"]["test"]
    taken = [np.concatenate([SampleMask.load(
        alternated / "rounds" / str(number) / "selections" / "direct" / "masks"
        / f"{name}.mask.npz").keep for name in "ab"]) for number in range(2)]
    assert not np.array_equal(*taken)
    np.testing.assert_array_equal(np.load(arm / "chosen.npy"), np.flatnonzero(taken[0] | taken[1]))
    assert sorted(path.name for path in arm.iterdir()) == [
        "chosen.npy", "metrics.jsonl", "result.json"]
    assert len((arm / "metrics.jsonl").read_text().splitlines()) == ITERATIONS


def test_every_arm_has_a_result_for_every_seed(run):
    for arm in ARMS:
        for seed in (1, 2):
            result = _result(run, arm, seed)
            assert set(result["after"]["test"]) == {"test", "test-2", "all"}
            assert result["before"] == _result(run, "random", 1)["before"]
            assert len(np.load(run / "arms" / arm / str(seed) / "chosen.npy")) == 30
    assert _losses(run, "random", 1) != _losses(run, "random", 2)  # seeds are replicates
    assert not list(run.glob("arms/*/*/cache"))


def test_summary_and_page_tell_the_differences(run):
    found = json.loads((run / "comparison.json").read_text())
    assert found["finished"] is True
    by_name = {arm["name"]: arm for arm in found["arms"]}

    def means(arm):
        return [np.mean([_losses(run, arm, seed)[name] for name in ("test", "test-2")])
                for seed in (1, 2)]

    assert by_name["direct"]["difference"]["mean"] == pytest.approx(
        np.mean(np.subtract(means("direct"), means("random"))))
    assert found["setting"]["default_arm"] == "direct"
    costs = [by_name[arm]["cost"]["passes"] for arm in ARMS]
    assert costs[0] == 0 and costs[1] == pytest.approx(1 / 3) and min(costs[2:]) > 0
    page = Page((run / "report.html").read_text())
    assert "direct, the default of select, ends with a mean test loss of" in page.text
    assert page.external == []
    assert "| `direct`" in (run / "results.md").read_text()


def _key_of_command(words):
    request = cli_flags.request_from(CompareRequest, make_parser(words[:1]).parse_args(words))
    assert request.compare.arms == tuple(ARMS) and request.compare.num_seeds == 2
    return compare_command._key(compare_command._setting(request)).digest()


def test_the_command_that_it_writes_is_the_one_that_was_run(run):
    """Its flags, parsed as the command line is, give the key of the run again."""
    command = (run / "results.md").read_text().split("```bash\n")[1].split("```")[0]
    words = shlex.split(command.split("\n", 1)[1].replace("\\\n", " "))
    assert words[:2] == ["megatron-direct", "compare"]
    expected = json.loads((run / "manifest.json").read_text())["digest"]
    assert run_on_ranks(1, _key_of_command, words[1:]) == [expected]


def test_direct_is_what_select_and_anneal_make(folder, run):
    run_on_ranks(1, _select_and_anneal, folder, "by-hand", 2)
    masks = selected.selection_folder(folder / "by-hand", "direct") / "masks"
    kept = np.concatenate([SampleMask.load(masks / f"{name}.mask.npz").keep for name in "ab"])
    np.testing.assert_array_equal(np.flatnonzero(kept),
                                  np.load(run / "arms" / "direct" / "2" / "chosen.npy"))
    result = json.loads((selected.arm_folder(folder / "by-hand", "direct")
                         / "result.json").read_text())
    assert result["after"]["test"] == _losses(run, "direct", 2)


def test_carries_on_arm_by_arm_and_takes_more_arms_later(folder, run):
    broken = folder / "broken"
    shutil.copytree(run, broken)
    # Killed in the second arm of the first seed: no result, and half a metrics file.
    (broken / "arms" / "perplexity-low" / "1" / "result.json").unlink()
    shutil.rmtree(broken / "arms" / "direct" / "2")
    untouched = (broken / "arms" / "random" / "2" / "result.json").stat().st_mtime_ns
    run_on_ranks(1, _compare, folder, Layout(), "broken", (*ARMS, "whole-pool"))
    for arm, seed in (("perplexity-low", 1), ("direct", 2)):
        assert _losses(broken, arm, seed) == _losses(run, arm, seed)
    assert (broken / "arms" / "random" / "2" / "result.json").stat().st_mtime_ns == untouched
    found = json.loads((broken / "comparison.json").read_text())
    assert {arm["name"] for arm in found["arms"]} == {*ARMS, "whole-pool"}
    # A later call for one seed does not lose what there is of the other.
    run_on_ranks(1, _compare, folder, Layout(), "broken", ARMS, 1)
    assert json.loads((broken / "comparison.json").read_text())["arms"] == found["arms"]


@pytest.mark.parametrize("layout", [
    pytest.param(Layout(tp=2, pp=2), marks=pytest.mark.slow), Layout(dp=2)], ids=str)
def test_other_layouts_find_the_same(folder, run, layout):
    name = f"run-{layout}"
    run_on_ranks(layout.world_size, _compare, folder, layout, name, ("random", "direct"), 1)
    for arm in ("random", "direct"):
        chosen, there = (set(np.load(path / "arms" / arm / "1" / "chosen.npy").tolist())
                         for path in (run, folder / name))
        # Training multiplies rounding: after a pilot one near-tie may fall the other way.
        assert len(chosen & there) >= (30 if arm == "random" else 29)
        for test, loss in _losses(run, arm, 1).items():
            assert _losses(folder / name, arm, 1)[test] == pytest.approx(loss, rel=1e-3)


def test_an_arm_that_is_none_is_refused(folder):
    with pytest.raises(RankError, match="--arms best: unknown arm; the arms are random, "):
        run_on_ranks(1, _compare, folder, Layout(), "refused", ("best",))
    assert not (folder / "refused").exists()


def test_batches_that_the_ranks_do_not_divide_are_refused_before_anything_is_written(folder):
    def all_of_it(work, name):
        with pytest.raises(RankError, match="--global-batch-size 8 is not a multiple of "
                                            "--micro-batch-size 5 times 1 data-parallel"):
            run_on_ranks(1, work, folder, name)
        assert not (folder / name).exists()

    all_of_it(_compare_with_odd_batches, "odd-compare")
    all_of_it(_select_with_odd_batches, "odd-select")
    all_of_it(_pretrain_with_odd_batches, "odd-pretrain")


def test_domain_arms_need_a_domain_in_common(folder):
    with pytest.raises(RankError, match=r"--arms domain: no domain of the validation sets \(valid\)"
                                        r" is a domain of the pools \(a, b\)"):
        run_on_ranks(1, _compare, folder, Layout(), "refused", ("random", "domain"))


def test_a_test_set_that_a_selection_saw_is_refused(folder):
    with pytest.raises(RankError, match="valid.* is listed"):
        run_on_ranks(1, _compare, folder, Layout(), "refused", ARMS, 1, ("valid",))


def test_an_annealing_that_diverges_is_reported_and_the_others_go_on(folder, run):
    """Not tried again, and not a result."""
    shutil.copytree(run, folder / "diverged")
    shutil.rmtree(folder / "diverged" / "arms" / "perplexity-low" / "2")
    run_on_ranks(1, _compare_where_an_arm_diverges, folder, "diverged")
    found = json.loads((folder / "diverged" / "comparison.json").read_text())
    missing = {arm["name"]: arm["missing"] for arm in found["arms"]}
    assert missing == {**dict.fromkeys(ARMS, []), "perplexity-low": [2]}
    failed = folder / "diverged" / "arms" / "perplexity-low" / "2" / "failed.json"
    assert "not finite" in json.loads(failed.read_text())["error"]
    assert "perplexity-low (seed 2)" in (folder / "diverged" / "results.md").read_text()
    run_on_ranks(1, _compare, folder, Layout(), "diverged")
    assert failed.is_file()


def test_the_reference_is_added_where_it_is_not_asked_for(folder, run):
    shutil.copytree(run, folder / "without")
    shutil.rmtree(folder / "without" / "arms")
    run_on_ranks(1, _compare, folder, Layout(), "without", ("perplexity-low",), 1)
    found = json.loads((folder / "without" / "comparison.json").read_text())
    assert {arm["name"] for arm in found["arms"]} == {"random", "perplexity-low"}


def test_the_checkpoint_is_left_as_it_was(folder, digest_of_theta, run):
    assert checkpoint.read_checkpoint(folder / "theta").digest == digest_of_theta


def _noted_blends(folder, name):
    """Weights of the blends of a comparison of a dataset and of a mean of weights."""
    noted, build = [], replicates.blend.build_blend

    def noting(blend, *arguments):
        noted.append(blend.weights)
        return build(blend, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replicates.blend, "build_blend", noting)
        _compare(folder, Layout(), name, ("dataset:a", "random-constant-averaged"), 1, ("test",))
    return noted


def test_a_dataset_is_half_of_what_its_arm_sees(folder):
    noted = run_on_ranks(1, _noted_blends, folder, "datasets")[0]
    lengths = [indexed.document_lengths(indexed.open_indexed(str(folder / name))) for name in "ab"]
    labels = [(of_pool - 1).sum() for of_pool in lengths]  # whole documents, some longer than 16
    share = labels[0] / sum(labels)
    (weights,) = [weights for weights in noted if weights is not None]
    assert len(noted) == 3 and weights == pytest.approx([0.5 + share / 2, (1 - share) / 2])
    found = json.loads((folder / "datasets" / "comparison.json").read_text())
    assert {arm["name"] for arm in found["arms"]} == {"random", "random-constant-averaged",
                                                      "dataset:a"}
    assert len({arm["mean_loss"] for arm in found["arms"]}) == 3
    with pytest.raises(RankError, match="--arms dataset:c: no pool has this name. The pools are a"):
        run_on_ranks(1, _compare, folder, Layout(), "datasets", ("dataset:c",), 1, ("test",))


def _train_proxy(folder):
    pretrain(PretrainRequest(
        PretrainConfig(data_path=(str(folder / "a"), str(folder / "b")),
                       save=str(folder / "proxy"), train_iters=12),
        dataclasses.replace(MODEL, num_layers=1, hidden_size=16), Layout().config(),
        LEARNT.optimizer, LEARNT.batch))


def _select_by_proxy(folder, name):
    """By two commands: the small model selects, the large one is annealed."""
    select(flat_requests.make(
        SelectRequest, Layout().config(), _given(),
        **{**_onset(folder, name), "load": str(folder / "proxy")}, micro_batch_size=2))
    anneal(flat_requests.make(
        AnnealRequest, Layout().config(), Given(batch={"seed": 1}), run_dir=str(folder / name),
        lr_wsd_decay_iters=ITERATIONS, anneal_load=str(folder / "theta"),
        test_data_path=(str(folder / "test"), str(folder / "test-2"))))


def _compare_by_proxy(folder, name):
    compare(flat_requests.make(
        CompareRequest, Layout().config(), _given(), **_onset(folder, name), micro_batch_size=2,
        test_data_path=tuple(str(folder / name) for name in ("test", "test-2")),
        arms=("random", "direct-proxy"), num_seeds=1, lr_wsd_decay_iters=ITERATIONS,
        proxy_load=str(folder / "proxy")))


def test_a_small_model_selects_for_a_large_one(folder, run):
    run_on_ranks(1, _train_proxy, folder)
    run_on_ranks(1, _select_by_proxy, folder, "select-by-proxy")
    run_on_ranks(1, _compare, folder, Layout(), "compare-by-proxy", ("random",), 1)
    run_on_ranks(1, _compare_by_proxy, folder, "compare-by-proxy")
    masks = selected.selection_folder(folder / "select-by-proxy", "direct") / "masks"
    kept = np.concatenate([SampleMask.load(masks / f"{name}.mask.npz").keep for name in "ab"])
    there = folder / "compare-by-proxy"
    np.testing.assert_array_equal(
        np.flatnonzero(kept), np.load(there / "arms" / "direct-proxy" / "1" / "chosen.npy"))
    result = json.loads((selected.arm_folder(folder / "select-by-proxy", "direct")
                         / "result.json").read_text())
    assert result["after"]["test"] == _losses(there, "direct-proxy", 1)
    assert _losses(there, "random", 1) == _losses(run, "random", 1)  # of the large model
    by_name = {arm["name"]: arm for arm in
               json.loads((there / "comparison.json").read_text())["arms"]}
    assert by_name["direct-proxy"]["cost"]["passes"] > 0
    results = (there / "results.md").read_text()
    assert f"--proxy-load {folder / 'proxy'}" in results  # though an earlier call gave none
    run_on_ranks(1, _compare, folder, Layout(), "compare-by-proxy", ("random",), 1)
    assert (there / "results.md").read_text() == results  # nor does a later one
    with pytest.raises(RankError, match="--arms direct-proxy: no smaller model .*--proxy-load"):
        run_on_ranks(1, _compare, folder, Layout(), "refused", ("direct-proxy",))


def _stable_phase(folder, name):
    """As theta, with the states of the iterations before it."""
    pretrain(PretrainRequest(
        PretrainConfig(data_path=(str(folder / "a"), str(folder / "b")), save=str(folder / name),
                       train_iters=12, save_interval=1),
        MODEL, Layout().config(), LEARNT.optimizer, LEARNT.batch))


@pytest.fixture(scope="module")
def stable(folder) -> None:
    run_on_ranks(1, _stable_phase, folder, "stable")


def _averages(folder, name, arms):
    compare(flat_requests.make(
        CompareRequest, Layout().config(), _given(),
        **{**_onset(folder, name), "load": str(folder / "stable"), "at": "merged",
           "merge_last": 3, "pilot_iters": 0},
        micro_batch_size=2, test_data_path=(str(folder / "test"),), arms=arms, num_seeds=1,
        lr_wsd_decay_iters=8))


def _losses_of_the_mean(folder):
    """By plain arithmetic on the parameters of three loaded models."""
    onset = open_onset(OnsetConfig(
        load=str(folder / "stable"), data_path=(str(folder / "a"),),
        valid_data_path=(str(folder / "valid"),), run_dir="unused"), Layout().config(), _given())
    with grid.model_parallel(onset.job.layout, onset.job.num_model_chunks):
        chunks, states = model.build(onset.job), []
        for iteration in (10, 11, 12):
            checkpoint.load_model(folder / "stable" / f"iter_{iteration:07d}", chunks)
            states.append([p.detach().clone() for p in chunks[0].parameters()])
        for parameter, *values in zip(chunks[0].parameters(), *states, strict=True):
            parameter.data.copy_(sum(values) / 3)
        return set_losses(chunks, onset.job.model, onset.job.batch,
                          test=(str(folder / "test"),))["test"]


@pytest.mark.usefixtures("stable")
def test_averages_of_the_stable_phase_and_of_one_annealing(folder):
    """The first is the mean of its states, and sees no token; the others share an annealing, and
    are what they are when each is annealed alone."""
    run_on_ranks(1, _averages, folder, "averages",
                 ("random", "random-averaged", "stable-averaged"))
    found = {arm: _losses(folder / "averages", arm, 1)
             for arm in ("random", "random-averaged", "stable-averaged")}
    # Sums in float64 against float32.
    assert found["stable-averaged"] == pytest.approx(
        run_on_ranks(1, _losses_of_the_mean, folder)[0], rel=1e-5)
    arms = {arm["name"]: arm
            for arm in json.loads((folder / "averages" / "comparison.json").read_text())["arms"]}
    assert "--merge-last 3" in (folder / "averages" / "results.md").read_text()
    assert "--merge-load" not in (folder / "averages" / "results.md").read_text()
    assert arms["stable-averaged"]["cost"]["tokens"] == 0
    assert arms["random"]["cost"]["tokens"] == 8 * 8 * MODEL.seq_length
    assert [len(arm["curve"]["mean"]) for arm in (arms["random"], arms["random-averaged"])] == \
        [8, 8]
    assert found["random"] != found["random-averaged"]
    for alone in ("random", "random-averaged"):
        name = f"alone-{alone}"
        shutil.copytree(folder / "averages", folder / name)
        shutil.rmtree(folder / name / "arms" / alone)
        run_on_ranks(1, _averages, folder, name, (alone,))
        assert _losses(folder / name, alone, 1) == found[alone]


def _select_at_the_average(folder, name):
    """As the arm does, by hand; and the arm, in a comparison whose default has a pilot."""
    flags = {**_onset(folder, name), "load": str(folder / "stable")}
    select(flat_requests.make(
        SelectRequest, Layout().config(), _given(), **{**flags, "at": "merged", "pilot_iters": 0},
        micro_batch_size=2))
    compare(flat_requests.make(
        CompareRequest, Layout().config(), _given(),
        **{**flags, "run_dir": str(folder / f"{name}-arm")}, micro_batch_size=2,
        test_data_path=(str(folder / "test"),), arms=("direct-merged",), num_seeds=1,
        lr_wsd_decay_iters=2))


@pytest.mark.usefixtures("stable")
def test_the_default_at_the_average_is_what_select_makes_there(folder):
    run_on_ranks(1, _select_at_the_average, folder, "merged")
    masks = selected.selection_folder(folder / "merged", "direct") / "masks"
    kept = np.concatenate([SampleMask.load(masks / f"{name}.mask.npz").keep for name in "ab"])
    np.testing.assert_array_equal(
        np.flatnonzero(kept), np.load(folder / "merged-arm/arms/direct-merged/1/chosen.npy"))


def test_an_average_of_one_state_is_refused(folder):
    for arm in ("stable-averaged", "direct-merged"):
        with pytest.raises(RankError, match=f"--arms {arm}: an average needs at least two"):
            run_on_ranks(1, _compare, folder, Layout(), "refused", ("random", arm))


def _trials(folder, name):
    return json.loads((folder / name / "ceiling" / "trials.json").read_text())


def test_the_ceiling_is_searched_once_and_carried_on(folder, run):
    """It begins with the pool and the default's choice, and ends the same after a kill."""
    shutil.copytree(run, folder / "ceiling")
    run_on_ranks(1, _compare, folder, Layout(), "ceiling", ("ceiling",))
    trials = _trials(folder, "ceiling")
    with np.load(folder / "ceiling" / "ceiling" / "groups.npz") as arrays:
        groups, labels = arrays["groups"], arrays["labels"]
    assert len(trials) == num_annealings(groups.max() + 1, 2, 2)
    totals = np.bincount(groups, labels)
    assert trials[0]["mixture"] == pytest.approx(totals / totals.sum())
    best = min(trials, key=lambda trial: trial["loss"])["mixture"]
    for seed in (1, 2):
        chosen = np.load(folder / "ceiling" / "arms" / "ceiling" / str(seed) / "chosen.npy")
        taken = np.bincount(groups[chosen], labels[chosen], len(best))
        # To half of a sample for each group, of at most 29 tokens.
        assert taken / taken.sum() == pytest.approx(best, abs=15 / taken.sum() * len(best))
    found = {arm["name"]: arm for arm in json.loads(
        (folder / "ceiling" / "comparison.json").read_text())["arms"]}
    tokens = ITERATIONS * 8 * MODEL.seq_length
    assert found["ceiling"]["cost"]["share_of_annealing"] == pytest.approx(len(trials))
    assert found["ceiling"]["cost"]["tokens"] == tokens

    killed = folder / "ceiling-killed"
    shutil.copytree(folder / "ceiling", killed)
    (killed / "ceiling" / "trials.json").write_text(json.dumps(trials[:-4]))
    shutil.rmtree(killed / "arms" / "ceiling")
    run_on_ranks(1, _compare, folder, Layout(), "ceiling-killed", ("ceiling",))
    assert _trials(folder, "ceiling-killed") == trials
    assert _losses(killed, "ceiling", 2) == _losses(folder / "ceiling", "ceiling", 2)
