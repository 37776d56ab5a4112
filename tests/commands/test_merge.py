"""Averages of states as a user makes them: of a training, as gradient point, of an annealing."""

from __future__ import annotations

import itertools
import json
import os
import signal

import flat_requests
import numpy as np
import pytest
from page_reader import Page
from ranks import Layout, RankError, run_on_ranks
from trained import LEARNT

from megatron_direct.commands.anneal import anneal
from megatron_direct.commands.arm import AnnealRequest
from megatron_direct.commands.merge import MergeConfig, MergeRequest, merge
from megatron_direct.commands.pretrain import PretrainConfig, PretrainRequest, pretrain
from megatron_direct.commands.report import ReportConfig, ReportRequest, report
from megatron_direct.commands.select import SelectRequest, select
from megatron_direct.data import indexed
from megatron_direct.data.indexed import dataset_digest
from megatron_direct.data.mask import SampleMask
from megatron_direct.data.samples import Samples
from megatron_direct.errors import UserError
from megatron_direct.gradients.store import SketchStore
from megatron_direct.mcore.training_folder import saved_states
from megatron_direct.runtime import parallel, stopping
from megatron_direct.steps import selected
from megatron_direct.steps.sketch import Drawn, read_sketches

SHARDED = Layout(tp=2, pp=2)


def _pretrain(folder, name="states"):
    pretrain(PretrainRequest(
        PretrainConfig(data_path=(str(folder / "a"),), save=str(folder / name), train_iters=8,
                       save_interval=2),
        LEARNT.model, Layout().config(), LEARNT.optimizer, LEARNT.batch))


@pytest.fixture(scope="module")
def folder(learnt_folder):
    """With the states of iterations 2, 4, 6 and 8 of a training in ``states``."""
    run_on_ranks(1, _pretrain, learnt_folder)
    return learnt_folder


def _merge(folder, name, **settings):
    merge(MergeRequest(MergeConfig(**{"merge_load": (str(folder / "states"),), "merge_last": 3,
                                      "save": str(folder / name), **settings})))


def _select(folder, layout, name, load, settings):
    select(flat_requests.make(SelectRequest, layout.config(), **{
        "load": str(folder / load), "data_path": (str(folder / "a"), str(folder / "b")),
        "valid_data_path": (str(folder / "valid"),), "run_dir": str(folder / name),
        "sketch_size": 64, "num_eigenpairs": 6, "num_select": 40, **settings}))


def _anneal(folder, layout, name, settings):
    anneal(flat_requests.make(
        AnnealRequest, layout.config(), run_dir=str(folder / name), lr_wsd_decay_iters=6,
        test_data_path=(str(folder / "test"),), **settings))


def _sketches(folder, name):
    samples = Samples([str(folder / pool) for pool in "ab"], LEARNT.model.seq_length)
    return read_sketches(SketchStore(folder / name / "sketches", 64), Drawn(
        "pool", samples, samples.usable, [dataset_digest(prefix) for prefix in samples.prefixes]))


def test_gradients_at_the_average_are_those_at_the_merged_checkpoint(folder):
    """In another layout, too; and the annealing still begins at the checkpoint."""
    run_on_ranks(2, _merge, folder, "mean")
    run_on_ranks(1, _select, folder, Layout(), "at-mean", "mean", {"at": "checkpoint"})
    merged = {"at": "merged", "merge_last": 3}
    run_on_ranks(1, _select, folder, Layout(), "merged", "states", merged)
    run_on_ranks(4, _select, folder, SHARDED, "merged-4", "states", merged)
    run_on_ranks(1, _select, folder, Layout(), "onset", "states", {"pilot_iters": 0})
    expected, found, sharded, onset = (_sketches(folder, name).rows for name in (
        "at-mean", "merged", "merged-4", "onset"))
    np.testing.assert_array_equal(found, expected)
    assert np.linalg.norm(sharded - found) < 1e-4 * np.linalg.norm(found)
    assert np.linalg.norm(onset - found) > 1e-2 * np.linalg.norm(found)
    origin, _ = selected.find_selection(folder / "merged", "direct")
    assert origin.load.endswith("states/iter_0000008")


@pytest.mark.slow
def test_other_states_are_another_point(folder):
    settings = {"at": "merged", "merge_last": 2}
    run_on_ranks(1, _select, folder, Layout(), "other", "states", settings)
    states = tuple(str(folder / "states" / f"iter_000000{n}") for n in (6, 8))
    # The same states, named one by one.
    run_on_ranks(1, _select, folder, Layout(), "other", "states",
                 {"at": "merged", "merge_load": states})
    with pytest.raises(RankError, match="holds an average made with other settings"):
        run_on_ranks(1, _select, folder, Layout(), "other", "states",
                     {"at": "merged", "merge_last": 3})


def _stopped(command, *arguments):
    """With SIGTERM in the fifth iteration; then again, without."""
    iterations, stop_is_agreed = itertools.count(1), parallel.stop_is_agreed

    def signalled() -> bool:
        if next(iterations) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return stop_is_agreed()

    with pytest.MonkeyPatch.context() as patch, stopping.signals_noted():
        patch.setattr(parallel, "stop_is_agreed", signalled)
        with pytest.raises(stopping.Stopped):
            command(*arguments)
    command(*arguments)


def _iterations(states):
    return [int(path.name.removeprefix("iter_")) for path in states]


def test_a_stop_changes_no_average(folder):
    """It leaves a state of its own, which an unbroken training does not have."""
    run_on_ranks(1, _stopped, _pretrain, folder, "stopped")
    there = sorted((folder / "stopped").glob("iter_*"))
    assert _iterations(there) == [2, 4, 5, 6, 8]
    for last, upto in ((3, None), (0, None), (2, 6)):
        taken = [_iterations(saved_states(folder / name, last, upto))
                 for name in ("stopped", "states")]
        assert taken[0] == taken[1]
    # The newest counts, whyever it is there.
    assert _iterations(saved_states(folder / "stopped", 2, 5)) == [4, 5]


def test_what_cannot_be_averaged_is_refused(folder):
    with pytest.raises(RankError, match=r"at least two states, and .*states has 1 to take in the "
                                        r"last quarter .* --merge-last"):
        run_on_ranks(1, _select, folder, Layout(), "few", "states", {"at": "merged"})
    with pytest.raises(RankError, match="--weights gives 2 weights for 3 states"):
        run_on_ranks(1, _merge_with, folder, "never", {"weights": ("1", "2")})
    with pytest.raises(UserError, match="expected numbers of at least 0, with a finite sum"):
        MergeConfig(merge_load=("a",), save="b", weights=("0", "0"))
    with pytest.raises(UserError, match="--weights 1e308 1e308: expected"):
        MergeConfig(merge_load=("a", "b"), save="b", weights=("1e308", "1e308"))
    assert not (folder / "never").exists()


def _merge_with(folder, name, settings):
    _merge(folder, name, **settings)


def test_the_last_states_of_an_annealing_are_averaged(folder, capsys):
    run_on_ranks(1, _select, folder, Layout(), "run", "states", {"pilot_iters": 0})
    run_on_ranks(1, _stopped, _anneal, folder, Layout(), "run", {"save_interval": 2})
    arm = selected.arm_folder(folder / "run", "direct")
    metrics = (arm / "metrics.jsonl").read_bytes()
    settings = {"save_interval": 2, "average_last": 3}
    run_on_ranks(4, _anneal, folder, SHARDED, "run", settings)
    assert (arm / "metrics.jsonl").read_bytes() == metrics  # it is not annealed again
    plain = json.loads((arm / "result.json").read_text())
    average = json.loads((arm / "averages" / "3" / "result.json").read_text())
    assert average["arm"] == "direct, last 3 averaged"
    assert average["before"] == plain["before"] and average["after"] != plain["after"]
    # Against the losses of the same average, made and measured by other ways, of the states that
    # an annealing has which is not stopped.
    assert _iterations(sorted((arm / "checkpoints").glob("iter_*"))) == [2, 4, 5, 6]
    run_on_ranks(1, _merge_with, folder, "mean-of-arm", {"merge_load": tuple(
        str(arm / "checkpoints" / f"iter_000000{number}") for number in (2, 4, 6))})
    losses = run_on_ranks(1, _test_losses, folder, "mean-of-arm")[0]
    assert average["after"]["test"] == pytest.approx(losses, rel=1e-5)
    report(ReportRequest(ReportConfig(run_dir=str(folder / "run"))))
    page = Page((folder / "run" / "report.html").read_text())
    assert any(row[0] == "direct, last 3 averaged" for row in page.tables[0])
    with pytest.raises(UserError, match="--average-last 4: with --save-interval 2 an annealing of "
                                        "6 iterations saves 3 states"):
        _anneal(folder, Layout(), "run", {"save_interval": 2, "average_last": 4})


def _test_losses(folder, name):
    from megatron_direct.config import BatchConfig, Job
    from megatron_direct.mcore import checkpoint, grid, model, training_folder
    from megatron_direct.steps.decay import set_losses

    job = Job(LEARNT.model)
    with grid.model_parallel(job.layout, 1):
        chunks = model.build(job)
        checkpoint.load_model(training_folder.latest(folder / name), chunks)
        return set_losses(chunks, job.model, BatchConfig(), test=[str(folder / "test")])["test"]


def test_counts_from_selection_to_annealing(folder):
    """More samples than there are, some twice or three times, in two layouts alike."""
    settings = {"pilot_iters": 0, "num_select": 200, "max_count": 3}
    found = []
    for layout, name in ((Layout(), "counts"), (SHARDED, "counts-4")):
        run_on_ranks(layout.world_size, _select, folder, layout, name, "states", settings)
        masks = selected.selection_folder(folder / name, "direct") / "masks"
        found.append([SampleMask.load(masks / f"{pool}.mask.npz") for pool in "ab"])
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one.counts, other.counts)
    assert sum(mask.num_seen for mask in found[0]) == 200
    assert max(mask.max_count for mask in found[0]) in (2, 3)
    summary = selected.SelectionSummary.read(selected.selection_folder(folder / "counts", "direct"))
    assert sum(part.selected for part in summary.composition.values()) == 200
    assert summary.least_stiff_cost <= summary.stiff_cost
    run_on_ranks(1, _anneal, folder, Layout(), "counts", {})
    run_on_ranks(1, _anneal, folder, Layout(), "counts", {"selection": "random"})
    for arm, masks in (("direct", found[0]), ("random", None)):
        path = selected.arm_folder(folder / "counts", arm)
        blend = json.loads((path / "result.json").read_text())["blend"]
        masks = masks or [SampleMask.load(path / "masks" / f"{pool}.mask.npz") for pool in "ab"]
        assert sum(mask.num_seen for mask in masks) == 200
        for part, mask in zip(blend, masks, strict=True):
            lengths = indexed.document_lengths(indexed.open_indexed(part["prefix"]))
            assert part["tokens"] == lengths @ mask.counts.astype(int)
            assert part["documents"] == mask.num_kept
